"""`attention`: what models call. Checks the arguments, picks the implementation, runs it."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import arguments, compat, dispatch, sharded
from pallas_kernels.flash_attention import cudnn
from pallas_kernels.flash_attention.reference import attention_xla, attention_xla_with_lse

# The dimensions of q, k, v, query_offset, lengths and slopes; and of starts.
LETTERS = ("B T N H", "B S K H", "B S K H", "B", "B", "N")
STARTS_LETTERS = "B T"


@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = False, **options: Any
) -> Float[Array, "B T N H"]: ...


@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[True], **options: Any
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]: ...


def attention(  # pyright: ignore[reportInconsistentOverload]  # the overloads do not repeat the options
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    query_offset: Int[Array, " B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    starts: Int[Array, "B T"] | None = None,
    slopes: Float[Array, " N"] | None = None,
    alibi: str = "float32",
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    batch_axes: Sequence[str] = sharded.BATCH_AXES,
    head_axis: str = sharded.HEAD_AXIS,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Causal attention in which query head n reads key/value head n // (N / K).

    Args:
      q, k, v: of one dtype. K divides N.
      query_offset: position of each row's first query; None is 0. Keys start at position 0.
      lengths: how many keys of each row are real; None where causality alone hides what is not (right padding).
      starts: position of the first key that each query sees, where a row holds several documents back to back: those of
        the query's own document then. Along a row they never decrease. None is 0.
      slopes: ALiBi slopes in float32, or None. The biased scores are (q . k + slope * (j - i)) * scale.
      alibi: "float32", or "hf_bf16" for the rounding that transformers applies.
      scale: None is 1 / sqrt(H).
      return_lse: also the logarithm of each query's softmax denominator.
      implementation: "mosaic" (Hopper GPUs, bfloat16 and float16), "cudnn" (whole sequences on GPUs from Ampere on),
        "xla", or None for the first of these that takes the call.
      mesh: what the call runs on, where that is more than the default device. Kernels then run on each device's share:
        rows split over `batch_axes`, heads over `head_axis`, each where it divides. XLA splits its own as it sees fit.

    Returns:
      [B, T, N, H] in q's dtype; queries that see no key give zeros. With `return_lse` also log sum_j exp of the biased
      scores, [B, N, T] in float32, -inf for queries that see no key.

    Raises:
      ValueError: shapes that do not fit, an unknown `alibi` or `implementation`.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    arguments.check("attention", num_heads=q.shape[2], num_kv_heads=k.shape[2], alibi=alibi)
    if k.shape != v.shape:
        raise ValueError(f"attention: k {k.shape} and v {v.shape} must have one shape")
    if starts is not None and (starts.shape != q.shape[:2] or not jnp.issubdtype(starts.dtype, jnp.integer)):
        wanted = f"one integer for each query, {q.shape[:2]}"
        raise ValueError(f"attention: starts {starts.dtype.name}{list(starts.shape)} must hold {wanted}")
    if scale is None:
        scale = arguments.default_scale(q)

    described: dict[str, Any] = {"query_offset": query_offset, "lengths": lengths, "starts": starts, "slopes": slopes}
    described |= {"alibi": alibi, "mesh": mesh}
    chosen = dispatch.choose(
        "attention",
        implementation,
        {
            "mosaic": lambda: _mosaic_reason(q, k, **described),
            "cudnn": lambda: cudnn.reason_against(q, k, return_lse=return_lse, **described),
            "xla": lambda: None,
        },
    )
    if chosen == "xla":
        offset = jnp.zeros(q.shape[0], jnp.int32) if query_offset is None else query_offset
        plain = attention_xla_with_lse if return_lse else attention_xla
        return plain(q, k, v, offset, lengths, slopes, alibi, scale, starts)

    def run(q: Array, k: Array, v: Array, query_offset: Any, lengths: Any, slopes: Any, starts: Any) -> Any:
        if chosen == "cudnn":
            return cudnn.attention_cudnn(q, k, v, slopes, scale)
        from pallas_kernels.flash_attention import mosaic

        result: Any = mosaic.attention_mosaic(q, k, v, query_offset, lengths, slopes, alibi, scale, starts)
        out, lse = result
        return (out, lse[:, :, : q.shape[1]]) if return_lse else out

    arrays, letters = (q, k, v, query_offset, lengths, slopes, starts), (*LETTERS, STARTS_LETTERS)
    results = ("B T N H", "B N T") if return_lse else "B T N H"
    return sharded.over_mesh(run, mesh, arrays, letters, results, batch_axes=batch_axes, head_axis=head_axis)


def _mosaic_reason(q: jax.Array, k: jax.Array, *, mesh: Mesh | None, **described: Any) -> str | None:
    reason = compat.mosaic_reason(mesh)
    if reason is not None:
        return reason
    # Not at the top: Pallas takes half a second to import, and only Hopper runs it.
    from pallas_kernels.flash_attention import mosaic

    return mosaic.reason_against(q, k, **described)
