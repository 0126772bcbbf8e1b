"""The time of a generation by running contestants in turn.

Owns how times are taken and what becomes of failures; contestants (ours here, others in peers.py) own how they
generate. All of them make exactly the same number of tokens from the same ids, greedily, and none stops at an
end-of-text token.
"""

import abc
import contextlib
import dataclasses
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Int

from benchmarks import hardware, limits, places
from benchmarks.limits import Workload
from benchmarks.places import Say
from benchmarks.programs import count_programs
from falcon_jax import Falcon
from falcon_jax.config import FalconConfig
from falcon_jax.errors import one_line
from falcon_jax.generate.sampling import Sampling

# Threads of one library spin a while for more work; after this they leave the cores to the next contestant.
PAUSE_S = 0.05
# Of the memory, for those that are in it at once: caches and activations come on top of their weights.
TOGETHER_SHARE = 0.4
REASON_CHARACTERS = 200
GIB = 2**30

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds from the call to the first token on the host, and to the last."""

    first_s: float
    total_s: float


@dataclasses.dataclass(frozen=True)
class Peak:
    """Most bytes that a library held on its device.

    is_upper_bound: the workload itself took at most that; what came before it took as much.
    """

    num_bytes: int
    is_upper_bound: bool = False


class Runner(Protocol):
    """A model in memory, which runs one workload after another."""

    def begin(self) -> None:
        """Before each workload: forgets what the one before left."""
        ...

    def run(self, prompts: Int[np.ndarray, "B T"], new_tokens: int) -> Times:
        """Blocks until all ids are on the host."""
        ...

    def peak(self) -> Peak | None:
        """Since `begin`; None where the device does not say."""
        ...

    def close(self) -> None:
        """Gives up the model."""
        ...


class Contestant(abc.ABC):
    """Something that generates, named so that another process can load it too: it is data, and picklable.

    name, dtype, weights: as in the results. ours: its failures are errors; a peer's are results.
    """

    name: str
    ours: ClassVar[bool] = False
    config: FalconConfig
    dtype: str
    weights: str

    @abc.abstractmethod
    def load(self) -> Runner:
        """Puts the model into memory."""

    @property
    def num_bytes(self) -> int:
        return limits.weight_bytes(self.config, self.dtype, self.weights)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}" + ("" if self.weights == "native" else f" {self.weights}")


@dataclasses.dataclass(frozen=True)
class Ours(Contestant):
    """falcon_jax on a folder's weights, or on random ones made on the device."""

    name: ClassVar[str] = "falcon_jax"
    ours: ClassVar[bool] = True
    config: FalconConfig
    folder: Path | None
    dtype: str
    weights: str = "native"
    cuda_graphs: bool = True

    def load(self) -> "OurRunner":
        how: dict[str, Any] = {"dtype": self.dtype, "weights": self.weights, "cuda_graphs": self.cuda_graphs}
        if self.folder is None:
            return OurRunner(Falcon.from_config(self.config, **how))
        return OurRunner(Falcon.from_checkpoint(self.folder, **how))


class OurRunner:
    """falcon_jax through the same engine calls as Falcon.generate."""

    def __init__(self, model: Falcon):
        self.engine = model.engine
        self.engine.eos_token_ids = np.array([-1], np.int32)  # no id: nothing ends early
        self.peak_before: int | None = None

    def begin(self) -> None:
        gc.collect()
        self.peak_before = hardware.peak_bytes()

    def run(self, prompts: Int[np.ndarray, "B T"], new_tokens: int) -> Times:
        # The bound on a row is there for requests larger than meant; here the size is what was asked for.
        self.engine.max_cache_tokens = prompts.shape[1] + new_tokens
        begin = time.perf_counter()
        generation = self.engine.start(prompts.tolist(), max_new_tokens=new_tokens, sampling=Sampling(), ahead=True)
        generation.next_chunk(1)
        first = time.perf_counter()
        num_tokens = 1
        while not generation.finished:
            num_tokens += len(generation.next_chunk()[0][0])
        end = time.perf_counter()
        if num_tokens != new_tokens:
            raise RuntimeError(f"falcon_jax made {num_tokens} tokens and not {new_tokens}")
        return Times(first - begin, end - begin)

    def peak(self) -> Peak | None:
        # JAX's peak is its process's, and nothing sets it back.
        peak = hardware.peak_bytes()
        return None if peak is None else Peak(peak, is_upper_bound=peak == self.peak_before)

    def close(self) -> None:
        del self.engine
        gc.collect()


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload by name, and how often it is run after the run that compiles."""

    name: str
    workload: Workload
    repeats: int


def fit_together(contestants: Sequence[Contestant]) -> bool:
    """Whether all of them can be in this device's memory at once."""
    return sum(contestant.num_bytes for contestant in contestants) < TOGETHER_SHARE * hardware.memory_bytes()


