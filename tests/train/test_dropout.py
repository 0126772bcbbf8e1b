"""Dropout of what blocks add: read off blocks that add exactly one to every entry."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model.step import ForwardOptions, Step, spans
from falcon_jax.train.forward import Forward, row_keys
from falcon_jax.train.weights import placements
from tests import models

B, T = 4, 32
PARALLEL, SEQUENTIAL = "falcon-7b", "falcon-rw-1b"


def config_of(variant: str, rate: float) -> FalconConfig:
    return models.tiny(variant, bias=True, hidden_dropout=rate, num_layers=2)


def params_of(config: FalconConfig) -> model_params.Params:
    """All weights are 0 but norms, whose scales are 1, and biases: a block's attention adds 1, and its MLP too."""
    params = {}
    for path, leaf in model_params.flatten(model_params.abstract(config, "float32")).items():
        is_one = path.endswith((".scale", "attention.output.bias", "mlp.down.bias"))
        params[path] = jnp.full(leaf.shape, float(is_one))
    return model_params.unflatten(params)


@functools.partial(jax.jit, static_argnums=0)
def hidden(config: FalconConfig, key: jax.Array | None) -> jax.Array:
    """What training computes, [B, T, D]."""
    run = Forward(config, ForwardOptions(), None, separator=None, splits_sequence=False)
    params = params_of(config)
    sinks = jax.tree.map(jnp.zeros_like, params)
    keys = None if key is None else row_keys(key, jnp.arange(B, dtype=jnp.int32))
    return run.hidden(params, sinks, placements(params, None), jnp.zeros((B, T), jnp.int32), keys)


@functools.partial(jax.jit, static_argnums=0)
def _added(config: FalconConfig, key: jax.Array | None) -> jax.Array:
    step = Step.begin(config, ForwardOptions(), T, *spans(None, B, T, None))
    keys = None if key is None else row_keys(key, jnp.arange(B, dtype=jnp.int32))
    x = jnp.zeros((B, T, config.width))
    block = model_params.bind_block(config, params_of(config)["layers"][0])
    return block(x, dataclasses.replace(step, dropout_keys=keys), None)[0]


def added(config: FalconConfig, key: jax.Array | None) -> np.ndarray:
    """What the first block adds to the residual [B, T, D]."""
    return np.asarray(_added(config, key))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_honoured_and_the_expectation_kept(rate: float) -> None:
    values = added(config_of(PARALLEL, rate), jax.random.key(3))
    deviation = (rate * (1 - rate) / values.size) ** 0.5
    assert abs((values == 0).mean() - rate) < 4 * deviation
    np.testing.assert_allclose(values[values != 0], 2 / (1 - rate), rtol=1e-6)  # attention and MLP drop together
    assert abs(values.mean() / 2 - 1) < 4 * deviation / (1 - rate)


def test_the_two_halves_of_a_sequential_block_drop_by_themselves() -> None:
    values = added(config_of(SEQUENTIAL, 0.5), jax.random.key(3))
    shares = [(values == value).mean() for value in (0, 2, 4)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.03)
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("variant", [PARALLEL, SEQUENTIAL])
def test_nothing_is_dropped_without_a_key_or_at_rate_zero(variant: str) -> None:
    np.testing.assert_array_equal(added(config_of(variant, 0.5), None), 2)
    np.testing.assert_array_equal(added(config_of(variant, 0.0), jax.random.key(3)), 2)


def test_layers_and_keys_drop_differently_and_a_key_always_the_same() -> None:
    config = config_of(PARALLEL, 0.5)
    first, again, other = (np.asarray(hidden(config, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # Neither layer, one or both added 4 to an entry; were the masks one, only none and both would be.
    assert len(np.unique(np.round(first[0, 0], 3))) == 3


def test_what_a_row_drops_depends_on_no_other_row() -> None:
    config = config_of(PARALLEL, 0.5)
    values = added(config, jax.random.key(0))
    assert not np.array_equal(values[0], values[1])
    keys = row_keys(jax.random.key(0), jnp.arange(2, 3, dtype=jnp.int32))  # the third row by itself
    step = Step.begin(config, ForwardOptions(), T, *spans(None, 1, T, None))
    block = model_params.bind_block(config, params_of(config)["layers"][0])
    alone, _ = block(jnp.zeros((1, T, config.width)), dataclasses.replace(step, dropout_keys=keys), None)
    np.testing.assert_array_equal(alone[0], values[2])
