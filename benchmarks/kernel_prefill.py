"""Who computes the attention of a whole prompt in JAX: falcon_jax's kernel, and what else there is.

TFLOP/s count what causality shows, 2 T (T + 1) N H operations a row forwards and two and a half times that backwards,
whatever a contestant computes. Beside ALiBi stand ours and the same peers without it: the time that ALiBi should not
add to. Each is checked against the function that it computes.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.kernel_turns import Entry, Group, Program, prepare
from pallas_kernels import compat, shapes
from pallas_kernels.flash_attention import attention
from pallas_kernels.flash_attention import cudnn as flash_cudnn

OURS = "falcon_jax"
PLAIN = "XLA"
# What ALiBi is measured by: cuDNN, which then computes less than we do.
CUDNN = "cuDNN"
WITHOUT = ", without ALiBi"
FORWARD, BACKWARD = "forward", "forward + backward"

Attend = Callable[..., Float[Array, "B T N H"]]


def flops(case: shapes.AttentionCase, kind: str) -> float:
    """Operations of the two products forwards, and of the five more backwards, over the keys that a query may see."""
    forward = 2 * 2 * case.B * case.N * case.H * case.T * (case.T + 1) / 2
    return forward if kind == FORWARD else 3.5 * forward


def contestants(case: shapes.AttentionCase, kind: str, quick: bool) -> list[Entry]:
    """Compiled and checked, their inputs on the device."""
    inputs = case.draw()
    q, k, v, slopes = (inputs[name] for name in ("q", "k", "v", "slopes"))
    cotangent = jax.random.normal(jax.random.key(1), q.shape, q.dtype)
    make = functools.partial(_program, kind=kind, arrays=(q, k, v, cotangent))
    peer = functools.partial(make, reason=None if jax.default_backend() == "gpu" else "it needs an NVIDIA GPU")
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")

    def group(peers: Sequence[Program], slopes: Array | None, suffix: str) -> Group:
        ours = functools.partial(attention, scale=case.scale)
        plain = functools.partial(ours, implementation="xla")
        mosaic = functools.partial(ours, implementation="mosaic")
        mine = make(OURS + suffix, mosaic, slopes=slopes, ours=True, reason=compat.mosaic_reason())
        exact = make("float32", _in_float32(plain), slopes=slopes)
        return Group([mine, make(PLAIN + suffix, plain, slopes=slopes), *peers], exact, PLAIN + suffix)

    without = [peer(CUDNN, cudnn)]
    if not quick:
        without += _tokamax(peer) + _pallas(case, peer, kind, (q, k, v))
    if slopes is None:
        return prepare(group(without, None, ""))
    columns = functools.partial(attention, scale=case.scale, implementation="cudnn")
    asked = {name: inputs[name] for name in ("query_offset", "lengths", "slopes", "alibi")}
    reason = flash_cudnn.reason_against(q, k, **asked, starts=None, return_lse=False, mesh=None)
    alibi = [make(f"{CUDNN}, ALiBi in 8 more columns", columns, slopes=slopes, reason=reason)]
    # The whole array, made before the clock starts: 2.1 GB for 64 heads and 4,096 tokens.
    if case.T <= 4096 and jax.default_backend() == "gpu":
        alibi.append(peer(f"{CUDNN}, ALiBi as a bias of T x T", cudnn, bias=_bias(slopes, case, case.dtype)))
    if not quick:
        row = (slopes * case.scale)[:, None] * jnp.arange(case.T, dtype=jnp.float32)
        alibi += _tokamax(peer, row[None, :, None])
    return prepare(group(alibi, slopes, ""), group(without, None, WITHOUT))


def _program(
    name: str, attend: Attend, *, kind: str, arrays: Sequence[Array], ours: bool = False, reason: str | None = None,
    **extra: Array | None,
) -> Program:  # fmt: skip
    """`attend(q, k, v, **extra)`, or all of (out, dq, dk, dv)."""

    def forward(q: Array, k: Array, v: Array, extra: dict[str, Any]) -> tuple[Array, ...]:
        return (attend(q, k, v, **extra),)

    def both(q: Array, k: Array, v: Array, cotangent: Array, extra: dict[str, Any]) -> tuple[Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, **extra), q, k, v)
        return out, *pull(cotangent.astype(out.dtype))

    function, given = (forward, arrays[:3]) if kind == FORWARD else (both, arrays)
    return Program(name, function, (*given, extra), ours, 1 if kind == FORWARD else 4, reason)


def _in_float32(attend: Attend) -> Attend:
    def exact(q: Array, k: Array, v: Array, **extra: Any) -> Array:
        with jax.default_matmul_precision("highest"):
            return attend(*(x.astype(jnp.float32) for x in (q, k, v)), **extra)

    return exact


def _bias(slopes: Array, case: shapes.AttentionCase, dtype: str) -> Float[Array, "1 N T T"]:
    """ALiBi as peers want it, added to the scaled scores; by distance, which a short float holds best."""

    @jax.jit
    def make(slopes: Array) -> Array:
        i = jnp.arange(case.T, dtype=jnp.float32)
        return ((i[None, :] - i[:, None]) * (slopes * case.scale)[:, None, None])[None].astype(dtype)

    return make(slopes)


def _tokamax(make: Callable[..., Program], row: Float[Array, "1 N 1 S"] | None = None) -> list[Program]:
    """tokamax's own Mosaic kernel; ALiBi as a bias of one row, which it takes."""
    name = "tokamax" if row is None else "tokamax, ALiBi as a bias of one row"
    if importlib.util.find_spec("tokamax") is None:
        return [make(name, lambda q, k, v: q, reason="tokamax is not installed")]

    def attend(q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
        import tokamax  # pyright: ignore[reportMissingImports]

        return tokamax.dot_product_attention(q, k, v, bias, is_causal=True, implementation="mosaic_gpu")

    return [make(name, attend, bias=row)]


def _pallas(
    case: shapes.AttentionCase, make: Callable[..., Program], kind: str, arrays: Sequence[Array]
) -> list[Program]:
    """The example kernel that comes with JAX: it scales nothing, takes float16, and has no causal backward pass."""
    if kind == BACKWARD:
        return []

    def attend(q: Array, k: Array, v: Array) -> Array:
        from jax.experimental.pallas.ops.gpu import attention_mgpu

        config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
        return attention_mgpu.attention(q, k, v, config)

    scaled = (arrays[0].astype(jnp.float32) * case.scale, *arrays[1:])
    halves = [x.astype(jnp.float16) for x in scaled]
    return [make("JAX's Pallas example, float16", attend, arrays=halves)]