def compete(
    groups: Sequence[Sequence[Contestant]], cases: Sequence[Case], place: places.Place, say: Say
) -> Iterator[tuple[str, list[Result]]]:
    """A case's name and its results in the order of a group's contestants, group by group and case by case.

    Contestants of one group take turns run by run, so that a slow phase of the machine falls on all of them; groups
    follow one another.

    Raises:
      Exception: what ours raised. A peer that fails has a result with the reason under "failed".
    """
    for group in groups:
        left = list(cases)
        try:
            for name, results in place(measure_group, group, cases, say=say):
                left.pop(0)
                yield name, results
        except places.ProcessDiedError as error:
            if any(contestant.ours for contestant in group):
                raise
            for case in left:
                yield case.name, [failure(contestant, error, say) for contestant in group]


def measure_group(
    group: Sequence[Contestant], cases: Sequence[Case], *, say: Say
) -> Iterator[tuple[str, list[Result]]]:
    """Loads each of the group once, then runs case after case."""
    entrants = [_Entrant(contestant, say) for contestant in group]
    try:
        for entrant in entrants:
            entrant.load()
        for case in cases:
            yield case.name, _measure_case(entrants, case, interleaved=len(group) > 1, say=say)
    finally:
        for entrant in entrants:
            entrant.close()


def _measure_case(entrants: "Sequence[_Entrant]", case: Case, *, interleaved: bool, say: Say) -> list[Result]:
    prompts = case.workload.prompts(entrants[0].contestant.config)
    for entrant in entrants:
        entrant.warm_up(prompts, case)
    for _ in range(case.repeats):
        for entrant in entrants:
            entrant.take_turn(prompts, case)
    results = [entrant.result(case) | {"interleaved": interleaved} for entrant in entrants]
    for entrant, result in zip(entrants, results):
        say(describe(entrant.contestant, result))
    return results


class _Entrant:
    """A contestant on its way through the cases: its model, its times of one case, and why it cannot go on."""

    def __init__(self, contestant: Contestant, say: Say):
        self.contestant = contestant
        self.say = say
        self.runner: Runner | None = None
        self.times: list[Times] = []
        self.found: Result = {}  # of this case
        self.loaded: Result = {"load_s": None}
        self.not_loaded: str | None = None

    def load(self) -> None:
        self.say(f"{self.contestant}: loads")
        with self._failing(), self._timing("load", self.loaded):
            self.runner = self.contestant.load()
        self.not_loaded = self.found.get("failed")

    def warm_up(self, prompts: Int[np.ndarray, "B T"], case: Case) -> None:
        """The run that compiles and does not count."""
        self.times = []
        self.found = {} if self.not_loaded is None else {"failed": self.not_loaded}
        if self.runner is None:
            return
        self.say(f"{self.contestant}: {case.name}, first run")
        with self._failing():
            self.runner.begin()
            with self._timing("warm_up", self.found):
                self.runner.run(prompts, case.workload.new_tokens)

    def take_turn(self, prompts: Int[np.ndarray, "B T"], case: Case) -> None:
        if self.runner is None or "failed" in self.found:
            return
        with self._failing():
            time.sleep(PAUSE_S)
            self.times.append(self.runner.run(prompts, case.workload.new_tokens))

    def result(self, case: Case) -> Result:
        named = {"name": self.contestant.name, "dtype": self.contestant.dtype, "weights": self.contestant.weights}
        result = named | self.loaded | self.found
        if self.runner is None or "failed" in self.found:
            return result
        return result | summary(self.times, case.workload) | _peak_record(self.runner.peak())

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()

    @contextlib.contextmanager
    def _timing(self, name: str, into: Result) -> Iterator[None]:
        """Notes the seconds of what may compile, and of ours how many programs were compiled and how many were not."""
        begin = time.perf_counter()
        with count_programs() as programs:
            yield
        into[f"{name}_s"] = time.perf_counter() - begin
        if self.contestant.ours:
            into[f"{name}_programs"] = dataclasses.asdict(programs)
            self.say(
                f"{self.contestant}: {into[f'{name}_s']:.1f} s, {programs.compiled} programs compiled, "
                f"{programs.from_cache} from the cache of earlier runs"
            )

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Notes a peer's failure, whatever it is: out of memory, a shape that it cannot take, a compiler's error."""
        try:
            yield
        except Exception as error:
            if self.contestant.ours:
                raise
            self.found["failed"] = reason(error)


def reason(error: BaseException) -> str:
    """An error in one short line."""
    line = f"{type(error).__name__}: {one_line(error)}"
    return line if len(line) <= REASON_CHARACTERS else line[: REASON_CHARACTERS - 3] + "..."


def failure(contestant: Contestant, error: BaseException, say: Say) -> Result:
    """The result of a contestant that did not get as far as having one."""
    named = {"name": contestant.name, "dtype": contestant.dtype, "weights": contestant.weights}
    result = named | {"failed": reason(error)}
    say(describe(contestant, result))
    return result


def summary(taken: Sequence[Times], workload: Workload) -> Result:
    """Medians of the runs, and each run's times. Where nothing is decoded, nothing about decoding."""
    first_s = statistics.median(times.first_s for times in taken)
    total_s = statistics.median(times.total_s for times in taken)
    found: Result = {"first_token_ms": 1e3 * first_s}
    num_steps = workload.new_tokens - 1
    if num_steps:
        steps_s = statistics.median(times.total_s - times.first_s for times in taken)
        found |= {
            "ms_per_step": 1e3 * steps_s / num_steps,  # of a row, a token
            "decode_tokens_per_s": workload.batch_size * num_steps / steps_s,
        }
    return found | {
        "tokens_per_s": workload.batch_size * workload.new_tokens / total_s,  # the prefill's time included
        "runs_s": [[round(times.first_s, 6), round(times.total_s, 6)] for times in taken],
    }


