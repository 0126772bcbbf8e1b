"""The limit of a generation by counting, and the time of it by running contestants in turn.

Owns what is counted and how times are taken; contestants (ours here, others in peers.py) own how they generate. All of
them make exactly the same number of tokens from the same ids, greedily, and none stops at an end-of-text token.
"""

import contextlib
import dataclasses
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from benchmarks import hardware
from falcon_jax import Falcon
from falcon_jax.config import FalconConfig
from falcon_jax.generate.sampling import Sampling
from falcon_jax.model.cache import cache_bytes

# More than any cache holds.
MEMORY_READ_BYTES = {"cpu": 512 * 2**20, "gpu": 2**30}
# Threads of one library spin a while for more work; after this they leave the cores to the next contestant.
PAUSE_S = 0.05


@dataclasses.dataclass(frozen=True)
class Workload:
    """What to generate: `batch_size` prompts of `context_tokens` ids each, continued by `new_tokens` (at least 2)."""

    batch_size: int
    context_tokens: int
    new_tokens: int

    def prompts(self, config: FalconConfig) -> Int[np.ndarray, "B T"]:
        """Random ids, the same every time."""
        generator = np.random.default_rng(0)
        return generator.integers(0, config.vocab_size, (self.batch_size, self.context_tokens), np.int32)


