"""Logits of each variant with the kernels for Hopper, against XLA's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from falcon_jax.config import PRESETS
from falcon_jax.generate.programs import AT_THE_SAME_TIME, WITH_LOOPS_IN_CUDA_GRAPHS, WITHOUT_CUDA_GRAPHS
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import KVCache
from falcon_jax.model.quantize import WEIGHTS
from falcon_jax.model.stages import norm_sums as sums_of
from falcon_jax.model.stages import reads_norm_sums
from falcon_jax.model.step import ForwardOptions
from pallas_kernels import compat
from tests.pallas_kernels.tolerance import require_close

TOKENS = 300


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS)
def test_logits_with_kernels_stay_within_twice_the_error_of_xla(name):
    if (reason := compat.mosaic_reason()) is not None:
        pytest.skip(reason)
    config = dataclasses.replace(PRESETS[name], num_layers=2, vocab_size=512)
    params = model_params.init(config, jax.random.key(0), jnp.bfloat16)
    ids = jax.random.randint(jax.random.key(1), (1, TOKENS), 0, config.vocab_size)

    def logits(attention, dtype):
        def run(params, ids):
            decoder = model_params.bind(config, params, ForwardOptions(attention=attention))
            hidden, _ = decoder(ids)
            return decoder.logits(hidden)

        return jax.jit(run)(jax.tree.map(lambda x: x.astype(dtype), params), ids)

    require_close(logits("mosaic", jnp.bfloat16), logits("xla", jnp.bfloat16), logits("xla", jnp.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("num_rows", [1, 4, 20])
def test_prompts_and_decoding_through_fused_stages_stay_within_twice_the_error_of_xla(name, weights, num_rows):
    if (reason := compat.mosaic_reason()) is not None:
        pytest.skip(reason)
    config = dataclasses.replace(PRESETS[name], num_layers=2, vocab_size=512)
    params = model_params.init(config, jax.random.key(0), jnp.bfloat16, weights=weights)
    ids = jax.random.randint(jax.random.key(1), (num_rows, 65), 0, config.vocab_size)

    def logits(stages, dtype):
        def run(params, ids):
            decoder = model_params.bind(config, params, ForwardOptions(stages=stages))
            cache = KVCache.create(config, num_rows, 80, dtype)
            _, cache = decoder(ids[:, :-1], cache=cache, cache_is_empty=True)
            norm_sums = None
            if stages == "mosaic" and reads_norm_sums(config, weights, dtype, num_rows, None):
                norm_sums = [sums_of(block) for block in decoder.layers]
            hidden, _ = decoder(ids[:, -1:], cache=cache, norm_sums=norm_sums)
            return decoder.logits(hidden)

        return jax.jit(run)(model_params.cast(params, dtype), ids)

    require_close(logits("mosaic", jnp.bfloat16), logits("xla", jnp.bfloat16), logits("xla", jnp.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["falcon-rw-1b", "falcon-7b", "falcon-40b-alibi"])
def test_steps_give_the_same_bits_with_cuda_graphs_and_without(name, weights):
    if (reason := compat.mosaic_reason()) is not None:
        pytest.skip(reason)
    config = dataclasses.replace(PRESETS[name], num_layers=4, vocab_size=512)
    params = model_params.init(config, jax.random.key(0), jnp.bfloat16, weights=weights)
    ids = jax.random.randint(jax.random.key(1), (2, 65), 0, config.vocab_size)

    def hidden_states(**options):
        @functools.partial(jax.jit, **options)
        def run(params, ids):
            decoder = model_params.bind(config, params, ForwardOptions(stages="mosaic", concurrent=True))
            _, cache = decoder(ids, cache=KVCache.create(config, 2, 128, jnp.bfloat16), cache_is_empty=True)

            def step(_, carry):
                cache, _ = carry
                hidden, cache = decoder(ids[:, :1], cache=cache)
                return cache, hidden

            return jax.lax.fori_loop(0, 60, step, (cache, jnp.zeros((2, 1, config.width), jnp.bfloat16)))[1]

        return run(params, ids)

    plain = hidden_states(compiler_options=WITHOUT_CUDA_GRAPHS)
    assert jnp.array_equal(hidden_states(), plain)
    assert jnp.array_equal(hidden_states(compiler_options=WITH_LOOPS_IN_CUDA_GRAPHS | AT_THE_SAME_TIME), plain)
