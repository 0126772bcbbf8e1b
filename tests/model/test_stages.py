"""A few tokens through fused stages: the same numbers as through plain layers, for every variant."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.config import PRESETS, FalconConfig
from falcon_jax.model import beside, stages
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import KVCache
from falcon_jax.model.step import ForwardOptions, Step, spans
from pallas_kernels.quantized_matmul import deferred
from tests.models import VARIANTS, random_params, tiny
from tests.pallas_kernels.interpreted import interpreted
from tests.pallas_kernels.tolerance import require_close
from tests.thorough import thorough

PROMPT = 5  # tokens before


@functools.partial(jax.jit, static_argnames="config")
def prefilled(config, params, ids, cache):
    decoder = model_params.bind(config, params)
    return decoder(ids, cache=cache, cache_is_empty=True)[1]


@functools.partial(jax.jit, static_argnames=("config", "implementation", "options"))
def through_stages(config, params, cache, ids, num_tokens, implementation, options=None, norm_sums=None):
    options = options or ForwardOptions()
    decoder = model_params.bind(config, params, options)
    offsets, ends = spans(cache, ids.shape[0], ids.shape[1], num_tokens)
    step = Step.begin(config, options, ids.shape[1], offsets, ends, cache)
    return stages.run(decoder, decoder.token_vectors(ids), step, cache, implementation, norm_sums=norm_sums)


@functools.partial(jax.jit, static_argnames="config")
def through_layers(config, params, cache, ids, num_tokens):
    decoder = model_params.bind(config, params, ForwardOptions(stages="xla"))
    hidden, filled = decoder(ids, cache=cache, num_tokens=num_tokens)
    assert filled is not None
    return hidden, list(zip(filled.keys, filled.values, strict=True))


def start(config: FalconConfig, num_rows: int, num_columns: int, dtype, weights: str = "native"):
    if weights == "native":
        params = random_params(config, dtype=dtype)
    else:
        params = model_params.init(config, jax.random.key(0), dtype, weights=weights)
    ids = jax.random.randint(jax.random.key(2), (num_rows, PROMPT + num_columns), 0, config.vocab_size)
    cache = prefilled(config, params, ids[:, :PROMPT], KVCache.create(config, num_rows, 16, dtype))
    return params, cache, ids[:, PROMPT:]


SINGLE, DRAFTS, FEW_DRAFTS = (3, 1), (2, 4), (2, 3)
NAMES = ("falcon-rw-1b", "falcon-7b", "falcon-40b", "falcon-40b-alibi")


@pytest.mark.parametrize(
    ("name", "shape"), [(name, SINGLE) for name in VARIANTS] + [("falcon-rw-1b", DRAFTS), ("falcon-40b", DRAFTS)]
)
def test_stages_equal_the_layers(name, shape):
    require_equal_layers(tiny(name), shape)


@pytest.mark.parametrize(
    ("name", "shape"), [(name, SINGLE) for name in NAMES] + [("falcon-40b", FEW_DRAFTS), ("falcon-rw-1b", FEW_DRAFTS)]
)
def test_stages_whose_norms_end_where_they_are_read_equal_the_layers(monkeypatch, name, shape):
    config, begun, begin = small(name), [], deferred.begin

    def noted(*arguments):
        begun.append(arguments)
        return begin(*arguments)

    monkeypatch.setattr(deferred, "reason_against_kernel", lambda: None)  # what runs here is XLA's form
    monkeypatch.setattr(deferred, "begin", noted)
    require_equal_layers(config, shape)
    # All but the final one: the first layer's, and what its stages make.
    assert len(begun) == (config.num_layers if config.block == "parallel" else 2 * config.num_layers)


def require_equal_layers(config, shape):
    params, cache, ids = start(config, shape[0], shape[1], jnp.float32)
    num_tokens = jnp.asarray([shape[1]] * (shape[0] - 1) + [0])  # the last row has ended
    made, kept = through_stages(config, params, cache, ids, num_tokens, "xla")
    expected, expected_kept = through_layers(config, params, cache, ids, num_tokens)
    living = slice(0, shape[0] - 1)
    np.testing.assert_allclose(made[living], expected[living], atol=2e-5)
    for some, others in zip(jax.tree.leaves(kept), jax.tree.leaves(expected_kept), strict=True):
        np.testing.assert_allclose(some[living], others[living], atol=2e-5)


@pytest.mark.parametrize("name", ["falcon-rw-1b", "falcon-40b", "falcon-40b-alibi"])
def test_prompts_through_stages_equal_the_layers(name):
    config = tiny(name)
    params, cache, ids = start(config, 2, 9, jnp.float32)
    ids, num_tokens = jnp.tile(ids, (1, 4)), jnp.asarray([36, 30])  # more rows than are streamed
    cache = KVCache.create(config, 2, 64, jnp.float32)
    made, kept = through_stages(config, params, cache, ids, num_tokens, "xla")
    expected, expected_kept = through_layers(config, params, cache, ids, num_tokens)
    np.testing.assert_allclose(made[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(made[1, :30], expected[1, :30], atol=2e-5)
    for some, others in zip(jax.tree.leaves(kept), jax.tree.leaves(expected_kept), strict=True):
        np.testing.assert_allclose(some[0, :36], others[0, :36], atol=2e-5)


def small(name: str) -> FalconConfig:
    """A variant whose widths are multiples of 64, in two layers."""
    heads = {"falcon-rw-1b": (2, 2), "falcon-7b": (3, 1), "falcon-40b": (4, 2), "falcon-40b-alibi": (2, 1)}[name]
    size = 128 if name == "falcon-40b-alibi" else 64
    return dataclasses.replace(
        PRESETS[name],
        num_layers=2,
        vocab_size=64,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        width=heads[0] * size,
        mlp_width=256,
    )


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("falcon-rw-1b", "native"),
        ("falcon-7b", "int4"),
        *thorough([("falcon-40b", "native"), ("falcon-40b", "int4"), ("falcon-40b-alibi", "int8")]),
    ],
)
def test_kernels_stay_within_twice_the_error_of_xla(name, weights):
    config = small(name)
    params, cache, ids = start(config, 3, 1, jnp.bfloat16, weights)
    num_tokens = jnp.ones(3, jnp.int32)
    with interpreted():
        made, _ = jax.block_until_ready(through_stages(config, params, cache, ids, num_tokens, "mosaic"))
    plain, _ = through_stages(config, params, cache, ids, num_tokens, "xla")
    cache = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, cache)
    exact, _ = through_stages(config, model_params.cast(params, jnp.float32), cache, ids, num_tokens, "xla")
    require_close(made, plain, exact)


@pytest.mark.parametrize(
    ("name", "weights", "num_rows", "implementation"),
    [
        ("falcon-40b-alibi", "int4", 2, "xla"),
        ("falcon-40b", "int4", 4, "xla"),
        *thorough([("falcon-40b-alibi", "int4", 2, "mosaic"), ("falcon-rw-1b", "int8", 3, "mosaic")]),
        *thorough([("falcon-40b", "int4", 3, "mosaic")]),
    ],
)
def test_input_stages_that_read_integers(monkeypatch, name, weights, num_rows, implementation):
    config = dataclasses.replace(small(name), max_tokens=47)  # no other test's, whose traces would be taken
    params, cache, ids = start(config, num_rows, 1, jnp.bfloat16, weights)
    arguments, num_tokens = (config, params, cache, ids), jnp.ones(num_rows, jnp.int32)
    monkeypatch.setattr(deferred, "reason_against_kernel", lambda: None)
    by_itself = stages.integers_pay
    monkeypatch.setattr(stages, "integers_pay", lambda config, weights: False)
    plain, _ = through_stages(*arguments, num_tokens, "xla")
    exact_cache = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, cache)
    exact, _ = through_stages(config, model_params.cast(params, jnp.float32), exact_cache, ids, num_tokens, "xla")
    jax.clear_caches()
    read, project = [], stages.project

    def noted(products, **options):
        read.append({getattr(product.x, "num_held", None) for product in products})
        return project(products, **options)

    reads_integers = by_itself if config.block == "parallel" else lambda config, weights: True
    monkeypatch.setattr(stages, "integers_pay", reads_integers)
    sums = None
    if num_rows > 2 and config.block == "parallel":
        blocks = [model_params.bind_block(config, params["layers"][i]) for i in range(config.num_layers)]
        sums = [stages.norm_sums(block, "xla") for block in blocks]
    monkeypatch.setattr(stages, "project", noted)
    with interpreted() if implementation == "mosaic" else contextlib.nullcontext():
        made, _ = jax.block_until_ready(through_stages(*arguments, num_tokens, implementation, norm_sums=sums))
    assert read and all(held == {4 if num_rows <= 2 or sums else 8} for held in read)
    require_close(made, plain, exact)


def test_attention_beside_the_mlp_changes_nothing_else(monkeypatch):
    config = dataclasses.replace(small("falcon-7b"), num_layers=1)
    params, cache, ids = start(config, 3, 1, jnp.bfloat16)
    launches, project = [], stages.project

    def noted(products, *, num_sms, **options):
        launches.append((len(products), num_sms))
        return project(products, num_sms=num_sms, **options)

    arguments = config, params, cache, ids, jnp.ones(3, jnp.int32)
    together = through_stages(*arguments, "xla")[0].astype(jnp.float32)
    monkeypatch.setattr(beside, "attention_sms", lambda *shape: 1)
    monkeypatch.setattr(stages, "project", noted)
    with interpreted():
        apart = jax.block_until_ready(through_stages(*arguments, "mosaic", ForwardOptions(concurrent=True))[0])
    # One of the two multiprocessors that interpreted kernels see is attention's.
    assert launches == [(3, None), (1, 1)]
    np.testing.assert_allclose(apart.astype(jnp.float32), together, atol=0.02 * np.abs(together).max())


def test_where_each_query_head_has_keys_of_its_own_projections_and_attention_are_one_launch(monkeypatch):
    config = dataclasses.replace(small("falcon-rw-1b"), num_layers=1)
    params, cache, ids = start(config, 1, 1, jnp.bfloat16)
    launches, project = [], stages.project

    def noted(products, **options):
        launches.append(len(products))
        return project(products, **options)

    arguments, num_tokens = (config, params, cache, ids), jnp.ones(1, jnp.int32)
    made_by_xla = through_stages(*arguments, num_tokens, "xla")
    exact_cache = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, cache)
    exact = through_stages(config, model_params.cast(params, jnp.float32), exact_cache, ids, num_tokens, "xla")
    monkeypatch.setattr(stages, "project", noted)
    with interpreted():
        made = jax.block_until_ready(through_stages(*arguments, num_tokens, "mosaic"))
    # The MLP's product; and queries, keys and values where no norm ends in a kernel.
    assert launches == ([1] if deferred.reason_against_kernel() is None else [3, 1])
    for some, plain, right in zip(*map(jax.tree.leaves, (made, made_by_xla, exact)), strict=True):
        require_close(some, plain, right)


def test_kernels_asked_for_by_name_are_used_or_refused():
    config = tiny("falcon-7b")
    params, cache, ids = start(config, 1, 1, jnp.float32)
    decoder = model_params.bind(config, params, ForwardOptions(stages="mosaic"))
    with pytest.raises(NotImplementedError, match="stages='mosaic' cannot run here: it needs a Hopper GPU"):
        decoder(ids, cache=cache)
    with pytest.raises(ValueError, match="stages='fast' is unknown"):
        ForwardOptions(stages="fast")
