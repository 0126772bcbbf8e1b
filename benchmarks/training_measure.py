"""The time of a training step: who takes it, how it is timed, and what becomes of those who fail.

Owns the order of things for one contestant: loading, the first step, warming up, timing, memory. The contestants are in
training_ours.py and training_peers.py. Each has the device for itself while it runs, so there are no turns.
"""

import abc
import dataclasses
import math
import statistics
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from benchmarks import hardware, measure, places, training_profile
from benchmarks.limits import Rates
from benchmarks.measure import Peak, Result
from benchmarks.places import Say
from benchmarks.programs import count_programs
from benchmarks.training_cases import Work

# A GPU's clock falls under load, which takes seconds.
WARM_UP_S = {"cpu": 0.0, "gpu": 3.0}
REPEAT_S = {"cpu": 0.2, "gpu": 2.0}
WARM_UP_STEPS = 3
MIN_STEPS = 3
NUM_PROFILED = 2
# The same on both sides, and of no account for the time.
LEARNING_RATE = 1e-4
SEED = 0


class Trainer(Protocol):
    """A model and its optimizer in memory, and a batch that it trains on again and again.

    found: what it has learned about itself so far, as it will stand in the result.
    """

    found: dict[str, Any]

    def first_step(self) -> None:
        """Compiles, takes a step and waits for it."""
        ...

    def take(self, num_steps: int) -> None:
        """Dispatches steps without waiting for any."""
        ...

    def wait(self) -> None:
        """Until all steps are done."""
        ...

    def losses(self) -> list[float]:
        """Nats a token of every step so far."""
        ...

    def peak(self) -> Peak | None:
        """Most bytes held; None where the device does not say."""
        ...

    def close(self) -> None:
        """Gives up the model."""
        ...


class Contestant(abc.ABC):
    """Something that trains, as data: another process can load it too.

    platform: "cpu" or "gpu", said here since a peer's process must not ask JAX, which would take memory.
    """

    name: str
    ours: ClassVar[bool] = False
    work: Work
    platform: str

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What tells it from others of its name; "batch_size" is one of them."""

    @abc.abstractmethod
    def load(self) -> Trainer:
        """Puts model and optimizer into memory."""

    @property
    def batch_size(self) -> int:
        return self.settings["batch_size"]

    def __str__(self) -> str:
        return f"{self.name} {said(self.settings)}"


def said(settings: dict[str, Any]) -> str:
    """Settings in one short text."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@dataclasses.dataclass(frozen=True)
class Timing:
    """How a contestant is timed.

    steps: a repeat; None: as many as take REPEAT_S. profile: the folder for a trace of ours.
    """

    steps: int | None = None
    repeats: int = 3
    profile: Path | None = None


def rates(*, say: Say) -> Iterator[tuple[dict[str, Any], Rates]]:
    """One pair: what the machine is, and what it does a second. An iterator, as places.py asks for."""
    say("measures what this device reads and multiplies a second")
    yield hardware.describe(), Rates.measure("bfloat16")


def record(contestant: Contestant) -> Result:
    """What a result says of its contestant, measured or not."""
    return {"name": contestant.name, "ours": contestant.ours, "settings": contestant.settings}


def compete(contestant: Contestant, timing: Timing, place: places.Place, say: Say) -> Result:
    """The result of one contestant. What failed has the reason under "failed", whoever it is."""
    result = record(contestant)
    try:
        for found in place(run, contestant, timing, say=say):
            result = found
    except Exception as error:  # its process died, or did not get as far as `run`
        if "ms_per_step" in result:
            result |= {"profile_failed": measure.reason(error)}
        else:
            result |= _failure(contestant, error, say)
    say(f"{contestant}: {describe(result)}")
    return result


def run(contestant: Contestant, timing: Timing, *, say: Say) -> Iterator[Result]:
    """One result, as soon as it is there, and once more with a profile where one is asked for."""
    found = record(contestant)
    trainer = None
    try:
        say(f"{contestant}: loads")
        begin = time.perf_counter()
        trainer = contestant.load()
        found["load_s"] = time.perf_counter() - begin
        _take_first_step(contestant, trainer, found, say)
        _time_steps(contestant, trainer, timing, found)
        yield found
        if timing.profile is not None and contestant.ours:
            yield found | _profiled(contestant, trainer, timing.profile, found, say)
    except Exception as error:
        yield found | _failure(contestant, error, say)
    finally:
        if trainer is not None:
            trainer.close()


