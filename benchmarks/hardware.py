"""What the machine at hand can do, measured, and what it calls itself.

Knows nothing of models. The trap: a working set that fits the last-level cache reads several times faster than memory,
so a read bandwidth means nothing without the number of bytes it was measured over.
"""

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

REPOSITORY = Path(__file__).parents[1]
# A package that is not there is null in the document.
PACKAGES = (
    "falcon-jax",
    "jax",
    "jaxlib",
    "nvidia-cudnn-cu13",
    "flax",
    "numpy",
    "torch",
    "triton",
    "transformers",
    "tokamax",
)
# Least time that one figure is measured for, and the fewest repeats of it.
MEASURE_S = 0.3
MIN_REPEATS = 5
# Calls in flight at once. A GPU is told of the next call while it works: waiting for the host after each would put
# 0.1 ms on the 0.35 ms that an H100 needs to read a GiB.
CALLS = {"cpu": 1, "gpu": 16}
MATRIX_SIZES = {"cpu": 1024, "gpu": 8192}


def read_bandwidth(num_bytes: int, chunk_bytes: int = 512 * 2**20) -> float:
    """Bytes a second at which the default device reads `num_bytes` again and again: the best of two simple programs.

    The data lies in arrays of at most `chunk_bytes`, as weights do, one program a pass over all of them.
    """
    width = 1024
    rows = max(1, min(num_bytes, chunk_bytes) // (4 * width))
    num_chunks = max(1, num_bytes // (4 * width * rows))
    make = jax.jit(lambda key: jax.random.uniform(key, (rows, width), jnp.float32))
    chunks = [make(jax.random.key(i)) for i in range(num_chunks)]
    vector = jnp.ones(width, jnp.float32)

    @jax.jit
    def multiply(chunks: list[jax.Array], vector: jax.Array) -> list[jax.Array]:
        return [chunk @ vector for chunk in chunks]

    @jax.jit
    def reduce(chunks: list[jax.Array]) -> list[jax.Array]:
        return [jnp.max(chunk, axis=-1) for chunk in chunks]

    seconds = min(fastest(lambda: multiply(chunks, vector)), fastest(lambda: reduce(chunks)))
    return 4 * width * rows * num_chunks / seconds


def matrix_rate(dtype: Any) -> float:
    """Floating-point operations a second of one large square product in `dtype` on the default device."""
    size = MATRIX_SIZES.get(jax.default_backend(), 4096)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / fastest(lambda: multiply(a, b))


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of a call of `run`, which returns JAX arrays, in the fastest row of calls.

    The first call compiles and does not count.
    """
    jax.block_until_ready(run())
    calls = CALLS.get(jax.default_backend(), 1)
    times: list[float] = []
    while len(times) < MIN_REPEATS or sum(times) < MEASURE_S:
        begin = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        times.append(time.perf_counter() - begin)
    return min(times) / calls


def peak_bytes() -> int | None:
    """Most bytes that JAX has held on the default device since the process began; None where it does not say."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics.get("peak_bytes_in_use")


def memory_bytes() -> int:
    """Bytes of the default device's memory, for a CPU the machine's."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is not None and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Device, processor, versions, commit and date: what a result needs beside it to mean something."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpu": _cpu_name(),
        "num_cores": num_cores(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        **_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


@functools.cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The commit, and whether files differ from it; "unknown" outside a repository or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "modified": None}
