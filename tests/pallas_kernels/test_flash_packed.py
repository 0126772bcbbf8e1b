"""Documents back to back in a row: none sees another, forwards or backwards, and each gives what it gives alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from pallas_kernels import compat, sharded
from pallas_kernels.flash_attention import api, attention, mosaic
from pallas_kernels.flash_attention.api import LETTERS, STARTS_LETTERS
from pallas_kernels.flash_attention.reference import attention_xla, attention_xla_with_lse
from tests.pallas_kernels.packing import spans, starts_of

# Lengths of each row's documents: some of one token, at a row's beginning, side by side within it, and at its end.
ROWS = ((1, 22, 22), (21, 1, 1, 21, 1))
B, T, H = 2, 45, 8
SCALE = H**-0.5
# N, K and whether positions enter by ALiBi: multi-head, grouped, multi-query with an odd number of heads.
HEADS = [(4, 4, False), (6, 2, True), (7, 1, True)]
NO_OFFSET = jnp.zeros(B, jnp.int32)


def draw(N, K, num_keys=T):
    keys = jax.random.split(jax.random.key(0), 4)
    q, cotangent = (jax.random.normal(key, (B, T, N, H)) for key in (keys[0], keys[3]))
    k, v = (jax.random.normal(key, (B, num_keys, K, H)) for key in keys[1:3])
    return q, k, v, cotangent


def slopes_of(N, with_alibi):
    return jnp.linspace(0.05, 0.5, N) if with_alibi else None


def literal(q, k, v, cotangent, slopes, mask):
    """Output, log-sum-exp and gradients in float64 under a mask [B, T, S], by the formulas of a softmax."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    G = q.shape[2] // k.shape[2]
    wide_k, wide_v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, wide_k)
    if slopes is not None:
        scores += np.asarray(slopes)[:, None, None] * (np.arange(k.shape[1]) - np.arange(q.shape[1])[:, None])
    weights = np.exp(scores * SCALE) * mask[:, None]
    total = weights.sum(-1, keepdims=True)
    p = weights / total
    out = np.einsum("bnts,bsnh->btnh", p, wide_v)
    dp = np.einsum("btnh,bsnh->bnts", cotangent, wide_v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * SCALE
    dq, dk = np.einsum("bnts,bsnh->btnh", ds, wide_k), np.einsum("bnts,btnh->bsnh", ds, q)
    dv = np.einsum("bnts,btnh->bsnh", p, cotangent)
    dk, dv = (x.reshape(*k.shape[:3], G, H).sum(3) for x in (dk, dv))
    return out, np.log(total[..., 0]), (dq, dk, dv)


def mask_of(rows):
    """[B, T, T]: blocks of lower triangles along the diagonal."""
    mask = np.zeros((len(rows), T, T), bool)
    for b, documents in enumerate(rows):
        for first, end in spans(documents):
            mask[b, first:end, first:end] = np.tri(end - first, dtype=bool)
    return mask


def outputs_and_gradients(function, cotangent):
    """(q, k, v) -> the output of `function` and the gradients of its product with `cotangent`."""

    def run(q, k, v):
        out, pull_back = jax.vjp(function, q, k, v)
        return out, *pull_back(cotangent)

    return jax.jit(run)


def require_equal(found, expected, tolerance=3e-6):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=tolerance)


def test_the_mask_is_a_literal_one():
    mask = mask_of(((2, 1, T - 3),))[0, :5, :5].astype(int)
    assert mask.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert starts_of([(2, 1, 3)]).tolist() == [[0, 0, 2, 3, 3, 3]]


# The last with at most 16 queries a block: three blocks, the last one short.
@pytest.mark.parametrize(("N", "K", "with_alibi", "queries"), [*((*heads, T) for heads in HEADS), (6, 2, True, 16)])
def test_outputs_and_gradients_equal_those_under_a_mask(N, K, with_alibi, queries):
    q, k, v, cotangent = draw(N, K)
    slopes, limit = slopes_of(N, with_alibi), 4 * B * N * T * queries  # bytes of scores
    arguments = NO_OFFSET, None, slopes, "float32", SCALE, starts_of(ROWS)
    out, lse, gradients = literal(q, k, v, cotangent, slopes, mask_of(ROWS))

    def attend(q, k, v):
        return attention_xla(q, k, v, *arguments, max_scores_bytes=limit)

    require_equal(outputs_and_gradients(attend, cotangent)(q, k, v), (out, *gradients))
    with_lse = attention_xla_with_lse(q, k, v, *arguments, max_scores_bytes=limit)
    require_equal(with_lse, (out, lse))


@pytest.mark.parametrize(("N", "K", "with_alibi"), HEADS[1:])
def test_packed_equals_each_document_alone(N, K, with_alibi):
    q, k, v, cotangent = draw(N, K)
    slopes = slopes_of(N, with_alibi)
    packed = functools.partial(attention, starts=starts_of(ROWS), slopes=slopes)
    together = outputs_and_gradients(packed, cotangent)(q, k, v)
    for b, documents in enumerate(ROWS):
        for first, end in spans(documents):
            part = (slice(b, b + 1), slice(first, end))
            attend = functools.partial(attention, slopes=slopes)
            alone = outputs_and_gradients(attend, cotangent[part])(q[part], k[part], v[part])
            require_equal([x[part] for x in together], alone)


