"""What benchmarks/several_gpus.py runs: jobs, one after the other, none of which can take the others along.

Owns meshes by their sizes, the shapes that jobs use, processes, hangs and failures; what is measured is in the other
several_*.py. A job that raises is a result with its reason. One whose process dies is so too, and the jobs after it get
a fresh process. One that hangs ends its own process, from a thread that needs neither Python nor JAX.
"""

import abc
import dataclasses
import faulthandler
import gc
import itertools
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from benchmarks import measure, training_measure
from benchmarks.clock import Clock
from benchmarks.places import Place, Say
from falcon_jax import sharding
from falcon_jax.config import PRESETS, FalconConfig

Result = dict[str, Any]
# Query and key/value heads of shapes for a machine without GPUs; like the 71 of falcon-7b, seven fall evenly nowhere.
TINY_HEADS = {
    "falcon-7b": (7, 1),
    "falcon-40b": (8, 2),
    "falcon-40b-alibi": (8, 1),
    "falcon-rw-1b": (8, 8),
    "falcon-180b": (24, 8),
}
TINY_HEAD_DIM, TINY_VOCABULARY = 16, 512


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh by the sizes of its axes, so that another process can make it."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    stage: int = 1

    @property
    def num_devices(self) -> int:
        return math.prod(dataclasses.astuple(self))

    def mesh(self) -> Mesh | None:
        """None for one device."""
        return None if self.num_devices == 1 else sharding.make_mesh(*dataclasses.astuple(self))

    def __str__(self) -> str:
        return ", ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(self).items() if size > 1) or "1 device"


class Job(abc.ABC):
    """Something to measure, as data: another process can do it.

    part: one of those that --only names. timeout_s: the most between two results.
    """

    part: ClassVar[str]
    timeout_s: float

    @abc.abstractmethod
    def run(self, say: Say) -> Iterator[Result]:
        """Results, each as soon as it is there. "ok" in one says whether it is right."""

    @property
    def process(self) -> Any:
        """Jobs that follow one another with the same of this share a process."""
        return self.part

    @property
    def xla_flags(self) -> str:
        """What its process has in XLA_FLAGS besides what the environment says."""
        return ""

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    def __str__(self) -> str:
        return f"{self.part}: {self.name}"


def half_dtype() -> str:
    """bfloat16, but on simulated devices float32: XLA's CPU compiler crashes on sums of bfloat16 over devices."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def shape(model: str, num_layers: int | None, tiny: bool) -> FalconConfig:
    """A preset's shape with so many layers (None: all); `tiny`: small in all but what is peculiar to it."""
    config = PRESETS[model]
    if tiny:
        num_heads, num_kv_heads = TINY_HEADS[model]
        width = num_heads * TINY_HEAD_DIM
        config = dataclasses.replace(
            config,
            num_layers=2,
            width=width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            mlp_width=4 * width,
            vocab_size=TINY_VOCABULARY,
            initializer_range=0.1,  # at this width what 0.02 is at the published ones
        )
    return config if num_layers is None else dataclasses.replace(config, num_layers=num_layers)


def run(jobs: Sequence[Job], place_of: Callable[[Job], Place], clock: Clock, say: Say) -> Iterator[Result]:
    """All results of all jobs, in order."""
    left = list(jobs)
    while left:
        if clock.is_late(left[0].part):  # not worth a process
            yield left_out(left.pop(0), clock)
            continue
        _, together = next(itertools.groupby(left, key=lambda job: job.process))
        group = list(together)
        num_done, heard = 0, time.perf_counter()
        try:
            for result, seconds in place_of(group[0])(work, group, clock, say=say):
                heard = time.perf_counter()
                if result is not None:
                    yield result
                else:
                    part = group[num_done].part
                    clock.slowest_s[part] = max(clock.slowest_s.get(part, 0.0), seconds)
                    num_done += 1
        except Exception as died:  # its process did, or could not begin
            if num_done < len(group):
                job = group[num_done]
                hung = time.perf_counter() - heard >= job.timeout_s
                where = f"no result within {job.timeout_s:g} s: where it hung stands on stderr"
                yield record(job) | failure(TimeoutError(where) if hung else died, say)
                num_done += 1
        left = left[num_done:]


def work(jobs: Sequence[Job], clock: Clock, *, say: Say) -> Iterator[tuple[Result | None, float]]:
    """Each job's results, then None and its seconds. To be called through places.py."""
    for job in jobs:
        begin = time.perf_counter()
        if clock.is_late(job.part):
            yield left_out(job, clock), 0.0
        else:
            say(f"{job}")
            with clock.running(job.part):
                for result in _results(job, say):
                    say(f"{job}: {describe(result)}")
                    yield result, 0.0
        yield None, time.perf_counter() - begin
    faulthandler.cancel_dump_traceback_later()


def _results(job: Job, say: Say) -> Iterator[Result]:
    try:
        _watch(job)
        for found in job.run(say):
            yield record(job) | found
            _watch(job)
    except Exception as error:
        yield record(job) | failure(error, say)
    finally:
        gc.collect()  # arrays of a model that is done with


def _watch(job: Job) -> None:
    """Ends this process with its stacks on stderr unless this is called again in time; never the command's own one."""
    if multiprocessing.parent_process() is not None:
        faulthandler.dump_traceback_later(job.timeout_s, exit=True)


def record(job: Job) -> Result:
    """What a result says of its job, measured or not."""
    return {"part": job.part, "name": job.name}


def left_out(job: Job, clock: Clock) -> Result:
    return record(job) | {"left_out": f"it would not be done within --max-seconds {clock.max_seconds:g}"}


def failure(error: Exception, say: Say) -> Result:
    """What stands in the place of figures."""
    is_memory = training_measure.lacks_memory(error)
    if not is_memory:
        for line in traceback.format_exception(error):
            say(line.rstrip())
    return {"failed": measure.reason(error), "out_of_memory": is_memory}


def describe(result: Result) -> str:
    """A result in one line: its plain figures."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    plain = {name: value for name, value in result.items() if isinstance(value, bool | int | float | str)}
    told = [
        f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in plain.items()
        if name not in ("part", "name")
    ]
    return ", ".join(told)
