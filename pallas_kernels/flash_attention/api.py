"""`attention`: what models call. Checks the arguments, picks the implementation, runs it."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import cudnn
from pallas_kernels.flash_attention.reference import attention_xla

ALIBI_ROUNDINGS = ("float32", "hf_bf16")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    query_offset: Int[Array, " B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    slopes: Float[Array, " N"] | None = None,
    alibi: str = "float32",
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention in which query head n reads key/value head n // (N / K).

    Args:
      q, k, v: of one dtype. K divides N.
      query_offset: position of each row's first query; None is 0. Keys start at position 0.
      lengths: how many keys of each row are real; None where causality alone hides what is not (right padding).
      slopes: ALiBi slopes in float32, or None. The biased scores are (q . k + slope * (j - i)) * scale.
      alibi: "float32", or "hf_bf16" for the rounding that transformers applies.
      scale: None is 1 / sqrt(H).
      implementation: "xla", "cudnn" (whole sequences on a GPU), or None for the best that works.

    Returns:
      [B, T, N, H] in q's dtype. Queries that see no key give zeros.

    Raises:
      ValueError: shapes that do not fit, an unknown `alibi` or `implementation`.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    N, K = q.shape[2], k.shape[2]
    if N % K:
        raise ValueError(f"attention: {N} query heads cannot share {K} key/value heads; K must divide N")
    if k.shape != v.shape:
        raise ValueError(f"attention: k {k.shape} and v {v.shape} must have one shape")
    if alibi not in ALIBI_ROUNDINGS:
        raise ValueError(f"attention: alibi={alibi!r} is unknown; known are {', '.join(ALIBI_ROUNDINGS)}")
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])

    chosen = dispatch.choose(
        "attention",
        implementation,
        {
            "xla": lambda: None,
            "cudnn": lambda: cudnn.reason_against(
                q, k, query_offset=query_offset, lengths=lengths, slopes=slopes, alibi=alibi
            ),
        },
    )
    if chosen == "cudnn":
        return cudnn.attention_cudnn(q, k, v, slopes, scale)
    if query_offset is None:
        query_offset = jnp.zeros(q.shape[0], jnp.int32)
    return attention_xla(q, k, v, query_offset, lengths, slopes, alibi, scale)
