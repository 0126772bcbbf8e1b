"""The decode kernel, interpreted with race detection, against the reference; the plain versions against float64."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, shapes
from pallas_kernels.decode_attention import decode_attention, decode_attention_in_chain, mosaic
from pallas_kernels.decode_attention.plan import MAX_HEADS, Plan, Shape, default_plan
from pallas_kernels.decode_attention.reference import decode_reference
from pallas_kernels.flash_attention.cudnn import alibi_columns
from tests.pallas_kernels import tolerance
from tests.pallas_kernels.interpreted import interpreted
from tests.thorough import thorough, thorough_but

NAMES = ("q", "keys", "values", "lengths")
CASES = (
    "one key",
    "71 heads share one",
    "grouped, rows of different length",
    "hf_bf16",
    "float16",
    "paged",
    "paged, grouped, last pages part full",
)


def plain(case, inputs, dtype=None):
    """The reference's result in float32, computed in `dtype` (None: the inputs' own)."""
    q, keys, values = (inputs[name].astype(dtype or inputs[name].dtype) for name in ("q", "keys", "values"))
    arguments = (inputs["lengths"], inputs["slopes"], inputs["alibi"], case.scale, inputs["page_table"])
    return decode_reference(q, keys, values, *arguments).astype(jnp.float32)


def run_kernel(case, inputs, plan=None):
    arguments = (inputs["lengths"], inputs["slopes"], inputs["alibi"], case.scale, inputs["page_table"])
    with interpreted():
        out = mosaic.decode_mosaic(inputs["q"], inputs["keys"], inputs["values"], *arguments, plan=plan)
        return jax.block_until_ready(out)


def require_close(case, inputs, out):
    assert out.dtype == inputs["q"].dtype
    tolerance.require_close(out, plain(case, inputs), plain(case, inputs, jnp.float32))


@pytest.mark.parametrize("case", thorough_but(shapes.TOY_DECODE, *CASES), ids=str)
def test_kernel_equals_reference(case):
    inputs = case.draw(0)
    out = run_kernel(case, inputs)
    require_close(case, inputs, out)
    for row, length in enumerate(inputs["lengths"].tolist()):
        assert bool(jnp.any(out[row])) == (length > 0)


# Fewer, as many and more tiles than blocks and their warpgroups; one slot and several; tiles of one page and of two.
PLANS = [
    Plan(64, 1, 1, 2),
    Plan(64, 1, 3, 3),
    Plan(128, 1, 1, 2),
    Plan(128, 2, 2, 1),
    Plan(64, 2, 1, 2),
    Plan(64, 1, 2, 5),
]
PIECES, HEADS = [PLANS[1], PLANS[2], Plan(64, 2, 1, 2, max_heads=32)], [(80, 2, 128), (9, 1, 128), (96, 1, 64)]
RAGGED = shapes.DecodeCase("ragged", 3, 328, 3, 1, 64, alibi="float32", lengths=(321, 63, 129))


@pytest.mark.parametrize("plan", [*PLANS[::2], *thorough(PLANS[1::2])], ids=str)
def test_any_plan_gives_the_same(plan):
    inputs = RAGGED.draw(1)
    require_close(RAGGED, inputs, run_kernel(RAGGED, inputs, plan))


@pytest.mark.parametrize(
    ("plan", "heads"), [*zip(PIECES, HEADS), *thorough(zip(PIECES[1:] + PIECES[:1], HEADS))], ids=str
)
def test_results_are_combined_in_pieces_of_any_size(plan, heads):
    """Units of heads and of H, more of them than blocks and fewer; more heads than a block takes."""
    case = shapes.DecodeCase("pieces", 1, 200, *heads, lengths=(190,))
    inputs = case.draw(2)
    require_close(case, inputs, run_kernel(case, inputs, plan))


def test_a_plan_for_the_whole_gpu_is_interpreted_as_a_cluster():
    case = shapes.DecodeCase("grid", 1, 192, 2, 1, 64)
    inputs = case.draw(3)
    out = run_kernel(case, inputs, Plan(64, 1, 1, 3, "grid"))
    np.testing.assert_array_equal(out, run_kernel(case, inputs, Plan(64, 1, 1, 3, "cluster")))


@pytest.mark.parametrize("lengths", [(192, 65), (64, 0), (1, 129)])
def test_paged_equals_contiguous_bit_for_bit(lengths):
    case = shapes.DecodeCase("contiguous", 2, 192, 3, 1, 64, alibi="float32", lengths=lengths)
    contiguous = case.draw(4)
    paged = dataclasses.replace(case, paged=True).draw(4)
    plan = Plan(64, 1, 2, 2)
    np.testing.assert_array_equal(run_kernel(case, paged, plan), run_kernel(case, contiguous, plan))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("keys", [64, 128])
def test_nothing_past_a_row_s_length_is_seen(paged, keys):
    case = shapes.DecodeCase("dead slots", 2, 256, 2, 1, 64, lengths=(70, 129), paged=paged)
    inputs = case.draw(5)
    expected = run_kernel(case, inputs, Plan(keys, 2, 1, 2))
    dead = jnp.arange(256) >= inputs["lengths"][:, None]
    if paged:
        # Slots of the last page, and entries of the table that lead nowhere.
        entries = jnp.arange(4) * 64 >= inputs["lengths"][:, None]
        slots = dead.reshape(2, 4, 64) & ~entries[..., None]
        pool_slots = (
            jnp.zeros(inputs["keys"].shape[:2], bool).at[inputs["page_table"].reshape(-1)].set(slots.reshape(8, 64))
        )
        spoilt = {name: jnp.where(pool_slots[..., None, None], 1e30, inputs[name]) for name in ("keys", "values")}
        spoilt["page_table"] = jnp.where(entries, 2**30, inputs["page_table"])
    else:
        spoilt = {name: jnp.where(dead[..., None, None], 1e30, inputs[name]) for name in ("keys", "values")}
    np.testing.assert_array_equal(run_kernel(case, inputs | spoilt, Plan(keys, 2, 1, 2)), expected)


def test_alibi_equals_extra_columns_of_q_and_k():
    """The independent form of ALiBi: eight more columns and no bias, through the plain reference."""
    case = shapes.DecodeCase("columns", 2, 304, 3, 1, 64, alibi="float32", lengths=(300, 77))
    inputs = case.draw(6)
    out = run_kernel(case, inputs, Plan(64, 1, 2, 2)).astype(jnp.float32)
    q, keys, values = (inputs[name].astype(jnp.float32) for name in NAMES[:3])
    a, c = (columns.astype(jnp.float32) for columns in alibi_columns(inputs["slopes"], case.S, jnp.bfloat16))
    q = jnp.concatenate([q, jnp.broadcast_to(a, (2, 3, 8))], -1)
    wide_keys = jnp.concatenate([keys, jnp.broadcast_to(c[None, :, None], (2, case.S, 1, 8))], -1)
    wide_values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, 8)))
    expected = decode_reference(q, wide_keys, wide_values, inputs["lengths"], None, "float32", case.scale)[..., :64]
    np.testing.assert_allclose(out, expected, atol=2e-2)
    # The check would see it: without ALiBi the result is far off.
    without = decode_reference(q[..., :64], keys, values, inputs["lengths"], None, "float32", case.scale)
    assert np.max(np.abs(without - expected)) > 0.3


def test_mapped_calls_are_rows_of_one_launch():
    case = shapes.DecodeCase("mapped", 2, 136, 3, 1, 64, alibi="float32", lengths=(136, 50))
    calls = [case.draw(seed) for seed in range(2)]
    stacked = [jnp.stack([inputs[name] for inputs in calls]) for name in NAMES]
    slopes = calls[0]["slopes"]

    plan = Plan(64, 1, 2, 2)

    def decode(q, keys, values, lengths):
        return mosaic.decode_mosaic(q, keys, values, lengths, slopes, "float32", case.scale, None, plan=plan)

    with interpreted():
        out = jax.block_until_ready(jax.vmap(decode)(*stacked))
    for i, inputs in enumerate(calls):
        np.testing.assert_array_equal(out[i], run_kernel(case, inputs, plan))


@pytest.mark.parametrize("own_pools", [False, True])
def test_mapped_calls_read_one_pool_or_one_each(own_pools):
    case = shapes.DecodeCase("mapped pages", 2, 128, 2, 1, 64, lengths=(128, 50), paged=True)
    calls = [case.draw(seed) for seed in range(2)]
    if not own_pools:
        calls[1] |= {name: calls[0][name] for name in ("keys", "values")}
    axes = (0, *([0 if own_pools else None] * 2), 0, 0)
    arguments = [
        jnp.stack([inputs[name] for inputs in calls]) if axis == 0 else calls[0][name]
        for name, axis in zip((*NAMES, "page_table"), axes)
    ]

    plan = Plan(64, 1, 2, 2)

    def decode(q, keys, values, lengths, page_table):
        return mosaic.decode_mosaic(q, keys, values, lengths, None, "float32", case.scale, page_table, plan=plan)

    with interpreted():
        out = jax.block_until_ready(jax.vmap(decode, in_axes=axes)(*arguments))
    for i, inputs in enumerate(calls):
        np.testing.assert_array_equal(out[i], run_kernel(case, inputs, plan))


def naive(case, inputs):
    """Loops in float64, without ALiBi's rounding."""
    q, keys, values = (np.asarray(inputs[name], np.float64) for name in NAMES[:3])
    out = np.zeros(q.shape)
    for b, length in enumerate(inputs["lengths"].tolist()):
        for n in range(case.N if length else 0):
            kv = n // (case.N // case.K)
            j = np.arange(length)
            where = (b, j) if inputs["page_table"] is None else (np.asarray(inputs["page_table"])[b, j // 64], j % 64)
            scores = keys[where][:, kv] @ q[b, n]
            if inputs["slopes"] is not None:
                scores = scores + float(inputs["slopes"][n]) * (j - (length - 1))
            weights = np.exp((scores - scores.max()) * case.scale)
            out[b, n] = weights / weights.sum() @ values[where][:, kv]
    return out


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("alibi", [None, "float32"])
def test_the_floor_equals_float64_loops(paged, alibi):
    case = shapes.DecodeCase("floor", 3, 137, 6, 2, 24, "float32", alibi, lengths=(137, 0, 64), paged=paged)
    inputs = case.draw(7)
    expected = naive(case, inputs)
    np.testing.assert_allclose(plain(case, inputs), expected, atol=2e-6)
    for implementation in (None, "xla"):
        np.testing.assert_allclose(decode_attention(**inputs, implementation=implementation), expected, atol=2e-6)


def test_the_floor_follows_no_page_past_a_row_s_last():
    case = shapes.DecodeCase("pages", 2, 192, 2, 1, 8, "float32", lengths=(65, 0), paged=True)
    inputs = case.draw(8)
    expected = decode_attention(**inputs)
    live = jnp.arange(3) * 64 < inputs["lengths"][:, None]
    spoilt: dict[str, Any] = inputs | {"page_table": jnp.where(live, inputs["page_table"], 2**30)}
    np.testing.assert_array_equal(decode_attention(**spoilt), expected)


def draw(**changes: Any) -> dict[str, Any]:
    case = shapes.DecodeCase("call", 2, 64, 3, 1, 64)
    return dataclasses.replace(case, **changes).draw(0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "it takes bfloat16 or float16 throughout, not queries in float32"),
        ({"H": 32}, "it takes head dims 64 and 128, not 32"),
        ({"S": 101}, "a row of the cache has 101: make that a multiple of 8"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_by_name_and_left_to_xla_otherwise(changes, reason):
    inputs = draw(**changes)
    with compat.assume_capability("9.0"):
        with pytest.raises(NotImplementedError, match=reason):
            decode_attention(**inputs, implementation="mosaic")
        np.testing.assert_array_equal(decode_attention(**inputs), decode_attention(**inputs, implementation="xla"))


def test_where_there_is_no_hopper_gpu_the_floor_runs():
    inputs = draw()
    with pytest.raises(NotImplementedError, match=r"mosaic.*needs a Hopper GPU"):
        decode_attention(**inputs, implementation="mosaic")
    np.testing.assert_array_equal(decode_attention(**inputs), decode_attention(**inputs, implementation="xla"))
    with pytest.raises(NotImplementedError, match=r"cudnn.*not a cache"):
        decode_attention(**inputs, implementation="cudnn")


def test_where_there_is_one_the_kernel_runs_by_default():
    inputs = draw()
    with interpreted():
        out, named = (jax.block_until_ready(decode_attention(**inputs, implementation=x)) for x in (None, "mosaic"))
    np.testing.assert_array_equal(out, named)
    assert np.any(out != decode_attention(**inputs, implementation="xla"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {name: jnp.zeros((2, 64, 2, 64), jnp.bfloat16) for name in ("keys", "values")},
            "3 query heads cannot share 2",
        ),
        ({"alibi": "exact"}, "alibi='exact' is unknown"),
        ({"implementation": "mosaik"}, "'mosaik' is unknown; known are mosaic, cudnn, xla"),
        ({"q": jnp.zeros((3, 3, 64), jnp.bfloat16), "lengths": jnp.zeros(3, jnp.int32)}, "3 rows of queries"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    inputs: dict[str, Any] = draw() | changes
    with pytest.raises(ValueError, match=message):
        decode_attention(**inputs)


def test_too_few_counters_are_named():
    inputs = draw()
    needed = inputs["lengths"].size * inputs["q"].shape[1]
    with pytest.raises(ValueError, match=f"need {needed} counters, not {needed - 1}"):
        decode_attention_in_chain(**inputs, counters=jnp.zeros(needed - 1, jnp.int32))


def test_pages_of_another_size_are_named():
    inputs: dict[str, Any] = draw(S=32) | {"page_table": jnp.zeros((2, 1), jnp.int32)}
    with pytest.raises(ValueError, match="pages hold 64 slots, not 32"):
        decode_attention(**inputs)


@pytest.mark.parametrize("heads", shapes.HEADS.values(), ids=shapes.HEADS)
@pytest.mark.parametrize("batch", [1, 5, 16, 64])
@pytest.mark.parametrize("capacity", [8, 512, 4096, 131072])
@pytest.mark.parametrize("num_sms", [78, 132])
def test_default_plans_fit_the_gpu(heads, batch, capacity, num_sms):
    shape = Shape(batch, heads.K, heads.N // heads.K, heads.H, capacity)
    plan = default_plan(shape, num_sms)
    shape.check(plan, num_sms)
    assert plan.splits * plan.keys < capacity + plan.keys


@pytest.mark.parametrize(("G", "H"), [(96, 64), (128, 64), (232, 64), (71, 128), (96, 128), (232, 128)])
@pytest.mark.parametrize("num_sms", [78, 132])
def test_default_plans_fit_for_more_query_heads_than_published_models_have(G, H, num_sms):
    for batch, K, capacity in itertools.product((1, 2, 4, 16, 200), (1, 8), (64, 256, 4352, 16384, 131072)):
        shape = Shape(batch, K, G, H, capacity)
        plan = default_plan(shape, num_sms)
        shape.check(plan, num_sms)
        assert plan.splits * plan.keys < capacity + plan.keys and shape.heads(plan) <= MAX_HEADS[H]


def test_heads_are_padded_to_eight_and_divided_beyond_what_a_block_takes():
    plan = Plan(64, 1, 1, 1)
    assert [Shape(1, 1, G, 64, 64).heads(plan) for G in (1, 16, 29, 71, 80)] == [8, 16, 32, 72, 80]
    wide = Shape(1, 1, 128, 128, 64)
    assert (wide.head_blocks(plan), wide.heads(plan), wide.pairs(plan)) == (2, 64, 2)
    thirds, plan = Shape(1, 1, 71, 64, 64), Plan(64, 1, 1, 1, max_heads=24)
    assert (thirds.head_blocks(plan), thirds.heads(plan), thirds.pairs(plan)) == (3, 24, 3)


def test_plans_that_cannot_run_are_refused():
    shape = Shape(1, 1, 8, 64, 2**17)
    with pytest.raises(ValueError, match="1000 blocks must run at once, and the GPU holds 264"):
        shape.check(Plan(64, 1, 2, 1000, "grid"), 132)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        shape.check(Plan(128, 4, 4, 1), 132)
    with pytest.raises(ValueError, match="keys must be 64 or 128"):
        Plan(96, 1, 2, 1)
    with pytest.raises(ValueError, match="meeting must be"):
        Plan(64, 1, 2, 1, "street")
    with pytest.raises(ValueError, match="at most 16 blocks"):
        Plan(64, 1, 2, 32)