@dataclasses.dataclass(frozen=True)
class Limit:
    """The least that a generation must read and multiply, and how fast this device can.

    weight_bytes, cache_bytes: read by one decode step of the whole batch, the cache at its mean length.
    read_bytes_per_s: measured over as many bytes as a step reads, so in the processor's cache if they fit there.
    memory_bytes_per_s: measured over far more than any cache holds.
    prefill_flops: of all prompts, the head for each last token alone; flops_per_s of a large product in this dtype.
    """

    weight_bytes: int
    cache_bytes: int
    read_bytes_per_s: float
    memory_bytes_per_s: float
    prefill_flops: int
    flops_per_s: float

    @classmethod
    def of(cls, config: FalconConfig, workload: Workload, dtype: str) -> "Limit":
        weights = step_weight_bytes(config, dtype)
        cache = cache_bytes(config, workload.batch_size, workload.context_tokens + workload.new_tokens // 2, dtype)
        most = MEMORY_READ_BYTES.get(jax.default_backend(), 2**30)
        memory = hardware.read_bandwidth(most)
        read = memory if weights + cache >= most else max(memory, hardware.read_bandwidth(weights + cache))
        return cls(weights, cache, read, memory, prefill_flops(config, workload), hardware.matrix_rate(dtype))

    @property
    def ms_per_step(self) -> float:
        """Milliseconds of a decode step that does nothing but read, at `read_bytes_per_s`."""
        return 1e3 * (self.weight_bytes + self.cache_bytes) / self.read_bytes_per_s

    @property
    def prefill_ms(self) -> float:
        return 1e3 * self.prefill_flops / self.flops_per_s


def step_weight_bytes(config: FalconConfig, dtype: str) -> int:
    """Bytes of weights that a decode step must read: all but an embedding table that is not the head as well."""
    unread = 0 if config.tie_word_embeddings else config.vocab_size * config.width
    return (config.num_parameters - unread) * jnp.dtype(dtype).itemsize


def prefill_flops(config: FalconConfig, workload: Workload) -> int:
    """Multiplications and additions of the matrix products and of causal attention, for all prompts together."""
    D, H, T = config.width, config.head_dim, workload.context_tokens
    projections = D * (2 * D + 2 * config.num_kv_heads * H) + 2 * D * config.mlp_width
    attention = 2 * D * T * (T + 1) // 2  # q . k and the sum over v, for the keys that causality shows
    return 2 * workload.batch_size * (config.num_layers * (T * projections + attention) + D * config.vocab_size)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds from the call to the first token on the host, and to the last."""

    first_s: float
    total_s: float


class Runner(Protocol):
    """A model in memory. `run` blocks until all ids are on the host."""

    def run(self, prompts: Int[np.ndarray, "B T"], new_tokens: int) -> Times: ...

    def peak_bytes(self) -> int | None: ...

    def close(self) -> None:
        """Gives the memory back."""
        ...


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Something that generates. `load` puts the model into memory, so that large ones can take turns there."""

    name: str
    dtype: str
    num_bytes: int
    load: Callable[[], Runner]


class OurRunner:
    """falcon_jax through the same engine calls as Falcon.generate."""

    def __init__(self, make: Callable[[], Falcon]):
        self.peak_before = hardware.peak_bytes()
        model = make()
        self.engine = model.engine
        self.engine.eos_token_ids = np.array([-1], np.int32)  # no id: nothing ends early

    def run(self, prompts: Int[np.ndarray, "B T"], new_tokens: int) -> Times:
        begin = time.perf_counter()
        generation = self.engine.start(prompts.tolist(), max_new_tokens=new_tokens, sampling=Sampling())
        generation.next_chunk()
        first = time.perf_counter()
        num_tokens = 1
        while not generation.finished:
            num_tokens += len(generation.next_chunk()[0][0])
        end = time.perf_counter()
        if num_tokens != new_tokens:
            raise RuntimeError(f"falcon_jax made {num_tokens} tokens and not {new_tokens}")
        return Times(first - begin, end - begin)

    def peak_bytes(self) -> int | None:
        # JAX's peak is the process's: where something before took more, ours is unknown.
        peak = hardware.peak_bytes()
        return None if peak is None or peak == self.peak_before else peak

    def close(self) -> None:
        del self.engine
        gc.collect()


def ours(config: FalconConfig, folder: Path | None, dtype: str) -> Contestant:
    """falcon_jax on a folder's weights, or on random ones of the same shape."""

    def load() -> OurRunner:
        if folder is None:
            return OurRunner(lambda: Falcon.from_config(config, dtype=dtype))
        return OurRunner(lambda: Falcon.from_checkpoint(folder, dtype=dtype))

    return Contestant("falcon_jax", dtype, config.num_parameters * jnp.dtype(dtype).itemsize, load)


def compete(
    contestants: Sequence[Contestant],
    prompts: Int[np.ndarray, "B T"],
    workload: Workload,
    repeats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One result a contestant, in order.

    They take turns run by run, so that a slow phase of the machine falls on all of them; where they do not fit the
    memory together, one is measured after the other, the last first: PyTorch gives its memory back, JAX does not.
    """
    together = sum(contestant.num_bytes for contestant in contestants) < 0.4 * hardware.memory_bytes()
    groups = [list(contestants)] if together else [[contestant] for contestant in reversed(contestants)]
    results: list[dict[str, Any]] = []
    for group in groups:
        measured = _measure_group(group, prompts, workload, repeats)
        for result in measured:
            say(describe(result | {"interleaved": together}))
        results = [result | {"interleaved": together} for result in measured] + results
    return results


def _measure_group(
    group: Sequence[Contestant], prompts: Int[np.ndarray, "B T"], workload: Workload, repeats: int
) -> list[dict[str, Any]]:
    runners, results = [], []
    for contestant in group:
        begin = time.perf_counter()
        runners.append(contestant.load())
        loaded = time.perf_counter()
        runners[-1].run(prompts, workload.new_tokens)  # compiles, and warms up
        warm_up_s = time.perf_counter() - loaded
        results.append(
            {"name": contestant.name, "dtype": contestant.dtype, "load_s": loaded - begin, "warm_up_s": warm_up_s}
        )
    times: list[list[Times]] = [[] for _ in group]
    for _ in range(repeats):
        for runner, taken in zip(runners, times):
            time.sleep(PAUSE_S)
            taken.append(runner.run(prompts, workload.new_tokens))
    for result, runner, taken in zip(results, runners, times):
        result |= summary(taken, workload) | {"peak_bytes": runner.peak_bytes()}
        runner.close()
    return results


def summary(taken: Sequence[Times], workload: Workload) -> dict[str, Any]:
    """Medians of the runs, and each run's times."""
    steps_s = statistics.median(times.total_s - times.first_s for times in taken)
    total_s = statistics.median(times.total_s for times in taken)
    num_steps = workload.new_tokens - 1
    return {
        "first_token_ms": 1e3 * statistics.median(times.first_s for times in taken),
        "ms_per_step": 1e3 * steps_s / num_steps,
        "decode_tokens_per_s": workload.batch_size * num_steps / steps_s,
        "tokens_per_s": workload.batch_size * workload.new_tokens / total_s,  # the prefill's time included
        "runs_s": [[round(times.first_s, 6), round(times.total_s, 6)] for times in taken],
    }


def describe(result: dict[str, Any]) -> str:
    peak = "" if result["peak_bytes"] is None else f", peak {result['peak_bytes'] / 2**30:.2f} GiB"
    return (
        f"{result['name']} {result['dtype']}: first token {result['first_token_ms']:.1f} ms, then "
        f"{result['decode_tokens_per_s']:.1f} tokens/s ({result['ms_per_step']:.3f} ms a step); "
        f"{result['tokens_per_s']:.1f} tokens/s in all{peak}"
    )


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


def generate_command(folder: Path, dtype: str, new_tokens: int) -> list[str]:
    """The command whose start-up is measured."""
    script = str(hardware.REPOSITORY / "scripts" / "generate.py")
    options = ["--model", str(folder), "--dtype", dtype, "--max-new-tokens", str(new_tokens)]
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
