"""Attention for Hopper: the forward and backward kernels as one differentiable function."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.backward import backward
from pallas_kernels.flash_attention.forward import forward

HEAD_DIMS = (64, 128)


def reason_against(q: Array, k: Array, **_options: object) -> str | None:
    """Why these kernels cannot take the arguments, or None where they can: on a Hopper GPU, whatever the options."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"it takes bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"it takes heads of {' or '.join(map(str, HEAD_DIMS))} columns, not {q.shape[-1]}"
    if not (q.size and k.size):
        return "there is nothing to attend to"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attention_mosaic(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"] | None,
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    starts: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N Tp"]]:
    """`forward`, differentiable in q, k and v (in the slopes it is not: their cotangent is zero).

    Memory: what the backward pass keeps is q, k, v, the output and one float32 a query and head.
    """
    return forward(q, k, v, query_offset, lengths, slopes, alibi, scale, starts=starts)


def _forward(q, k, v, query_offset, lengths, slopes, alibi, scale, starts):
    out, lse = forward(q, k, v, query_offset, lengths, slopes, alibi, scale, starts=starts)
    return (out, lse), (q, k, v, out, lse, query_offset, lengths, slopes, starts)


def _backward(alibi, scale, kept, cotangents):
    q, k, v, out, lse, query_offset, lengths, slopes, starts = kept
    dout, dlse = cotangents
    rest = query_offset, lengths, slopes, alibi, scale
    gradients = backward(q, k, v, out, lse, dout, *rest, starts=starts, dlse=dlse)
    return *gradients, None, None, None, None


attention_mosaic.defvjp(_forward, _backward)