def _peak_record(peak: Peak | None) -> Result:
    if peak is None:
        return {"peak_gib": None}
    return {"peak_gib": peak.num_bytes / GIB} | ({"peak_is_upper_bound": True} if peak.is_upper_bound else {})


def describe(contestant: Contestant, result: Result) -> str:
    """A result in one line."""
    if "failed" in result:
        return f"{contestant}: failed: {result['failed']}"
    parts = [f"first token {result['first_token_ms']:.1f} ms"]
    if "ms_per_step" in result:
        parts += [f"then {result['decode_tokens_per_s']:.1f} tokens/s ({result['ms_per_step']:.3f} ms a step)"]
        parts += [f"{result['tokens_per_s']:.1f} tokens/s in all"]
    if result["peak_gib"] is not None:
        parts += [f"peak {peak_text(result)}"]
    return f"{contestant}: {', '.join(parts)}"


def peak_text(result: Result) -> str:
    """Of a result whose device says how much it held."""
    return f"{'at most ' if 'peak_is_upper_bound' in result else ''}{result['peak_gib']:.2f} GiB"


def ratios(results: Sequence[Result]) -> dict[str, float]:
    """How many times better falcon_jax is than the peers at their best, figure by figure; only what both have.

    decode, first_token, in_all: of speed. peak: of memory, the smallest of a peer over ours.
    """
    ours = [result for result in results if result["name"] == Ours.name and "failed" not in result]
    peers = [result for result in results if result["name"] != Ours.name and "failed" not in result]
    if not ours or not peers:
        return {}
    found = {}
    for name, key in (("decode", "decode_tokens_per_s"), ("in_all", "tokens_per_s")):
        if key in ours[0]:
            found[name] = ours[0][key] / max(peer[key] for peer in peers)
    for name, key in (("first_token", "first_token_ms"), ("peak", "peak_gib")):
        if ours[0][key] is not None:
            found[name] = min(peer[key] for peer in peers) / ours[0][key]
    return found


def start_up_s(command: Sequence[str]) -> dict[str, float]:
    """Seconds from the start of a process to its first byte on stdout, and to its end; one run, not repeated.

    Raises:
      RuntimeError: the process failed or wrote nothing.
    """
    begin = time.perf_counter()
    with _process(command) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_s = time.perf_counter() - begin
        process.stdout.read()
        errors = process.stderr.read().decode() if process.stderr is not None else ""
    if process.returncode != 0 or not first:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}: {errors[-500:]}")
    return {"first_token_s": first_s, "total_s": time.perf_counter() - begin}


def generate_command(folder: Path, dtype: str, new_tokens: int, cuda_graphs: str = "on") -> list[str]:
    """The command whose start-up is measured: without compiled programs of earlier runs, so that all runs are alike."""
    script = str(hardware.REPOSITORY / "scripts" / "generate.py")
    options = ["--model", str(folder), "--dtype", dtype, "--max-new-tokens", str(new_tokens)]
    options += ["--cuda-graphs", cuda_graphs, "--compilation-cache", "off"]
    return [sys.executable, script, "The lighthouse keeper", *options]


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
        process.wait()
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
