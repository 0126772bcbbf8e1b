"""Causal attention in plain JAX: the version that every kernel must equal.

With row b's queries at positions i = query_offset[b] + t and keys at positions j = 0 .. S-1:

    out[b, t, n] = sum_j softmax_j((q[b, t, n] . k[b, j, n // G] + bias[n, i, j]) * scale) v[b, j, n // G]

over the keys with j <= i and j < lengths[b], and, where documents lie back to back in a row, j >= starts[b, t]. The
softmax and the bias are float32 throughout.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

# Of a hidden key. Finite, so that a row with no visible key gives zeros and not NaN (-inf minus -inf).
MASKED = -1e30


def alibi_bias(
    slopes: Float[Array, " N"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, " S"],
    *,
    rounding: str,
    scale: float,
    dtype: DTypeLike,
) -> Float[Array, "B N T S"] | Float[Array, "1 N 1 S"]:
    """The ALiBi term, already multiplied by `scale`, in float32.

    "float32": slope * (j - i), exact at any distance. "hf_bf16": what transformers computes, slope * j with slope, j
    and their product each rounded to bfloat16, and the scaled value rounded to the model's dtype; its key positions
    have 8 bits, so neighbouring keys become equal past position 256 (source: build_alibi_tensor and FalconModel in
    modeling_falcon.py).
    """
    if rounding == "float32":
        distance = (key_positions[None, None, :] - query_positions[:, :, None]).astype(jnp.float32)
        return slopes[None, :, None, None] * distance[:, None] * scale
    bias = hf_bf16_bias(slopes[:, None], key_positions.astype(jnp.float32)[None, :], scale, dtype, _rounded)
    return bias[None, :, None, :]


def hf_bf16_bias(slope: Any, j: Any, scale: float, dtype: DTypeLike, rounded: Callable[[Any, DTypeLike], Any]) -> Any:
    """The bias of float32 key positions `j`, scaled, as transformers rounds it. rounded(x, dtype): how that is done."""
    product = rounded(rounded(slope, jnp.bfloat16) * rounded(j, jnp.bfloat16), jnp.bfloat16)
    return rounded(product * scale, dtype)


def _rounded(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """float32 with the precision of `dtype`. A cast there and back would not do: XLA drops such pairs."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def attention_probabilities(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B N T S"]:
    """softmax of the scaled, biased, masked scores, in float32. Rows that see no key are all zeros."""
    scores, visible = _scores(q, k, query_offset, lengths, slopes, alibi, scale, starts)
    return _masked_softmax(scores, visible, axis=-1)


def attention_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B N T"]:
    """log sum_j exp of the scaled, biased scores over the visible keys, in float32; -inf where none is visible."""
    scores, visible = _scores(q, k, query_offset, lengths, slopes, alibi, scale, starts)
    scores = jnp.where(visible, scores, MASKED)
    highest = _highest(scores, -1)
    total = jnp.sum(jnp.where(visible, jnp.exp(scores - highest), 0.0), axis=-1)
    # The inner choice keeps the gradient of rows without a key at zero, where that of log(0) would be NaN.
    return jnp.where(total == 0.0, -jnp.inf, jnp.log(jnp.where(total == 0.0, 1.0, total)) + highest[..., 0])


def _scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    starts: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B N T S"], Bool[Array, "B 1 T S"]]:
    """The scaled, biased scores in float32, and which of them count."""
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, N, T, S) * scale

    i = query_offset[:, None] + jnp.arange(T, dtype=jnp.int32)  # [B, T]
    j = jnp.arange(S, dtype=jnp.int32)
    if slopes is not None:
        scores += alibi_bias(slopes, i, j, rounding=alibi, scale=scale, dtype=q.dtype)
    visible = j[None, None, :] <= i[:, :, None]  # [B, T, S]
    if lengths is not None:
        visible &= j[None, None, :] < lengths[:, None, None]
    if starts is not None:
        visible &= j[None, None, :] >= starts[:, :, None]
    return scores, visible[:, None]