def test_starts_of_zero_are_none():
    q, k, v, cotangent = draw(6, 2)
    none, zeros = (
        outputs_and_gradients(functools.partial(attention, starts=starts), cotangent)(q, k, v)
        for starts in (None, jnp.zeros((B, T), jnp.int32))
    )
    for ours, theirs in zip(zeros, none, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    packed = attention(q, k, v, starts=starts_of(ROWS))
    assert np.max(np.abs(packed - none[0])) > 0.3, "the checks would see it"


def test_chunks_lengths_and_single_tokens_take_starts_too():
    """Keys from starts[b, t] up to the query's own position, short of the row's length."""
    q, k, v, _ = draw(4, 2, num_keys=60)
    offset, lengths = jnp.asarray([15, 3], jnp.int32), jnp.asarray([60, 37], jnp.int32)
    starts = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 12, (B, T)), axis=1), jnp.int32)
    out, lse = attention(q, k, v, query_offset=offset, lengths=lengths, starts=starts, return_lse=True)
    one = jax.jit(lambda q, offset, starts: attention(q, k, v, query_offset=offset, lengths=lengths, starts=starts))
    i, j = offset[:, None, None] + np.arange(T)[:, None], np.arange(60)
    mask = np.asarray((j <= i) & (j < lengths[:, None, None]) & (j >= starts[:, :, None]))
    expected, expected_lse, _ = literal(q, k, v, q, None, mask)
    require_equal((out, lse), (expected, expected_lse))
    for t in (0, 20, T - 1):
        alone = one(q[:, t : t + 1], offset + t, starts[:, t : t + 1])
        require_equal([alone], [out[:, t : t + 1]])


def test_queries_that_see_no_key_give_zeros_and_finite_gradients():
    """As padding may that is said to start past itself."""
    q, k, v, cotangent = draw(6, 2)
    starts = jnp.full((B, T), T, jnp.int32).at[:, :40].set(0)
    out, lse = attention(q, k, v, starts=starts, return_lse=True)
    assert not np.any(out[:, 40:]) and np.all(lse[..., 40:] == -np.inf) and np.all(np.isfinite(lse[..., :40]))
    attend = functools.partial(attention, starts=starts)
    for gradient in outputs_and_gradients(attend, cotangent)(q, k, v)[1:]:
        assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, 40:])


def test_each_device_of_a_mesh_gets_the_starts_of_its_rows(cpu_devices):
    mesh = Mesh(np.asarray(cpu_devices[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    letters, shares = (*LETTERS, STARTS_LETTERS), []

    def plain(q, k, v, offset, lengths, slopes, starts):
        shares.append(starts.shape)
        return attention_xla(q, k, v, offset, lengths, slopes, "float32", SCALE, starts)

    with jax.default_device(cpu_devices[0]):
        q, k, v, cotangent = draw(6, 2)
        rest = NO_OFFSET, None, slopes_of(6, True), starts_of(ROWS)

        def run(mesh):
            def attend(q, k, v):
                return sharded.over_mesh(plain, mesh, (q, k, v, *rest), letters, LETTERS[0])

            return outputs_and_gradients(attend, cotangent)(q, k, v)

        require_equal(run(mesh), run(None))
    assert shares == [(B // 2, T), (B, T)]


@pytest.mark.parametrize(("capability", "expected"), [("8.0", "xla"), ("9.0", "mosaic")])
def test_the_default_is_an_implementation_that_takes_starts(capability, expected, monkeypatch):
    q, k, v = (jnp.ones((1, 16, 1, 64), jnp.bfloat16) for _ in range(3))
    starts, ran = jnp.zeros((1, 16), jnp.int32), []

    def by_kernel(q, *rest):
        ran.append("mosaic")
        assert rest[-1] is starts
        return q, jnp.zeros((1, 1, 128))

    def by_xla(q, *rest):
        ran.append("xla")
        assert rest[-1] is starts
        return q

    monkeypatch.setattr(mosaic, "attention_mosaic", by_kernel)
    monkeypatch.setattr(api, "attention_xla", by_xla)
    with compat.assume_capability(capability):
        attention(q, k, v, starts=starts)
        with pytest.raises(NotImplementedError, match="'cudnn' cannot run here: it takes one document a row"):
            attention(q, k, v, starts=starts, implementation="cudnn")
    assert ran == [expected]


def test_starts_of_another_shape_or_type_are_refused():
    q, k, v, _ = draw(4, 2)
    for starts, found in ((jnp.zeros((B, T - 1), jnp.int32), "int32[2, 44]"), (jnp.zeros((B, T)), "float32[2, 45]")):
        message = re.escape(f"attention: starts {found} must hold one integer for each query, (2, 45)")
        with pytest.raises(ValueError, match=message):
            attention.__wrapped__(q, k, v, starts=starts)
