"""Dropout of what blocks add: read off blocks that add exactly one to every entry."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import FalconDecoder
from falcon_jax.model.step import ForwardOptions, Step, spans
from tests import models

B, T = 4, 32
PARALLEL, SEQUENTIAL = "falcon-7b", "falcon-rw-1b"


def config_of(variant: str, rate: float) -> FalconConfig:
    return models.tiny(variant, bias=True, hidden_dropout=rate, num_layers=2)


def bind(config: FalconConfig) -> FalconDecoder:
    """All weights are 0 but norms, whose scales are 1, and biases: a block's attention adds 1, and its MLP too."""
    params = {}
    for path, leaf in model_params.flatten(model_params.abstract(config, "float32")).items():
        is_one = path.endswith((".scale", "attention.output.bias", "mlp.down.bias"))
        params[path] = jnp.full(leaf.shape, float(is_one))
    return model_params.bind(config, model_params.unflatten(params), ForwardOptions())


@functools.partial(jax.jit, static_argnums=0)
def hidden(config: FalconConfig, key: jax.Array | None) -> jax.Array:
    return bind(config)(jnp.zeros((B, T), jnp.int32), dropout_key=key)[0]


@functools.partial(jax.jit, static_argnums=0)
def _added(config: FalconConfig, key: jax.Array | None) -> jax.Array:
    step = Step.begin(config, ForwardOptions(), T, *spans(None, B, T, None))
    x = jnp.zeros((B, T, config.width))
    return bind(config).layers[0](x, dataclasses.replace(step, dropout_key=key), None)[0]


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
