"""The kernels on documents that lie back to back, interpreted: against the plain version, and what they leave out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import shapes
from pallas_kernels.flash_attention import attention
from pallas_kernels.flash_attention.backward_order import KEYS, Problem
from tests.pallas_kernels import tolerance
from tests.pallas_kernels.interpreted import interpreted
from tests.pallas_kernels.packing import starts_of
from tests.thorough import thorough

Case = shapes.AttentionCase

# Documents that begin and end at the edges of tiles and beside them, within one tile and across several; of one token;
# alone in their row; as padding after a row's end, which the last one is, and which begins before its own queries do.
CASES = [
    *thorough([(Case("multi-head", 1, 200, 200, 2, 2, 64, alibi="float32"), [(1, 63, 1, 62, 1, 50, 22)])]),
    (Case("shared", 1, 260, 260, 2, 1, 128, alibi="hf_bf16"), [(129, 64, 63, 1, 3)]),
    *thorough(
        [
            (
                Case("grouped, a chunk", 2, 80, 150, 4, 2, 64, "float16", "float32", offsets=(70, 70)),
                [(150,), (20, 60, 70)],
            )
        ]
    ),
    (Case("a row that ends early", 2, 200, 200, 1, 1, 128, lengths=(140, 0)), [(70, 70, 60), (200,)]),
]


def draw(case, documents, seed=0):
    """Arguments of `attention` that are arrays, and cotangents of its output and log-sum-exp."""
    inputs = case.draw(seed) | {"starts": starts_of(documents)[:, -case.T :]}
    del inputs["alibi"]
    dout = jax.random.normal(jax.random.key(seed + 9), (case.B, case.T, case.N, case.H), case.dtype)
    return inputs, (dout, jax.random.normal(jax.random.key(12), (case.B, case.N, case.T)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def results(case, implementation, dtype, inputs, cotangents):
    """Output, log-sum-exp (zero where -inf) and gradients of q, k and v; the products in `dtype`."""
    options = {"alibi": case.alibi or "float32", "scale": case.scale, "implementation": implementation}

    def attend(q, k, v):
        out, lse = attention(**inputs | {"q": q, "k": k, "v": v}, **options, return_lse=True)
        return out, jnp.where(jnp.isfinite(lse), lse, 0.0)

    made, pull_back = jax.vjp(attend, *(inputs[name].astype(dtype) for name in "qkv"))
    dout, dlse = cotangents
    return *made, *pull_back((dout.astype(dtype), dlse))


def kernel_results(case, inputs, cotangents):
    with interpreted():
        return jax.block_until_ready(results(case, "mosaic", case.dtype, inputs, cotangents))


@pytest.mark.parametrize(("case", "documents"), CASES, ids=str)
def test_interpreted_kernels_stay_within_twice_the_error_of_the_reference(case, documents):
    inputs, cotangents = draw(case, documents)
    found = kernel_results(case, inputs, cotangents)
    same, exact = (results(case, "xla", dtype, inputs, cotangents) for dtype in (case.dtype, "float32"))
    for ours, theirs, right in zip(found, same, exact, strict=True):
        tolerance.require_close(ours, theirs, right)


def test_tiles_of_other_documents_are_left_out():
    """What stands in them does not matter then; where a tile is shared, NaN times a weight of zero would be NaN."""
    case = Case("three documents", 1, 270, 270, 1, 1, 128)
    inputs, cotangents = draw(case, [(128, 128, 14)])
    second, others = slice(128, 256), [slice(0, 128), slice(256, 270)]
    poisoned = inputs | {name: inputs[name].at[:, second].set(jnp.nan) for name in "qkv"}
    expected, found = (kernel_results(case, given, cotangents) for given in (inputs, poisoned))
    for name, ours, right in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        axis = 2 if name == "lse" else 1
        for part in others:
            index = (slice(None),) * axis + (part,)
            np.testing.assert_array_equal(ours[index], right[index], err_msg=name)
    assert np.all(np.isnan(found[0][:, second]))


@pytest.mark.parametrize(("T", "queries"), [(64, 64), (300, 64), (300, 128)])
def test_both_sides_agree_which_blocks_of_keys_concern_which_queries(T, queries):
    problem, generator = Problem(1, T, T, 1, 1, 64, queries), np.random.default_rng(T)
    tiles, blocks = (np.arange(n, dtype=np.int32) for n in (problem.num_query_tiles, problem.num_key_blocks))
    for num_documents, length in ((1, T), (2, T), (5, T), (40, T), (5, T // 3), (40, 0)):
        first = np.sort(generator.choice(np.arange(1, T), num_documents - 1, replace=False))
        starts = np.asarray(starts_of([np.diff([0, *first, T]).tolist()]))
        padded = jnp.asarray(np.pad(starts, ((0, 0), (0, -T % queries)), mode="edge"))
        bounds = problem.tile_ends(padded, jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32))
        ends, full_ends = np.asarray(bounds)[0]
        first_tile, count = (
            np.asarray(x)
            for x in (problem.first_query_tile(blocks, 0, length), problem.num_key_blocks_of(tiles, 0, length))
        )
        from_keys = (first_tile[:, None] <= tiles) & (tiles < ends[:, None])
        first_block = np.asarray(problem.first_key_block_of(starts[0, ::queries], count))
        np.testing.assert_array_equal(from_keys, (first_block <= blocks[:, None]) & (blocks[:, None] < count))
        assert from_keys.any(axis=0).all(), "each tile of dQ has somebody to write it"

        i, j = np.arange(T)[:, None], np.arange(T)
        by_document = j >= starts[0][:, None]
        seen = by_document & (j <= i) & (j < length)
        for tile, block in np.ndindex(len(tiles), len(blocks)):
            part = slice(tile * queries, (tile + 1) * queries), slice(block * KEYS, (block + 1) * KEYS)
            assert from_keys[block, tile] or not seen[part].any()
            if length == T:  # and no tile is taken for nothing
                assert seen[part].any() or not from_keys[block, tile]
            if from_keys[block, tile]:
                assert (tile < full_ends[block]) == by_document[part].all()
