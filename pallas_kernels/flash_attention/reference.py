"""Causal attention in plain JAX: the version that every kernel must equal.

With row b's queries at positions i = query_offset[b] + t and keys at positions j = 0 .. S-1:

    out[b, t, n] = sum_j softmax_j((q[b, t, n] . k[b, j, n // G] + bias[n, i, j]) * scale) v[b, j, n // G]

over the keys with j <= i and j < lengths[b]. The softmax and the bias are float32 throughout.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row with no visible key gives zeros below and not NaN (-inf minus -inf).
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
    product = (
        _rounded(slopes, jnp.bfloat16)[:, None] * _rounded(key_positions.astype(jnp.float32), jnp.bfloat16)[None, :]
    )
    return _rounded(_rounded(product, jnp.bfloat16) * scale, dtype)[None, :, None, :]


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
) -> Float[Array, "B N T S"]:
    """softmax of the scaled, biased, masked scores, in float32. Rows that see no key are all zeros."""
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
    visible = visible[:, None]
    return _masked_softmax(scores, visible, axis=-1)


def _masked_softmax(scores: Float[Array, "..."], visible: Bool[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Softmax over the visible entries of `axis`; zeros where none is visible."""
    scores = jnp.where(visible, scores, MASKED)
    weights = jnp.where(visible, jnp.exp(scores - jnp.max(scores, axis=axis, keepdims=True)), 0.0)
    total = jnp.sum(weights, axis=axis, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
) -> Float[Array, "B T N H"]:
    """The formula at the top of this file with the whole [B, N, T, S] score array in memory."""
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    probabilities = attention_probabilities(q, k, query_offset, lengths, slopes, alibi, scale)
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
    visible = (j[None, :] < ends[:, None])[:, None, :, None]  # [B, 1, S, 1]
    weights = _masked_softmax(scores, visible, axis=2).astype(v.dtype)
    out = jnp.einsum("bksg,bskh->bkgh", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(B, 1, N, H)


def attention_xla(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    max_scores_bytes: int = 2**30,
) -> Float[Array, "B T N H"]:
    """`attention_reference` a block of queries at a time, so that its scores never exceed `max_scores_bytes`.

    Long prompts then take memory linear in their length, also under differentiation, since each block is computed
    again in the backward pass. Short ones are one block: the reference itself.
    """
    B, T, N, H = q.shape
    S = k.shape[1]
    if T == 1:
        return attention_one_token(q, k, v, query_offset, lengths, slopes, alibi, scale)
    bytes_a_query = 4 * B * N * S
    if T * bytes_a_query <= max_scores_bytes:
        return attention_reference(q, k, v, query_offset, lengths, slopes, alibi, scale)

    num_blocks = math.ceil(T / max(16, max_scores_bytes // bytes_a_query))
    block = math.ceil(T / num_blocks)
    num_blocks = math.ceil(T / block)
    padded = jnp.pad(q, ((0, 0), (0, num_blocks * block - T), (0, 0), (0, 0)))
    blocks = padded.reshape(B, num_blocks, block, N, H).swapaxes(0, 1)
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * block

    @jax.checkpoint
    def attend(q_and_start: tuple[Array, Array]) -> Array:
        q_block, start = q_and_start
        return attention_reference(q_block, k, v, query_offset + start, lengths, slopes, alibi, scale)

    out = jax.lax.map(attend, (blocks, starts))  # [num_blocks, B, block, N, H]
    return out.swapaxes(0, 1).reshape(B, num_blocks * block, N, H)[:, :T]
