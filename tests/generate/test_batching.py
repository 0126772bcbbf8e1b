"""Buckets and prefill plans: few shapes, little padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_jax.generate import batching


@pytest.mark.parametrize(
    ("size", "bucket"), [(1, 32), (32, 32), (33, 64), (1500, 2048), (2049, 2560), (4000, 4096), (4097, 5120)]
)
def test_buckets(size, bucket):
    assert batching.round_up(size, batching.MIN_BUCKET) == bucket


@given(size=st.integers(1, 200_000))
def test_a_bucket_holds_its_size_and_wastes_at_most_a_quarter_above_2048(size):
    bucket = batching.round_up(size, 32)
    assert bucket >= size
    assert bucket <= 2 * size or bucket == 32
    if bucket > batching.FINE_ABOVE:
        assert bucket <= size * 1.25
    assert batching.round_up(bucket, 32) == bucket


@given(num_tokens=st.integers(1, 20_000), num_rows=st.integers(1, 300))
def test_prefill_covers_the_prompt_in_few_shapes(num_tokens, num_rows):
    sizes = batching.prefill_sizes(num_tokens, num_rows)
    assert sum(sizes) >= num_tokens > sum(sizes[:-1])
    assert set(sizes) <= {32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert max(sizes) * num_rows <= batching.MAX_CALL_TOKENS or max(sizes) == 32
    assert sum(sizes) <= max(1.5 * num_tokens, num_tokens + 128)


def test_dynamic_rope_prefills_in_one_call():
    assert batching.prefill_sizes(3000, 1, whole=True) == [3072]


def test_capacity_has_room_for_the_padded_prompt():
    assert batching.cache_capacity(10, [32]) == 128
    assert batching.cache_capacity(130, [128, 32]) == 256


def test_rows_are_padded_on_the_right():
    token_ids, lengths = batching.pad_rows([[1, 2, 3], [4]], 5)
    np.testing.assert_array_equal(token_ids, [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [3, 1])
    assert token_ids.dtype == lengths.dtype == np.int32


def test_padding_is_not_a_token_seen():
    seen = batching.seen_tokens([[1, 2, 2], [4]], 6)
    assert [np.flatnonzero(row).tolist() for row in seen] == [[1, 2], [4]]
