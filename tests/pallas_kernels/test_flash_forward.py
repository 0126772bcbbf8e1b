"""The forward kernel, interpreted: its output and log-sum-exp against float32, its schedule, and ALiBi another way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import shapes
from pallas_kernels.flash_attention import forward as kernel
from pallas_kernels.flash_attention.cudnn import alibi_columns
from pallas_kernels.flash_attention.reference import attention_reference, attention_xla_with_lse
from pallas_kernels.flash_attention.tiles import Tiles
from tests.pallas_kernels import tolerance
from tests.pallas_kernels.interpreted import interpreted
from tests.thorough import thorough, thorough_but

CASES = (
    "one query",
    "alibi, odd",
    "grouped, past a tile of 128",
    "several tiles a block",
    "rows of different length",
    "chunks at different places",
    "fewer keys than queries",
    "hf_bf16",
    "float16",
)


def run_kernel(case, inputs, blocks=None):
    with interpreted():
        out, lse = kernel.forward(*arguments(case, inputs), blocks=blocks)
        return jax.block_until_ready((out, lse[:, :, : case.T]))


def arguments(case, inputs) -> Any:
    names = ("q", "k", "v", "query_offset", "lengths", "slopes", "alibi")
    return *(inputs[name] for name in names), case.scale


def reference(case, inputs, dtype):
    q, k, v, offset, *rest = arguments(case, inputs)
    offset = jnp.zeros(case.B, jnp.int32) if offset is None else offset
    lengths, slopes, alibi, scale = rest
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    return attention_xla_with_lse(q, k, v, offset, lengths, slopes, alibi, scale)


@pytest.mark.parametrize("case", thorough_but(shapes.TOY_ATTENTION, *CASES), ids=str)
def test_interpreted_kernel_stays_within_twice_the_error_of_the_reference(case):
    inputs = case.draw()
    out, lse = run_kernel(case, inputs)
    exact, exact_lse = reference(case, inputs, jnp.float32)
    same, same_lse = reference(case, inputs, case.dtype)
    assert out.dtype == case.dtype and not np.any(np.isnan(out))
    tolerance.require_close(out, same, exact)
    seen = np.isfinite(exact_lse)
    np.testing.assert_array_equal(np.isneginf(lse), ~seen)
    tolerance.require_close(*(jnp.where(seen, x, 0) for x in (lse, same_lse, exact_lse)))
    assert not np.any(out[~np.moveaxis(seen, 1, 2)])


@pytest.mark.parametrize(
    ("warpgroups", "take_turns"), [(1, False), (2, True), (3, True), *thorough([(1, True), (2, False), (3, False)])]
)
def test_any_number_of_warpgroups_gives_the_same(warpgroups, take_turns):
    case = shapes.AttentionCase("several", 1, 200, 200, 2, 1, 64, alibi="float32")
    inputs = case.draw(3)
    blocks = kernel.Blocks(warpgroups, 64, 2, take_turns=take_turns)
    out, lse = run_kernel(case, inputs, blocks)
    expected, expected_lse = run_kernel(case, inputs)
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)


def test_alibi_equals_extra_columns_of_q_and_k():
    """The independent form of ALiBi: eight more columns and no bias, through the plain reference."""
    case = shapes.AttentionCase("columns", 1, 150, 150, 3, 1, 64, alibi="float32")
    inputs = case.draw(1)
    out, _ = run_kernel(case, inputs)
    plain_q, plain_k, plain_v = q, k, v = [inputs[name].astype(jnp.float32) for name in ("q", "k", "v")]
    a, c = (columns.astype(jnp.float32) for columns in alibi_columns(inputs["slopes"], case.S, jnp.bfloat16))
    q = jnp.concatenate([q, jnp.broadcast_to(a, (1, case.T, case.N, 8))], -1)
    k = jnp.concatenate([k, jnp.broadcast_to(c[None, :, None], (1, case.S, 1, 8))], -1)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 8)))
    offset = jnp.zeros(1, jnp.int32)
    expected = attention_reference(q, k, v, offset, None, None, "float32", case.scale)[..., :64]
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)
    # The check would see it: without ALiBi the result is far off.
    plain = attention_reference(plain_q, plain_k, plain_v, offset, None, None, "float32", case.scale)
    assert np.max(np.abs(plain - expected)) > 0.3


def test_many_rows_at_once_through_vmap():
    case = shapes.AttentionCase("vmap", 1, 64, 64, 2, 1, 64)
    first, second = case.draw(0), case.draw(1)
    stacked = [jnp.stack([first[name], second[name]]) for name in "qkv"]
    with interpreted():
        out = jax.vmap(lambda q, k, v: kernel.forward(q, k, v, None, None, None, "float32", case.scale)[0])(*stacked)
        out = jax.block_until_ready(out)
    for i, inputs in enumerate((first, second)):
        np.testing.assert_array_equal(out[i], run_kernel(case, inputs)[0])


@pytest.mark.parametrize(("batch", "kv_heads", "group", "num_tiles"), [(1, 1, 71, 22), (2, 8, 16, 5), (1, 32, 1, 1)])
@pytest.mark.parametrize("num_blocks", [1, 7, 132])
def test_every_tile_is_worked_on_once_and_work_is_even(batch, kv_heads, group, num_tiles, num_blocks):
    work = Tiles(batch, kv_heads, group, num_tiles, 2**20, key_tiles_before=0.0, key_tiles_each=1.0)
    num_blocks = min(num_blocks, batch * kv_heads * group * num_tiles)
    table, counts = work.schedule(num_blocks)
    done = np.concatenate([table[block, :count] for block, count in enumerate(counts)])
    expected = [
        (b, kv * group + g, kv, tile)
        for b in range(batch)
        for kv in range(kv_heads)
        for g in range(group)
        for tile in range(num_tiles)
    ]
    assert sorted(map(tuple, done.tolist())) == expected
    costs = [sum(1.5 + tile + 1 for tile in table[block, :count, 3]) for block, count in enumerate(counts)]
    assert max(costs) - min(costs) <= 1.5 + num_tiles
