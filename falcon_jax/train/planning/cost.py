"""How long a compiled step would take: a stated model, not a measurement.

Each instruction takes the longer of its FLOPs at the share of the peak that such work reaches and its bytes at the
share of the memory's bandwidth; each collective its bytes, around a ring, over the links inside a machine or the
network between machines. What XLA scheduled synchronously adds up; what it scheduled asynchronously hides behind the
computation as far as that lasts. A pipeline's idle ticks compute on nothing, and are in the program as such.

It leaves out what no program says: autotuning, slow machines, the input, clocks under load. Trust it to rank plans.
"""

import dataclasses

from falcon_jax.train.planning.devices import Device
from falcon_jax.train.planning.hlo import Collective, Program

# Assumed: a kernel's start where others wait in line, and a collective's inside a machine and between machines.
KERNEL_S = 2e-6
COLLECTIVE_S = 15e-6
NETWORK_COLLECTIVE_S = 40e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step. hidden_s: of collectives that run while others compute; the rest is synchronous.

    `step_s` is what all of it takes together.
    """

    products_s: float
    attention_s: float
    memory_s: float
    exchange_s: float
    hidden_s: float

    @property
    def compute_s(self) -> float:
        return self.products_s + self.attention_s + self.memory_s

    @property
    def step_s(self) -> float:
        return self.exchange_s + max(self.compute_s, self.hidden_s)


def times(program: Program, device: Device) -> Times:
    seconds = {"product": 0.0, "attention": 0.0, "memory": 0.0}
    for work in program.work:
        share = device.attention_share if work.kind == "attention" else device.product_share
        computing = work.flops / (share * device.peak_flops)
        moving = work.bytes / (device.memory_share * device.memory_bytes_per_s)
        seconds[work.kind] += work.count * max(computing, moving, KERNEL_S)
    exchanging = dict.fromkeys((True, False), 0.0)
    for collective in program.collectives:
        exchanging[collective.synchronous] += collective_seconds(collective, device)
    return Times(
        products_s=seconds["product"],
        attention_s=seconds["attention"],
        memory_s=seconds["memory"],
        exchange_s=exchanging[True],
        hidden_s=exchanging[False],
    )


def collective_seconds(collective: Collective, device: Device) -> float:
    """Of all its occurrences in a step."""
    latency = COLLECTIVE_S if collective.within_machine else NETWORK_COLLECTIVE_S
    speed = bytes_per_s(collective.size, collective.members_a_machine, device)
    return collective.count * latency + collective.sent_bytes / speed


def bytes_per_s(size: int, members_a_machine: int, device: Device) -> float:
    """What each member of a group can send: between machines a ring has the ports of all members of a machine."""
    if members_a_machine == size:
        return device.link_bytes_per_s
    return min(device.link_bytes_per_s, members_a_machine * device.network_bytes_per_s)
