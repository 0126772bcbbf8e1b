"""Cached decoding, ragged batches and the cache's own arithmetic."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.config import PRESETS, FalconConfig
from falcon_jax.model import cache as kv_cache
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import KVCache, cache_bytes
from tests.models import VARIANTS, random_params, tiny
from tests.thorough import thorough

DYNAMIC = "falcon-7b with dynamic RoPE"
USUAL = ("falcon-rw-1b", "falcon-7b", "falcon-40b")


def variant_config(name: str) -> FalconConfig:
    if name != DYNAMIC:
        return tiny(name)
    config = tiny("falcon-7b")
    assert config.rope is not None
    # 8 trained tokens: the rows below cross it. One layer, because a later layer's cached keys and values come from
    # hidden states that were made under the frequencies of their time, and no cache can follow those.
    rope = dataclasses.replace(config.rope, scaling="dynamic", factor=2.0, original_max_tokens=8)
    return dataclasses.replace(config, rope=rope, max_tokens=8, num_layers=1)


@functools.partial(jax.jit, static_argnames="config")
def full_logits(config, params, ids, num_tokens):
    decoder = model_params.bind(config, params)
    return decoder.logits(decoder(ids, num_tokens=num_tokens)[0])


@functools.partial(jax.jit, static_argnames=("config", "is_first"), donate_argnames="cache")
def extend(config, params, cache, ids, num_tokens, is_first=False):
    decoder = model_params.bind(config, params)
    hidden, cache = decoder(ids, cache=cache, num_tokens=num_tokens, cache_is_empty=is_first)
    return decoder.logits(hidden), cache


@pytest.mark.parametrize(
    ("name", "is_first"),
    [(name, True) for name in (*USUAL, DYNAMIC)]
    + thorough((name, True) for name in VARIANTS if name not in USUAL)
    + [("falcon-40b", False), *thorough([(DYNAMIC, False)])],
)
def test_cached_decoding_equals_the_full_forward(name, is_first):
    """A ragged prefill, then tokens one at a time and in chunks, each against an uncached pass over all of it."""
    config = variant_config(name)
    params = random_params(config)
    ids = jax.random.randint(jax.random.key(2), (3, 16), 0, config.vocab_size)
    lengths = np.asarray([4, 7, 1])
    cache = KVCache.create(config, 3, 20, jnp.float32)
    prompt = jnp.where(jnp.arange(7) < lengths[:, None], ids[:, :7], 0)
    logits, cache = extend(config, params, cache, prompt, jnp.asarray(lengths), is_first=is_first)

    def check(logits, rows, lengths, columns):
        whole = full_logits(config, params, ids, jnp.asarray(lengths))
        for b in rows:
            np.testing.assert_allclose(logits[b, columns[b]], whole[b, lengths[b] - 1], atol=2e-5)

    check(logits, range(3), lengths, lengths - 1)
    for taken in ([1, 1, 1], [1, 0, 1], [3, 2, 3]):
        width = max(taken)
        chunk = np.zeros((3, width), np.int32)
        for b in range(3):
            chunk[b, : taken[b]] = ids[b, lengths[b] : lengths[b] + taken[b]]
        logits, cache = extend(config, params, cache, jnp.asarray(chunk), jnp.asarray(taken))
        lengths = lengths + taken
        np.testing.assert_array_equal(cache.lengths, lengths)
        check(logits, [b for b in range(3) if taken[b]], lengths, [count - 1 for count in taken])


@pytest.mark.parametrize("name", [*USUAL, DYNAMIC, *thorough(name for name in VARIANTS if name not in USUAL)])
def test_a_ragged_batch_equals_each_row_alone(name):
    config = variant_config(name)
    params = random_params(config)
    ids = jax.random.randint(jax.random.key(3), (3, 12), 0, config.vocab_size)
    lengths = [12, 5, 1]
    together = full_logits(config, params, ids, jnp.asarray(lengths))
    for b, length in enumerate(lengths):
        alone = full_logits(config, params, ids[b : b + 1, :length], jnp.asarray([length]))
        np.testing.assert_allclose(together[b, :length], alone[0], atol=2e-5)


def test_writes_past_the_capacity_are_dropped():
    slots = jnp.zeros((2, 4, 1, 1))
    new = jnp.arange(1.0, 7.0).reshape(2, 3, 1, 1)
    out = kv_cache.write(slots, new, jnp.asarray([0, 3], jnp.int32))
    np.testing.assert_array_equal(out[:, :, 0, 0], [[1, 2, 3, 0], [0, 0, 0, 4]])


def test_cache_bytes_are_those_of_the_arrays_and_of_the_published_models():
    config = tiny("falcon-40b")
    cache = KVCache.create(config, 3, 16, jnp.bfloat16)
    held = sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert cache_bytes(config, 3, 16, "bfloat16") == held
    # KiB a token in bfloat16: FACTS of the published shapes, 2 L K H 2 bytes.
    for name, kib in [("falcon-7b", 8), ("falcon-40b", 120), ("falcon-180b", 160), ("falcon-rw-1b", 192)]:
        assert cache_bytes(PRESETS[name], 1, 1, "bfloat16") == kib * 1024


def test_repeat_puts_copies_side_by_side():
    config = tiny("falcon-7b")
    cache = dataclasses.replace(KVCache.create(config, 2, 4, jnp.float32), lengths=jnp.asarray([1, 3]))
    assert cache.repeat(3).lengths.tolist() == [1, 1, 1, 3, 3, 3]
    assert cache.repeat(3).batch_size == 6