def _take_first_step(contestant: Contestant, trainer: Trainer, found: Result, say: Say) -> None:
    say(f"{contestant}: first step")
    begin = time.perf_counter()
    try:
        with count_programs() as programs:
            trainer.first_step()
    finally:
        found |= trainer.found  # above all where it failed
    found["first_step_s"] = time.perf_counter() - begin
    if contestant.ours:
        found["first_step_programs"] = dataclasses.asdict(programs)
    say(f"{contestant}: first step took {found['first_step_s']:.1f} s")


def _time_steps(contestant: Contestant, trainer: Trainer, timing: Timing, found: Result) -> None:
    platform, work = contestant.platform, contestant.work
    warm_up_steps, elapsed_s, step_s = 0, 0.0, math.inf
    while warm_up_steps < WARM_UP_STEPS or elapsed_s < WARM_UP_S.get(platform, 3.0):
        seconds = _seconds(trainer, WARM_UP_STEPS)
        warm_up_steps, elapsed_s, step_s = warm_up_steps + WARM_UP_STEPS, elapsed_s + seconds, seconds / WARM_UP_STEPS
    num_steps = timing.steps or max(MIN_STEPS, math.ceil(REPEAT_S.get(platform, 2.0) / step_s))
    taken_s = [_seconds(trainer, num_steps) / num_steps for _ in range(timing.repeats)]
    step_s = statistics.median(taken_s)
    losses = trainer.losses()
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"the loss is not finite: {losses[0]} at first, {losses[-1]} after {len(losses)} steps")
    found |= {
        "ms_per_step": 1e3 * step_s,
        "tokens_per_s": contestant.batch_size * work.length / step_s,
        "tflops_per_s": work.flops(contestant.batch_size) / step_s / 1e12,
        "model_tflops_per_s": work.model_flops(contestant.batch_size) / step_s / 1e12,
        "steps_s": [round(seconds, 6) for seconds in taken_s],
        "steps_a_repeat": num_steps,
        "warm_up_steps": warm_up_steps,
        "num_steps": len(losses),
        "losses": [losses[0], losses[-1]],
    }
    peak = trainer.peak()
    found["peak_gib"] = None if peak is None else peak.num_bytes / measure.GIB
    if peak is not None and peak.is_upper_bound:
        found["peak_is_upper_bound"] = True


def _seconds(trainer: Trainer, num_steps: int) -> float:
    begin = time.perf_counter()
    trainer.take(num_steps)
    trainer.wait()
    return time.perf_counter() - begin


def _profiled(contestant: Contestant, trainer: Any, folder: Path, found: Result, say: Say) -> Result:
    """A trace of some more steps; failing at it costs no result."""

    def steps() -> None:
        trainer.take(NUM_PROFILED)
        trainer.wait()

    say(f"{contestant}: profiles {NUM_PROFILED} steps")
    try:
        trace = training_profile.record(steps, folder / training_profile.folder_name(str(contestant)))
        profile = training_profile.summary(trace, trainer.program_text(), NUM_PROFILED)
    except Exception as error:
        return {"profile_failed": measure.reason(error)}
    return {"profile": profile | {"trace": str(trace.relative_to(folder)), "ms_per_step": found["ms_per_step"]}}


def _failure(contestant: Contestant, error: Exception, say: Say) -> Result:
    is_memory = lacks_memory(error)
    if contestant.ours and not is_memory:
        for line in traceback.format_exception(error):
            say(line.rstrip())
    return {"failed": measure.reason(error), "out_of_memory": is_memory}


def lacks_memory(error: BaseException) -> bool:
    """Whether it is for want of memory, the device's or, where the system kills the process, the machine's."""
    text = str(error)
    killed = isinstance(error, places.ProcessDiedError) and "exit code -9" in text
    return killed or isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def describe(result: Result) -> str:
    """A result in one line."""
    if "failed" in result:
        planned = f" (planned: {result['planned_gib']:.1f} GiB)" if result.get("planned_gib") else ""
        return f"{'out of memory' if result['out_of_memory'] else 'failed'}{planned}: {result['failed']}"
    parts = [
        f"{result['ms_per_step']:.1f} ms a step",
        f"{result['tokens_per_s']:,.0f} tokens/s",
        f"{result['tflops_per_s']:.1f} TFLOP/s",
        f"first step {result['first_step_s']:.1f} s",
        f"loss {result['losses'][0]:.3f} to {result['losses'][1]:.3f} in {result['num_steps']} steps",
    ]
    if result["peak_gib"] is not None:
        parts.append(f"peak {measure.peak_text(result)}")
    return ", ".join(parts)