def _masked_softmax(scores: Float[Array, "..."], visible: Bool[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Softmax over the visible entries of `axis`; zeros where none is visible."""
    scores = jnp.where(visible, scores, MASKED)
    weights = jnp.where(visible, jnp.exp(scores - _highest(scores, axis)), 0.0)
    total = jnp.sum(weights, axis=axis, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def _highest(scores: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The maximum along `axis`, kept, as a constant: softmax does not depend on what is subtracted.

    A gradient through it would look for the scores that equal it, and find none, and divide by zero, wherever XLA
    computes the scores a second time with other roundings.
    """
    return jax.lax.stop_gradient(jnp.max(scores, axis=axis, keepdims=True))


def attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """The formula at the top of this file with the whole [B, N, T, S] score array in memory."""
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    probabilities = attention_probabilities(q, k, query_offset, lengths, slopes, alibi, scale, starts)
    grouped = probabilities.astype(v.dtype).reshape(B, K, N // K, T, S)
    out = jnp.einsum("bkgts,bskh->btkgh", grouped, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(B, T, N, H)


def attention_one_token(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    starts: Int[Array, "B 1"] | None = None,
) -> Float[Array, "B 1 N H"]:
    """`attention_reference` for decoding, with scores laid out as the cache is: keys before heads.

    The products then read K and V in place. With heads first XLA's CPU backend transposes the whole cache at every
    step, a quarter of a small model's time (benchmarks/LOG.md).
    """
    B, _, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    G = N // K
    scores = jnp.einsum("bskh,bkgh->bksg", k, q.reshape(B, K, G, H), preferred_element_type=jnp.float32) * scale
    j = jnp.arange(S, dtype=jnp.int32)
    if slopes is not None:
        bias = alibi_bias(slopes, query_offset[:, None], j, rounding=alibi, scale=scale, dtype=q.dtype)
        scores += bias.reshape(-1, K, G, S).swapaxes(2, 3)
    ends = query_offset + 1 if lengths is None else jnp.minimum(query_offset + 1, lengths)
    visible = j[None, :] < ends[:, None]  # [B, S]
    if starts is not None:
        visible &= j[None, :] >= starts
    weights = _masked_softmax(scores, visible[:, None, :, None], axis=2).astype(v.dtype)
    return _weighted_values(weights, v).astype(q.dtype).reshape(B, 1, N, H)


def _weighted_values(weights: Float[Array, "B K S G"], v: Float[Array, "B S K H"]) -> Float[Array, "B K G H"]:
    """sum_s weights[b, k, s, g] v[b, s, k, h] in float32."""
    B, K, S, G = weights.shape

    def plain(weights: Array, v: Array) -> Array:
        return jnp.einsum("bksg,bskh->bkgh", weights, v, preferred_element_type=jnp.float32)

    def with_one_batch_axis(weights: Array, v: Array) -> Array:
        weights, v = weights.reshape(B * K, S, G), v.swapaxes(1, 2).reshape(B * K, S, -1)
        out = jnp.einsum("xsg,xsh->xgh", weights, v, preferred_element_type=jnp.float32)
        return out.reshape(B, K, G, -1)

    if v.dtype != jnp.bfloat16 or 1 in (B, K, G):
        return plain(weights, v)
    # XLA's CPU compiler has no bfloat16 product of matrices over two batch axes that it could not merge: it fails when
    # it runs ("Unsupported element type for DotThunk").
    return jax.lax.platform_dependent(weights, v, cpu=with_one_batch_axis, default=plain)


def attention_xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    starts: Int[Array, "B T"] | None = None,
    *,
    max_scores_bytes: int = 2**30,
) -> Float[Array, "B T N H"]:
    """`attention_reference` a block of queries at a time, so that its scores never exceed `max_scores_bytes`.

    Long prompts then take memory linear in their length, also under differentiation, since each block is computed
    again in the backward pass. Short ones are one block: the reference itself.
    """
    if q.shape[1] == 1:
        return attention_one_token(q, k, v, query_offset, lengths, slopes, alibi, scale, starts)

    def attend(q_block: Array, offset: Array, starts_block: Array | None) -> Array:
        return attention_reference(q_block, k, v, offset, lengths, slopes, alibi, scale, starts_block)

    return _by_query_blocks(attend, q, query_offset, starts, k.shape[1], max_scores_bytes)


def attention_xla_with_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    starts: Int[Array, "B T"] | None = None,
    *,
    max_scores_bytes: int = 2**30,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`attention_xla` and `attention_lse`, in the same blocks."""

    def attend(q_block: Array, offset: Array, starts_block: Array | None) -> tuple[Array, Array]:
        arguments = (offset, lengths, slopes, alibi, scale, starts_block)
        lse = attention_lse(q_block, k, *arguments)
        return attention_reference(q_block, k, v, *arguments), lse.swapaxes(1, 2)

    out, lse = _by_query_blocks(attend, q, query_offset, starts, k.shape[1], max_scores_bytes)
    return out, lse.swapaxes(1, 2)


def _by_query_blocks(
    attend: Callable[[Array, Array, Array | None], Any],
    q: Float[Array, "B T N H"],
    query_offset: Int[Array, " B"],
    starts: Int[Array, "B T"] | None,
    num_keys: int,
    max_scores_bytes: int,
) -> Any:
    """attend(q, query_offset, starts), whose results are [B, T, ...], a block of T at a time where its scores ask."""
    B, T, N, _ = q.shape
    bytes_a_query = 4 * B * N * num_keys
    if T * bytes_a_query <= max_scores_bytes:
        return attend(q, query_offset, starts)

    num_blocks = math.ceil(T / max(16, max_scores_bytes // bytes_a_query))
    block = math.ceil(T / num_blocks)
    num_blocks = math.ceil(T / block)

    def cut(x: Array) -> Array:  # [num_blocks, B, block, ...]
        padded = jnp.pad(x, [(0, num_blocks * block - T if axis == 1 else 0) for axis in range(x.ndim)])
        return padded.reshape(B, num_blocks, block, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend_block(given: tuple[Array, Array, Array | None]) -> Any:
        q_block, first_query, starts_block = given
        return attend(q_block, query_offset + first_query, starts_block)

    def join(result: Array) -> Array:  # [num_blocks, B, block, ...]
        return result.swapaxes(0, 1).reshape(B, num_blocks * block, *result.shape[3:])[:, :T]

    first_queries = jnp.arange(num_blocks, dtype=jnp.int32) * block
    blocks = cut(q), first_queries, None if starts is None else cut(starts)
    return jax.tree.map(join, jax.lax.map(attend_block, blocks))
