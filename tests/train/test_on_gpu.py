"""Training steps as a GPU runs them, by the kernels in bfloat16: right, and the same bits every time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.config import PRESETS, FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import step as train_step
from falcon_jax.train.step import StepOptions

pytestmark = pytest.mark.gpu

VARIANTS = ["falcon-rw-1b", "falcon-7b", "falcon-40b", "falcon-40b-alibi"]
SEPARATOR, REPEATS = 3, 20
PACKED = StepOptions(separator=SEPARATOR)


def config_of(variant: str) -> FalconConfig:
    """Two layers of the heads of a published model, a small vocabulary."""
    return dataclasses.replace(PRESETS[variant], num_layers=2, vocab_size=1024)


def tokens_of(config: FalconConfig, num_rows: int = 2, length: int = 640) -> np.ndarray:
    """As text has them: half of all tokens are a few, and documents end now and then."""
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.zipf(1.3, (1, num_rows, length + 1)), config.vocab_size - 1)
    return np.where(generator.random(tokens.shape) < 0.01, SEPARATOR, tokens).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_steps_gradients_are_those_of_float32_without_kernels(variant: str) -> None:
    config = config_of(variant)
    params, tokens = model_params.init(config, jax.random.key(0), jnp.float32), tokens_of(config)

    def gradients(dtype: str, attention: str | None) -> tuple[dict[str, np.ndarray], float]:
        options = dataclasses.replace(PACKED, compute_dtype=dtype)
        compute = jax.jit(train_step.make_gradients(config, options, ForwardOptions(attention=attention), None))
        found, (loss, _) = compute(params, tokens, None, None)
        return {path: np.asarray(leaf) for path, leaf in model_params.flatten(found).items()}, float(loss)

    exact, loss = gradients("float32", "xla")
    plain, _ = gradients("bfloat16", "xla")
    ours, our_loss = gradients("bfloat16", None)
    assert our_loss == pytest.approx(loss, rel=1e-2)
    largest = max(np.linalg.norm(leaf) for leaf in exact.values())
    for path, leaf in exact.items():
        # A bias that all keys share has no gradient but rounding.
        allowed = 2 * np.linalg.norm(plain[path] - leaf) + 1e-5 * largest
        assert np.linalg.norm(ours[path] - leaf) <= allowed, path


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_gives_the_same_bits_every_time(variant: str) -> None:
    config = config_of(variant)
    step = train_step.make_train_step(config, PACKED, ForwardOptions(), None)
    begin = functools.partial(train_step.init_state, config, PACKED, 0)
    tokens = tokens_of(config, num_rows=8)
    first, _ = step(begin(), tokens, np.float32(1e-3))
    for _ in range(REPEATS):
        again, _ = step(begin(), tokens, np.float32(1e-3))
        same = jax.tree.map(lambda one, other: bool((one == other).all()), first["params"], again["params"])
        assert all(jax.tree.leaves(same))
