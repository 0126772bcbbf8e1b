"""The plain attention against float64 arithmetic, and its blocked form against it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from falcon_jax.model.positions import alibi_slopes
from pallas_kernels.flash_attention import attention
from pallas_kernels.flash_attention.cudnn import alibi_columns
from pallas_kernels.flash_attention.reference import (
    alibi_bias,
    attention_one_token,
    attention_reference,
    attention_xla,
    attention_xla_with_lse,
)

# B, T, S, N, K, H: multi-head, grouped, multi-query with an odd head count, single tokens, odd lengths.
SHAPES = [(2, 7, 7, 4, 4, 8), (1, 13, 29, 6, 2, 16), (3, 1, 17, 5, 1, 8), (2, 33, 33, 7, 1, 24)]


def draw(shape, dtype=jnp.float32, seed=0):
    B, T, S, N, K, H = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (B, T, N, H), dtype)
    k = jax.random.normal(keys[1], (B, S, K, H), dtype)
    v = jax.random.normal(keys[2], (B, S, K, H), dtype)
    return q, k, v


def naive(q, k, v, offset, lengths, slopes, scale):
    """Output and log-sum-exp by loops in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out, lse = np.zeros((B, T, N, H)), np.full((B, N, T), -np.inf)
    for b in range(B):
        for t in range(T):
            i = int(offset[b]) + t
            end = min(i + 1, k.shape[1], int(lengths[b]))
            if end == 0:
                continue
            for n in range(N):
                kv = n // (N // k.shape[2])
                scores = k[b, :end, kv] @ q[b, t, n]
                if slopes is not None:
                    scores = scores + float(slopes[n]) * (np.arange(end) - i)
                weights = np.exp((scores - scores.max()) * scale)
                out[b, t, n] = weights / weights.sum() @ v[b, :end, kv]
                lse[b, n, t] = np.log(weights.sum()) + scores.max() * scale
    return out, lse


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_alibi", [False, True])
def test_attention_equals_float64_loops(shape, with_alibi):
    B, T, S, N, _, H = shape
    q, k, v = draw(shape)
    offset = jnp.asarray([S - T - min(b, S - T) for b in range(B)], jnp.int32)
    lengths = jnp.asarray([S - 2 * b for b in range(B)], jnp.int32)
    slopes = alibi_slopes(N) if with_alibi else None
    jax_slopes = None if slopes is None else jnp.asarray(slopes)
    arguments = {"query_offset": offset, "lengths": lengths, "slopes": jax_slopes}
    expected, expected_lse = naive(q, k, v, offset, lengths, slopes, H**-0.5)
    np.testing.assert_allclose(attention(q, k, v, **arguments), expected, atol=2e-6)
    out, lse = attention(q, k, v, return_lse=True, **arguments)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


@pytest.mark.parametrize("num_queries", [1, 3])
def test_queries_that_see_no_key_give_zeros(num_queries):
    q, k, v = draw((2, num_queries, 5, 2, 1, 8))
    lengths = jnp.asarray([0, 5], jnp.int32)
    out, lse = attention(q, k, v, lengths=lengths, return_lse=True)
    assert not np.any(out[0]) and np.all(np.isfinite(out)) and np.any(out[1])
    assert np.all(lse[0] == -np.inf) and np.all(np.isfinite(lse[1]))

    def loss(q, k, v):
        out, lse = attention(q, k, v, lengths=lengths, return_lse=True)
        return jnp.sum(out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert not np.any(gradient[0]) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("with_alibi", [False, True])
def test_blocked_attention_and_its_gradients_equal_the_reference(with_alibi):
    shape = (2, 45, 45, 6, 2, 8)
    q, k, v = draw(shape)
    slopes = jnp.asarray(alibi_slopes(6)) if with_alibi else None
    offset = jnp.zeros(2, jnp.int32)
    arguments = (offset, None, slopes, "float32", 8**-0.5)
    # 4 B N S bytes a query: this allows 16 queries a block, three blocks, the last one short.
    limit = 16 * 4 * 2 * 6 * 45

    def loss(function, **options):
        return lambda q, k, v: jnp.sum(jnp.sin(function(q, k, v, *arguments, **options)))

    whole, blocked = loss(attention_reference), loss(attention_xla, max_scores_bytes=limit)
    np.testing.assert_allclose(blocked(q, k, v), whole(q, k, v), rtol=1e-6)
    blocked_lse = attention_xla_with_lse(q, k, v, *arguments, max_scores_bytes=limit)[1]
    np.testing.assert_allclose(blocked_lse, attention_xla_with_lse(q, k, v, *arguments)[1], rtol=1e-6)
    gradients = (jax.jit(jax.grad(function, (0, 1, 2)))(q, k, v) for function in (blocked, whole))
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("num_heads", [4, 5])
def test_gradients_of_one_row_with_alibi_are_finite(num_heads):
    """Compiled, the scores are computed twice, with other roundings: nothing may ask where their maximum was."""
    q, k, v = draw((1, 5, 7, num_heads, 1, 8))
    slopes = jnp.linspace(0.1, 0.5, num_heads)

    def gradients(q, k, v):
        out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, slopes=slopes), q, k, v)
        return backward(jnp.cos(out))

    for ours, expected in zip(jax.jit(gradients)(q, k, v), gradients(q, k, v), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6)


