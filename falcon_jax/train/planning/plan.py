"""A plan: what a job's compiled step needs of each GPU, and whether that is there."""

import collections
import dataclasses
import functools
from typing import Any

from falcon_jax.train import flops
from falcon_jax.train.planning import compiler, cost
from falcon_jax.train.planning.compiler import Compiled
from falcon_jax.train.planning.cost import Times
from falcon_jax.train.planning.hlo import Collective
from falcon_jax.train.planning.job import Job, StateBytes, state_bytes, unsplit_shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes are of one device, as the compiler lays them out."""

    job: Job
    state: StateBytes
    compiled: Compiled
    times: Times

    @property
    def peak_bytes(self) -> int:
        return self.compiled.peak_bytes

    @property
    def working_bytes(self) -> int:
        """Gradients, weights in the compute dtype, activations: all of the peak but the state."""
        return self.peak_bytes - self.state.total

    @functools.cached_property
    def unsplit_shares(self) -> dict[str, float]:
        return unsplit_shares(self.job)

    @property
    def spare_bytes(self) -> int:
        """Of what is usable; below 0 where the plan does not fit."""
        return self.job.device.usable_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs together."""
        return self.job.num_tokens / self.times.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs by flops.py's convention, as a share of the GPUs' peak."""
        needed = flops.train_flops_per_token(self.job.config, self.job.length) * self.tokens_per_s
        return needed / (self.job.num_devices * self.job.device.peak_flops)

    @property
    def idle_share(self) -> float:
        """Of a pipeline's ticks, those in which a stage has nothing to do."""
        layout = self.job.layout
        idle = layout.stage - 1
        return idle / (layout.num_micro_batches * layout.pipeline_rounds + idle)

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        job, times, program = self.job, self.times, self.compiled.program
        return {
            "device": job.device.name,
            "gpus": job.num_devices,
            "layout": dataclasses.asdict(job.layout),
            "batch_rows": job.rows,
            "length": job.length,
            "packed": job.packed,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "usable_bytes": job.device.usable_bytes,
            "memory_bytes": job.device.memory_bytes,
            "spare_bytes": self.spare_bytes,
            "parameter_bytes": self.state.parameters,
            "optimizer_bytes": self.state.optimizer,
            "unsplit_shares": self.unsplit_shares,
            "working_bytes": self.working_bytes,
            "largest_values": [{"bytes": size, "type": type, "place": place} for size, type, place in program.largest],
            "collectives": [dataclasses.asdict(collective) for collective in program.collectives],
            "rematerializations": [dataclasses.asdict(each) for each in self.compiled.rematerializations],
            "num_unknown_loops": program.num_unknown_loops,
            "executed_flops": program.flops,
            "times": dataclasses.asdict(times),
            "step_s": times.step_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "pipeline_idle_share": self.idle_share,
            "compile_s": self.compiled.seconds,
        }


def make(job: Job) -> Plan:
    """Compiles the job's step. Raises: as compiler.compile_step."""
    state = state_bytes(job)
    compiled = compiler.compile_step(job)
    return Plan(job=job, state=state, compiled=compiled, times=cost.times(compiled.program, job.device))


def by_kind_and_axes(collectives: tuple[Collective, ...]) -> list[tuple[str, tuple[str, ...], int, float, bool]]:
    """(kind, axes, times a step, bytes a device sends, whether all of it stays in a machine), the most bytes first."""
    found: dict[tuple[str, tuple[str, ...]], list] = collections.defaultdict(lambda: [0, 0.0, True])
    for each in collectives:
        entry = found[each.kind, each.axes]
        entry[0] += each.count
        entry[1] += each.sent_bytes
        entry[2] &= each.within_machine
    rows = [(kind, axes, count, sent, within) for (kind, axes), (count, sent, within) in found.items()]
    return sorted(rows, key=lambda row: -row[3])
