"""Bytes that attention takes beside its arguments and its result, for 64 heads that share one K and V.

Run as a module it measures one length in a process of its own and prints one JSON line. The trap: a process's peak
never falls, and drawing arrays or compiling (XLA tries out its own kernels) can raise it above what a call takes. Hence
arguments come from the host, and nothing but the forward pass is compiled before the peak is read.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hardware
from pallas_kernels import compat, shapes
from pallas_kernels.flash_attention import attention

MODEL = "falcon-40b-alibi"
TOKENS = (12_288, 65_536)
# Tokens drawn; the rest repeats them.
DRAWN_TOKENS = 4096


def report(tokens: Sequence[int] = TOKENS) -> list[dict[str, Any]]:
    """`measure` of each length, from a new process; or the reason why not."""
    reason = compat.mosaic_reason()
    if reason is not None:
        return [{"tokens": T, "reason": reason} for T in tokens]
    return [_in_a_process(T) for T in tokens]


def _in_a_process(T: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.kernel_memory", str(T)]
    # Unfiltered, so that a traceback ends with its exception.
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}
    done = subprocess.run(command, cwd=hardware.REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"tokens": T, "reason": lines[-1][:300], "failed": True}
    return json.loads(done.stdout.splitlines()[-1])


def measure(T: int) -> dict[str, Any]:
    """What the compiler plans for beside arguments and results, forwards and with gradients, and the forward peak.

    peak_bytes_before: what JAX had held at most before the call. peak_extra_bytes: the most that it held at once less
    what was there before and the result; None where something before took more. JAX's allocator counts whole chunks,
    which can be up to 128 MiB larger than what was asked for.
    """
    case = shapes.attention_case(MODEL, T)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array) -> jax.Array:
        return attention(q, k, v, slopes=slopes, implementation="mosaic")

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(lambda q, k, v: forward(q, k, v, slopes), q, k, v)[1](cotangent)

    arguments = draw(case)
    compiled = jax.jit(forward).lower(*arguments).compile()
    before, peak_before = in_use(), hardware.peak_bytes()
    out = jax.block_until_ready(compiled(*arguments))
    peak = hardware.peak_bytes()
    extra = None if peak is None or before is None or peak == peak_before else peak - before - out.nbytes
    backward = jax.jit(gradients).lower(*arguments, arguments[0]).compile()
    return {
        "tokens": T,
        "finite": bool(jnp.all(jnp.isfinite(out))),
        "argument_bytes": sum(x.nbytes for x in arguments),
        "result_bytes": out.nbytes,
        "score_array_bytes": 2 * case.N * T * T,  # what a kernel must not hold
        "temporary_bytes": temporary_bytes(compiled),
        "temporary_bytes_with_gradients": temporary_bytes(backward),
        "peak_bytes_before": peak_before,
        "peak_extra_bytes": extra,
    }


def draw(case: shapes.AttentionCase) -> tuple[jax.Array, ...]:
    """q, k, v and slopes."""
    generator = np.random.default_rng(0)

    def random(heads: int) -> jax.Array:
        few = generator.standard_normal((1, min(case.T, DRAWN_TOKENS), heads, case.H), np.float32)
        few = few.astype(jnp.dtype(case.dtype))
        return jax.device_put(np.tile(few, (1, -(-case.T // few.shape[1]), 1, 1))[:, : case.T])

    q, k, v = (random(heads) for heads in (case.N, case.K, case.K))
    return jax.block_until_ready((q, k, v, shapes.geometric_slopes(case.N)))


def temporary_bytes(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def in_use() -> int | None:
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics.get("bytes_in_use")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