def test_blocked_attention_never_holds_the_whole_score_array():
    T, N = 2048, 4
    q = jax.ShapeDtypeStruct((1, T, N, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    offset = jnp.zeros(1, jnp.int32)

    def run(q, k, v):
        return attention_xla(q, k, v, offset, None, None, "float32", 1.0, max_scores_bytes=2**20)

    analysis = jax.jit(run).lower(q, k, k).compile().memory_analysis()
    assert analysis is not None
    temporary = analysis.temp_size_in_bytes
    assert temporary < 4 * N * T * T / 4, temporary


@pytest.mark.parametrize("num_heads", [4, 6, 71])
def test_extra_columns_carry_alibi_without_a_bias(num_heads):
    """The independent form of ALiBi, which is also how cuDNN gets it: 8 more columns in q and k, no bias."""
    q, k, v = draw((1, 300, 300, num_heads, 1, 16))
    slopes = jnp.asarray(alibi_slopes(num_heads))
    expected = attention(q, k, v, slopes=slopes, scale=0.25)
    a, c = alibi_columns(slopes, 300, jnp.bfloat16)
    wide_q = jnp.concatenate([q, jnp.broadcast_to(a.astype(jnp.float32), (1, 300, num_heads, 8))], -1)
    wide_k = jnp.concatenate([k, jnp.broadcast_to(c.astype(jnp.float32)[None, :, None], (1, 300, 1, 8))], -1)
    wide_v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 8)))
    out = attention(wide_q, wide_k, wide_v, scale=0.25)[..., :16]
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("num_heads", [1, 4, 5, 9, 64, 71])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hf_bf16_bias_has_the_very_bits_of_transformers(num_heads, dtype):
    length, head_dim = 1500, 64
    theirs = build_alibi_tensor(torch.ones(1, length, dtype=torch.long), num_heads, getattr(torch, dtype))
    theirs = (theirs / math.sqrt(head_dim)).float().numpy().reshape(num_heads, length)
    j = jnp.arange(length, dtype=jnp.int32)

    # Compiled as one function: that is where a rounding may be optimised away.
    @jax.jit
    def bias(slopes):
        scale = 1 / math.sqrt(head_dim)
        return alibi_bias(slopes, j[None, -1:], j, rounding="hf_bf16", scale=scale, dtype=jnp.dtype(dtype))

    ours = bias(jnp.asarray(alibi_slopes(num_heads)))
    np.testing.assert_allclose(ours[0, :, 0], theirs, rtol=2e-7)


@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("alibi", [None, "float32", "hf_bf16"])
def test_one_token_of_bfloat16_stays_within_twice_the_error_of_the_reference(alibi, K):
    shape = (2, 1, 300, 8, K, 64)
    q, k, v = draw(shape, jnp.bfloat16)
    offset = jnp.asarray([299, 120], jnp.int32)
    slopes = None if alibi is None else jnp.asarray(alibi_slopes(8))

    def run(function, dtype):
        q_, k_, v_ = (x.astype(dtype) for x in (q, k, v))
        compiled = jax.jit(lambda *arrays: function(*arrays, offset, None, slopes, alibi or "float32", 0.125))
        return compiled(q_, k_, v_).astype(jnp.float32)

    exact = run(attention_reference, jnp.float32)
    error, allowed = (
        float(jnp.max(jnp.abs(run(function, jnp.bfloat16) - exact)))
        for function in (attention_one_token, attention_reference)
    )
    assert error <= 2 * allowed + 1e-5


def test_arguments_that_do_not_fit_are_named():
    q, k, v = draw((1, 4, 4, 4, 3, 8))
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attention(q, k, v)
    q, k, v = draw((1, 4, 4, 4, 2, 8))
    with pytest.raises(ValueError, match="alibi='exact'"):
        attention(q, k, v, alibi="exact")
