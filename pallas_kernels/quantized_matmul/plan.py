"""How the kernels for a few rows divide their work, decided before anything is traced. See stream.py."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.formats import GROUP, QuantizedWeight
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.product import form_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a block works.

    warpgroups: of a block. stages: chunks that each has in flight.
    width: tiles of 64 outputs at once, which share what is read of x. groups: of 128 inputs, in a chunk.
    splits: blocks that share out the inputs.
    producer: one more warpgroup, each of whose warps starts the copies of one of the others.
    """

    warpgroups: int = 4
    stages: int = 3
    width: int = 1
    groups: int = 1
    splits: int = 1
    producer: bool = False

    @property
    def all_warpgroups(self) -> int:
        """Of a block, a producer too."""
        return self.warpgroups + self.producer

    def smem_bytes(self, form: str, num_rows: int) -> int:
        """Shared memory of a block, without what comes after the products."""
        of_tile = {"native": 2 * GROUP * TILE, "int8": GROUP * TILE + 4 * TILE, "int4": GROUP * TILE // 2 + 2 * TILE}
        chunk = self.groups * (self.width * of_tile[form] + 2 * GROUP * num_rows)
        return self.warpgroups * (self.stages * chunk + 2 * num_rows * TILE * 4)


def fitting_plan(
    form: str, num_rows: int, smem_bytes: int, *, width: int = 1, splits: int = 1, most_warpgroups: int = 4,
    producer: bool = False,
) -> Plan:  # fmt: skip
    """The largest chunks of which every warpgroup holds two or more, by what was measured (benchmarks/LOG.md).

    Raises:
      ValueError: nothing fits.
    """
    most_groups = {"native": 1, "int8": 2, "int4": 2 if producer or most_warpgroups == 2 else 4}[form]
    most_warpgroups = min(most_warpgroups, 3 if form == "native" else 4)
    for groups in (4, 2, 1):
        for warpgroups in (most_warpgroups, 2, 1):
            for stages in (6, 5, 4, 3, 2):
                plan = Plan(warpgroups, stages, width, groups, splits, producer)
                fits = plan.smem_bytes(form, num_rows) <= smem_bytes
                if fits and groups <= most_groups and (warpgroups == most_warpgroups or groups == 1):
                    return plan
    raise ValueError(f"{num_rows} rows and {width} tiles at once do not fit {smem_bytes} bytes of shared memory")


@dataclasses.dataclass(frozen=True)
class Operand:
    """A weight of a launch. first_tile: of the launch's tiles of 64 outputs; num_tiles: how many are its own."""

    form: str  # "native", "int8", "int4"
    num_inputs: int
    num_outputs: int
    first_tile: int = 0

    @property
    def num_tiles(self) -> int:
        return -(-self.num_outputs // TILE)

    @property
    def num_groups(self) -> int:
        return -(-self.num_inputs // GROUP)

    def num_chunks(self, plan: Plan) -> int:
        return -(-self.num_groups // plan.groups)


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a launch reads of its weights: all of one form, either added up or each with tiles of its own."""

    operands: tuple[Operand, ...]
    plan: Plan
    num_blocks: int  # without those that split a tile's inputs

    @property
    def form(self) -> str:
        return self.operands[0].form

    @property
    def num_tiles(self) -> int:
        return max(operand.first_tile + operand.num_tiles for operand in self.operands)

    @property
    def is_sum(self) -> bool:
        return len({operand.first_tile for operand in self.operands}) == 1


def input_launch(
    weights: Sequence[Any], outputs: Sequence[int], num_rows: int, num_sms: int, plan: Plan | None = None,
    *, integers: bool = False,
) -> Launch:  # fmt: skip
    """Of products side by side: weights of as many inputs, with `outputs` each. integers: whether x comes as such."""
    form = form_of(weights[0])
    if plan is None:
        available = compat.MAX_SMEM_BYTES - 1024 - 4 * num_rows * TILE * 2  # tiles on their way out
        available -= 4096 * integers  # what is beside x: 128 bytes for each 128 inputs
        # Of three forms int4 alone gains by a producer, a quarter: the rest waits for memory in any case.
        plan = fitting_plan(form, num_rows, available, producer=form == "int4")
    operands, num_tiles = [], 0
    for weight, num_outputs in zip(weights, outputs, strict=True):
        operands.append(Operand(form, inputs_of(weight), num_outputs, num_tiles))
        num_tiles += operands[-1].num_tiles
    return Launch(tuple(operands), plan, min(num_sms, -(-num_tiles // plan.width)))


def output_launch(
    weights: Sequence[Any], width: int, num_rows: int, num_norms: int, num_sms: int, plan: Plan | None = None
) -> Launch:
    """Of products that are added up: weights of `width` outputs, before `num_norms` norms."""
    form = form_of(weights[0])
    if plan is None:
        plan = output_plan(form, width, num_rows, num_norms, num_sms)
    operands = tuple(Operand(form, inputs_of(weight), width) for weight in weights)
    return Launch(operands, plan, -(-operands[0].num_tiles // plan.width))


def sent_bytes(splits: int, num_rows: int) -> int:
    """What a cluster's first block gets of a tile from the others, in shared memory: of more than 8 rows nothing, as
    there chunks need the room."""
    return 4 * (splits - 1) * num_rows * TILE if num_rows == 8 else 0


def output_plan(form: str, width: int, num_rows: int, num_norms: int, num_sms: int) -> Plan:
    """One or two blocks a multiprocessor, several of them on a tile where there are fewer tiles."""
    tiles = -(-width // TILE)
    splits = 1
    while tiles * splits * 2 <= num_sms + num_sms // 8 and splits < 8 and num_rows <= 32:
        splits *= 2
    # Blocks of one cluster find their place wherever they may be: several fit each multiprocessor, so all run at once.
    per_sm, most_warpgroups = (1, 4) if splits == 1 else (2, 2)
    if form == "int4" and tiles * splits > num_sms and splits > 1 and num_rows <= 16:
        # Multiprocessors with two blocks would take twice as long: int4 waits for arithmetic as well.
        splits, per_sm, most_warpgroups = 2 * splits, 4, 1
    at_once = -(-tiles // num_sms)
    return fitting_plan(
        form,
        num_rows,
        compat.MAX_SMEM_BYTES // per_sm - 2048 - _bytes_after(at_once, splits, num_rows, num_norms),
        width=at_once,
        splits=splits,
        most_warpgroups=most_warpgroups,
        producer=per_sm == 4,
    )


def _bytes_after(width: int, splits: int, num_rows: int, num_norms: int) -> int:
    """Shared memory of what comes after the products of so many tiles: these, their norms, what is read for them."""
    tiles = (width + num_norms) * num_rows * TILE * 2 + width * (2 * num_norms + 2) * TILE * 2
    return tiles + width * sent_bytes(splits, num_rows)


def check_all_run_at_once(launch: Launch, num_rows: int, num_norms: int, num_sms: int) -> None:
    """Raises ValueError where the blocks of an output stage, which wait for one another, would not all fit the GPU, by
    their shared memory and threads."""
    plan = launch.plan
    smem_bytes = plan.smem_bytes(launch.form, num_rows) + _bytes_after(plan.width, plan.splits, num_rows, num_norms)
    a_multiprocessor = min((compat.MAX_SMEM_BYTES + 1024) // (smem_bytes + 1024), 2048 // (plan.all_warpgroups * 128))
    if (num_blocks := launch.num_blocks * plan.splits) > (most := a_multiprocessor * num_sms):
        raise ValueError(f"attention_norm: {plan} makes {num_blocks} blocks, and {most} of them run at once")


def inputs_of(weight: Any) -> int:
    """I of a weight; of a QuantizedWeight rounded up to whole groups."""
    return weight.values.shape[1] * GROUP if isinstance(weight, QuantizedWeight) else weight.shape[0]
