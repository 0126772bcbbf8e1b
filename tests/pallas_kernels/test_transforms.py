"""The kernels inside what JAX makes of functions: vmap, jit, grad, and a whole model that runs on them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.generate.engine import Engine
from falcon_jax.generate.sampling import Sampling
from falcon_jax.model.step import ForwardOptions
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import attention
from tests.models import random_params, tiny
from tests.pallas_kernels.interpreted import interpreted
from tests.thorough import thorough

H = 64


def draw(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def check(ours, theirs):
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        found, expected = (np.asarray(x, np.float32) for x in (found, expected))
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)


def by_kernel_and_by_xla(function, *arrays):
    """function(implementation, *arrays), vmapped over all arrays and compiled, both ways."""
    with interpreted():
        ours = jax.block_until_ready(jax.jit(jax.vmap(functools.partial(function, "mosaic")))(*arrays))
    return ours, jax.jit(jax.vmap(functools.partial(function, "xla")))(*arrays)


def test_attention_and_its_gradients_under_vmap():
    q, k, v = draw(2, 1, 20, 2, H, seed=0), draw(2, 1, 20, 1, H, seed=1), draw(2, 1, 20, 1, H, seed=2)
    lengths = jnp.asarray([[20], [7]], jnp.int32)

    def run(implementation, q, k, v, lengths):
        def attend(q, k, v):
            return attention(q, k, v, lengths=lengths, slopes=jnp.asarray([0.5, 0.1]), implementation=implementation)

        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(jnp.cos(out))

    check(*by_kernel_and_by_xla(run, q, k, v, lengths))


def test_decode_attention_under_vmap():
    q, keys, values = draw(2, 1, 4, H, seed=0), draw(2, 1, 72, 2, H, seed=1), draw(2, 1, 72, 2, H, seed=2)
    lengths = jnp.asarray([[70], [3]], jnp.int32)

    def run(implementation, q, keys, values, lengths):
        return decode_attention(q, keys, values, lengths=lengths, implementation=implementation)

    check(*by_kernel_and_by_xla(run, q, keys, values, lengths))


@pytest.mark.parametrize(("name", "num_kv_heads"), [("falcon-40b", 1), *thorough([("falcon-rw-1b", 2)])])
def test_a_model_generates_the_same_with_kernels(name, num_kv_heads):
    """Prefill, decoding and scoring of ragged rows, one of which ends early."""
    config = tiny(name, num_layers=1, num_heads=2, num_kv_heads=num_kv_heads, width=2 * H, eos_token_ids=())
    params = random_params(config, dtype="bfloat16")
    prompts, found = [[5, 17, 3, 90, 41], [60]], {}
    for implementation in ("mosaic", "xla"):
        with interpreted() if implementation == "mosaic" else contextlib.nullcontext():
            engine = Engine(config, params, ForwardOptions(attention=implementation))
            generation = engine.start(prompts, max_new_tokens=4, sampling=Sampling())
            chunks = [generation.next_chunk(1)]
            generation.stop(1)
            while not generation.finished:
                chunks.append(generation.next_chunk())
            logits = engine.logits(np.asarray([prompts[0]], np.int32), np.asarray([5], np.int32))
            found[implementation] = chunks, jax.block_until_ready(logits)
    (chunks, logits), (expected_chunks, expected_logits) = found["mosaic"], found["xla"]
    assert [tokens for tokens, _ in chunks] == [tokens for tokens, _ in expected_chunks]
    scale = np.std(expected_logits)
    np.testing.assert_allclose(logits / scale, expected_logits / scale, atol=0.05)
