import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.train import step as train_step
from falcon_jax.train.step import StepOptions

OPTIONS = StepOptions(compute_dtype="float32", loss_chunk_tokens=7)


def tokens_of(config: FalconConfig, rows: int = 8, columns: int = 17, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, columns)).astype(np.uint16)


def plain_nats(config: FalconConfig, params: model_params.Params, tokens: np.ndarray) -> np.ndarray:
    """Nats of each target from whole logits, in float64 numpy."""
    decoder = model_params.bind(config, params, ForwardOptions())
    logits = np.asarray(decoder.logits(decoder(jnp.asarray(tokens[:, :-1], jnp.int32))[0]), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, tokens[:, 1:, None].astype(int), -1)[..., 0]


def run(config: FalconConfig, options: StepOptions, mesh=None, num_steps: int = 3):
    state = train_step.init_state(config, options, seed=1, mesh=mesh)
    step = train_step.make_train_step(config, options, ForwardOptions(), mesh)
    losses = []
    for number in range(num_steps):
        batch = tokens_of(config, seed=number)
        if mesh is not None:
            batch = jax.device_put(batch, sharding.batch_sharding(batch.shape, mesh))
        state, metrics = step(state, batch, np.float32(1e-2))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_the_loss_made_in_slices_is_the_loss_of_whole_logits(model_config: FalconConfig) -> None:
    params = model_params.init(model_config, jax.random.key(0), jnp.float32)
    tokens = tokens_of(model_config)
    counts = np.asarray([16, 3, 0, 7, 8, 1, 15, 16], np.int32)
    evaluate = train_step.make_eval_step(model_config, OPTIONS, ForwardOptions())
    expected = plain_nats(model_config, params, tokens) * (np.arange(16) < counts[:, None])
    np.testing.assert_allclose(evaluate(params, tokens, counts), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_plain_loss_with_z_loss(model_config: FalconConfig) -> None:
    options = StepOptions(compute_dtype="float32", loss_chunk_tokens=5, z_loss=0.1, max_grad_norm=1e9)
    params = model_params.init(model_config, jax.random.key(0), jnp.float32)
    tokens = jnp.asarray(tokens_of(model_config), jnp.int32)

    def plain(params: model_params.Params) -> jax.Array:
        decoder = model_params.bind(model_config, params, ForwardOptions())
        logits = decoder.logits(decoder(tokens[:, :-1])[0])
        log_total = jax.nn.logsumexp(logits, -1)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return (log_total - chosen + 0.1 * log_total**2).mean()

    expected = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(plain)(params)))))
    state = train_step.init_state(model_config, options, 0, params=params)
    step = train_step.make_train_step(model_config, options, ForwardOptions())
    _, metrics = step(state, np.asarray(tokens), np.float32(1e-3))
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-4)


def test_eight_devices_train_as_one(model_config: FalconConfig, cpu_devices: list) -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=cpu_devices)
    alone, losses = run(model_config, OPTIONS)
    spread, spread_losses = run(model_config, OPTIONS, mesh)
    np.testing.assert_allclose(spread_losses, losses, rtol=1e-5)
    query = spread["params"]["layers"][0]["attention"]["query"]["weight"]
    assert query.sharding.spec[:2] == ("fsdp", "tensor")
    moments = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, spread["optimizer"][1].mu))
    assert moments == jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, spread["params"]))
    for one, many in zip(jax.tree.leaves(alone["params"]), jax.tree.leaves(spread["params"]), strict=True):
        np.testing.assert_allclose(many, one, atol=2e-4)


def test_micro_batches_add_up_to_the_whole_batch(model_config: FalconConfig) -> None:
    _, whole = run(model_config, OPTIONS)
    _, parts = run(model_config, StepOptions(**{**vars(OPTIONS), "num_micro_batches": 4}))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_decay_spares_norms_biases_and_on_request_the_embedding(model_config: FalconConfig) -> None:
    params = model_params.abstract(model_config, jnp.float32)
    decayed = model_params.flatten(train_step.decay_mask(params, decay_embedding=False))
    assert {path for path, value in decayed.items() if value} == {
        f"layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")
    }
    assert model_params.flatten(train_step.decay_mask(params, decay_embedding=True))["embed.weight"]


def test_the_average_of_weights_lags_behind_them(model_config: FalconConfig) -> None:
    state, _ = run(model_config, StepOptions(**{**vars(OPTIONS), "ema_decay": 0.999}), num_steps=2)
    fresh = train_step.init_state(model_config, OPTIONS, seed=1)
    new, average, old = (tree["embed"]["weight"] for tree in (state["params"], state["ema"], fresh["params"]))
    assert 0 < float(jnp.abs(average - old).sum()) < float(jnp.abs(new - old).sum())


def test_a_step_that_is_not_finite_changes_no_weight_and_names_itself(model_config: FalconConfig) -> None:
    state, _ = run(model_config, OPTIONS, num_steps=2)
    state["params"]["final_norm"]["scale"] = state["params"]["final_norm"]["scale"].at[0].set(jnp.nan)
    before = np.asarray(state["params"]["embed"]["weight"])
    step = train_step.make_train_step(model_config, OPTIONS, ForwardOptions())
    for _ in range(2):
        state, metrics = step(state, tokens_of(model_config), np.float32(1e-2))
    assert int(metrics["first_bad_step"]) == 2
    np.testing.assert_array_equal(state["params"]["embed"]["weight"], before)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_micro_batches is 0"):
        StepOptions(num_micro_batches=0)
    with pytest.raises(ConfigError, match="ema_decay is 1"):
        StepOptions(ema_decay=1.0)
