"""Bytes that attention takes beside its arguments and its result, for 64 heads that share one K and V.

Run as a module it measures in a process of its own, where nothing else has raised the peak, and prints one JSON line.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import hardware
from pallas_kernels import compat, shapes
from pallas_kernels.flash_attention import attention

MODEL = "falcon-40b-alibi"
TOKENS = (12_288, 65_536)
# Rows drawn; the rest repeats them, since drawing takes memory of its own.
DRAWN_TOKENS = 4096


def report(tokens: Sequence[int] = TOKENS) -> list[dict[str, Any]]:
    """`measure` of each length, ascending, from a new process; or the reason why not."""
    reason = compat.mosaic_reason()
    if reason is not None:
        return [{"tokens": T, "reason": reason} for T in tokens]
    command = [sys.executable, "-m", "benchmarks.kernel_memory", *map(str, sorted(tokens))]
    done = subprocess.run(command, cwd=hardware.REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [{"tokens": T, "reason": lines[-1][:300], "failed": True} for T in tokens]
    return json.loads(done.stdout.splitlines()[-1])


def measure(T: int) -> dict[str, Any]:
    """What the compiler plans for beside arguments and results, forwards and with gradients, and the forward peak.

    peak_extra_bytes: the most that JAX held at once less what was there before and the result; None where something
    before took more.
    """
    case = shapes.attention_case(MODEL, T)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array) -> jax.Array:
        return attention(q, k, v, slopes=slopes, implementation="mosaic")

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(lambda q, k, v: forward(q, k, v, slopes), q, k, v)[1](cotangent)

    arguments = draw(case)
    compiled = jax.jit(forward).lower(*arguments).compile()
    backward = jax.jit(gradients).lower(*arguments, arguments[0]).compile()
    before, peak_before = in_use(), hardware.peak_bytes()
    out = jax.block_until_ready(compiled(*arguments))
    peak = hardware.peak_bytes()
    extra = None if peak is None or before is None or peak == peak_before else peak - before - out.nbytes
    return {
        "tokens": T,
        "finite": bool(jnp.all(jnp.isfinite(out))),
        "argument_bytes": sum(x.nbytes for x in arguments),
        "result_bytes": out.nbytes,
        "score_array_bytes": 2 * case.N * T * T,  # what a kernel must not hold
        "temporary_bytes": temporary_bytes(compiled),
        "temporary_bytes_with_gradients": temporary_bytes(backward),
        "peak_extra_bytes": extra,
    }


def draw(case: shapes.AttentionCase) -> tuple[jax.Array, ...]:
    """q, k, v and slopes."""
    few = shapes.attention_case(MODEL, min(case.T, DRAWN_TOKENS)).draw()
    repeat = jax.jit(lambda x: jnp.tile(x, (1, -(-case.T // DRAWN_TOKENS), 1, 1))[:, : case.T])
    q, k, v = (repeat(few[name]) for name in ("q", "k", "v"))
    return jax.block_until_ready((q, k, v, few["slopes"]))


def temporary_bytes(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def in_use() -> int | None:
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics.get("bytes_in_use")


if __name__ == "__main__":
    print(json.dumps([measure(int(T)) for T in sys.argv[1:]]))
