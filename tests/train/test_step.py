import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.train import loss as train_loss
from falcon_jax.train import step as train_step
from falcon_jax.train.step import StepOptions
from tests import models
from tests.train import meshes

# One for as many tests as it serves: each other one is another compilation.
OPTIONS = StepOptions(compute_dtype="float32", loss_chunk_tokens=7, z_loss=0.1, ema_decay=0.999)
# Adam's first updates are signs of gradients, of rounding where these are next to nothing: a large epsilon damps it.
DROPPING = dataclasses.replace(OPTIONS, dropout=0.5, num_micro_batches=2, epsilon=1e-3)


@pytest.fixture(scope="module")
def model_config(model_config: FalconConfig) -> FalconConfig:
    """With a rate of its own, as checkpoints carry it: only the options' rate counts. One layer compiles faster."""
    return dataclasses.replace(model_config, hidden_dropout=0.9, num_layers=1)


def tokens_of(config: FalconConfig, rows: int = 8, columns: int = 17, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, columns)).astype(np.uint16)


@functools.partial(jax.jit, static_argnums=0)
def whole_logits(config: FalconConfig, params: model_params.Params, ids: jax.Array) -> jax.Array:
    decoder = model_params.bind(config, params, ForwardOptions())
    return decoder.logits(decoder(ids)[0])


def plain_nats(config: FalconConfig, params: model_params.Params, tokens: np.ndarray) -> np.ndarray:
    """Nats of each target from whole logits, in float64 numpy."""
    logits = np.asarray(whole_logits(config, params, tokens[:, :-1].astype(np.int32)), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, tokens[:, 1:, None].astype(int), -1)[..., 0]


def step_of(config: FalconConfig, options: StepOptions, mesh: Mesh | None = None):
    # Always with four arguments: functools.lru_cache takes a default that is given for another call.
    return train_step.make_train_step(config, options, ForwardOptions(), mesh)


def run(config: FalconConfig, options: StepOptions, mesh=None, num_steps: int = 3):
    state = train_step.init_state(config, options, seed=1, mesh=mesh)
    step = step_of(config, options, mesh)
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


def test_loss_and_gradient_are_those_of_the_plain_loss_with_z_loss(model_config: FalconConfig) -> None:
    params = model_params.init(model_config, jax.random.key(0), jnp.float32)
    tokens = tokens_of(model_config)

    def plain(params: model_params.Params) -> tuple[jax.Array, jax.Array]:
        decoder = model_params.bind(model_config, params, ForwardOptions())
        logits = decoder.logits(decoder(jnp.asarray(tokens[:, :-1], jnp.int32))[0])
        log_total = jax.nn.logsumexp(logits, -1)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None].astype(int), -1)[..., 0]
        return (log_total - chosen + 0.1 * log_total**2).mean(), (log_total - chosen).mean()

    gradient, loss = jax.jit(jax.grad(plain, has_aux=True))(params)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    state = train_step.init_state(model_config, OPTIONS, 0, params=params)
    step = step_of(model_config, OPTIONS)
    _, metrics = step(state, tokens, np.float32(1e-3))
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_eight_devices_train_as_one_and_drop_the_same(model_config: FalconConfig, cpu_devices: list) -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=cpu_devices)
    alone, losses = run(model_config, DROPPING)
    spread, spread_losses = run(model_config, DROPPING, mesh)
    np.testing.assert_allclose(spread_losses, losses, rtol=1e-5)
    query = spread["params"]["layers"][0]["attention"]["query"]["weight"]
    assert query.sharding.spec[:2] == (("fsdp", "data"), "tensor")
    moments = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, spread["optimizer"][1].mu))
    assert moments == jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, spread["params"]))
    for one, many in zip(jax.tree.leaves(alone["params"]), jax.tree.leaves(spread["params"]), strict=True):
        np.testing.assert_allclose(many, one, atol=1e-5)


def test_micro_batches_add_up_to_the_whole_batch(model_config: FalconConfig) -> None:
    _, whole = run(model_config, OPTIONS)
    _, parts = run(model_config, dataclasses.replace(OPTIONS, num_micro_batches=2))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_decay_spares_norms_biases_and_on_request_the_embedding(model_config: FalconConfig) -> None:
    params = model_params.abstract(model_config, jnp.float32)
    decayed = model_params.flatten(train_step.decay_mask(params, decay_embedding=False))
    assert {path for path, value in decayed.items() if value} == {
        f"layers.0.{name}.weight"
        for name in ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")
    }
    assert model_params.flatten(train_step.decay_mask(params, decay_embedding=True))["embed.weight"]


def test_the_average_of_weights_lags_behind_them(model_config: FalconConfig) -> None:
    state, _ = run(model_config, OPTIONS, num_steps=2)
    fresh = train_step.init_state(model_config, OPTIONS, seed=1)
    new, average, old = (tree["embed"]["weight"] for tree in (state["params"], state["ema"], fresh["params"]))
    assert 0 < float(jnp.abs(average - old).sum()) < float(jnp.abs(new - old).sum())


def test_a_step_that_is_not_finite_changes_no_weight_and_names_itself(model_config: FalconConfig) -> None:
    state, _ = run(model_config, OPTIONS, num_steps=2)
    state["params"]["final_norm"]["scale"] *= jnp.nan
    before = np.asarray(state["params"]["embed"]["weight"])
    step = step_of(model_config, OPTIONS)
    for _ in range(2):
        state, metrics = step(state, tokens_of(model_config), np.float32(1e-2))
    assert int(metrics["first_bad_step"]) == 2
    np.testing.assert_array_equal(state["params"]["embed"]["weight"], before)


def dropping_losses(config: FalconConfig, state: train_step.State, batches: list[np.ndarray]) -> list[float]:
    """Losses of steps that change nothing but the step's number; `state` is copied, not donated."""
    state = jax.tree.map(jnp.copy, state)
    step = step_of(config, DROPPING)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch, np.float32(0.0))
        losses.append(float(metrics["loss"]))
    return losses


def test_dropout_differs_by_step_and_by_micro_batch_and_comes_back_with_the_step(model_config: FalconConfig) -> None:
    state = train_step.init_state(model_config, DROPPING, seed=1)
    batch = tokens_of(model_config)
    exchanged = batch[[1, 0, 3, 2, 5, 4, 7, 6]]  # the rows of the two micro-batches
    first, second = dropping_losses(model_config, state, [batch, batch])
    assert first != second
    assert dropping_losses(model_config, state, [exchanged])[0] != first
    later = {**state, "step": jnp.ones((), jnp.int32)}
    assert dropping_losses(model_config, later, [batch]) == [second]


def test_evaluation_drops_nothing(model_config: FalconConfig) -> None:
    params = model_params.init(model_config, jax.random.key(0), jnp.float32)
    tokens, counts = tokens_of(model_config), np.full(8, 16, np.int32)
    evaluate = train_step.make_eval_step(model_config, DROPPING, ForwardOptions())
    np.testing.assert_allclose(evaluate(params, tokens, counts), plain_nats(model_config, params, tokens), rtol=1e-5)


def test_without_dropout_a_step_draws_nothing(model_config: FalconConfig) -> None:
    tokens = jax.ShapeDtypeStruct((8, 17), jnp.uint16)
    draws = []
    for options in (OPTIONS, DROPPING):
        step = step_of(model_config, options)
        state = train_step.abstract_state(model_config, options)
        draws.append("random_bits" in str(jax.make_jaxpr(step)(state, tokens, jnp.float32(0.0))))
    assert draws == [False, True]


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_micro_batches is 0"):
        StepOptions(num_micro_batches=0)
    with pytest.raises(ConfigError, match="ema_decay is 1"):
        StepOptions(ema_decay=1.0)
    with pytest.raises(ConfigError, match="dropout is 1"):
        StepOptions(dropout=1.0)
    with pytest.raises(ConfigError, match="compute_dtype is 'float8'"):
        StepOptions(compute_dtype="float8")
    for name, value in [("max_grad_norm", -1.0), ("weight_decay", float("nan")), ("z_loss", -1e-4), ("beta1", 2.0)]:
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            dataclasses.replace(OPTIONS, **{name: value})
    with pytest.raises(ConfigError, match="epsilon is 0"):
        StepOptions(epsilon=0.0)


def test_no_clipping_is_a_limit_that_no_gradient_reaches(model_config: FalconConfig) -> None:
    states = [run(model_config, dataclasses.replace(OPTIONS, max_grad_norm=limit))[0] for limit in (0.0, 1e9)]
    jax.tree.map(np.testing.assert_array_equal, *(state["params"] for state in states))


def test_micro_batches_that_are_not_used_change_nothing(model_config: FalconConfig) -> None:
    """Two of four by number, on the program of four, against the two alone."""
    four = tokens_of(model_config).reshape(4, 2, 17)
    states = []
    for tokens, num_used in ((four, np.int32(2)), (four[:2], None)):
        state = train_step.init_state(model_config, OPTIONS, seed=1)
        state, metrics = step_of(model_config, OPTIONS)(state, tokens, np.float32(1e-2), num_used)
        states.append((state, float(metrics["loss"])))
    assert states[0][1] == pytest.approx(states[1][1], rel=1e-6)
    moments = [jax.tree.leaves(state["optimizer"][1].mu) for state, _ in states]
    for one, other in zip(*moments, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)


@pytest.mark.parametrize("is_transposed", [True, False])
def test_the_fused_loss_has_the_gradients_of_the_plain_one(is_transposed: bool) -> None:
    """Leaf by leaf, in both forms of the head, with targets that do not count and a last piece that is not full."""
    R, T, D, V, z_loss = 3, 7, 16, 50, 0.3
    hidden = jax.random.normal(jax.random.key(0), (R, T, D))
    head = jax.random.normal(jax.random.key(1), (V, D) if is_transposed else (D, V))
    targets = jax.random.randint(jax.random.key(2), (R, T), 0, V)
    is_real = jax.random.bernoulli(jax.random.key(3), 0.7, (R, T))

    def plain(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logits = hidden @ (head.T if is_transposed else head)
        log_total = jax.nn.logsumexp(logits, -1)
        nats = log_total - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.where(is_real, nats + z_loss * log_total**2, 0).sum()

    def fused(hidden: jax.Array, head: jax.Array) -> jax.Array:
        loss_sums: Any = train_loss.loss_sums
        return loss_sums(hidden, head, is_transposed, targets, is_real, z_loss, 4)[0]

    value, gradients = jax.value_and_grad(plain, (0, 1))(hidden, head)
    found, found_gradients = jax.jit(jax.value_and_grad(fused, (0, 1)))(hidden, head)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    for one, other in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_logits_of_a_whole_batch_are_never_made(model_config: FalconConfig) -> None:
    options = dataclasses.replace(OPTIONS, loss_chunk_tokens=32)
    state, tokens = train_step.abstract_state(model_config, options), tokens_of(model_config)
    step: Any = step_of(model_config, options)
    compiled = step.lower(state, tokens, np.float32(0)).compile().as_text()
    V, num_tokens = model_config.vocab_size, tokens.shape[0] * (tokens.shape[1] - 1)
    sizes = {int(rows) for rows in re.findall(rf"[a-z]+\d+\[(\d+),{V}\]", compiled)}
    assert num_tokens > 32 and 32 in sizes
    assert not {size for size in sizes if size >= num_tokens and size != model_config.width}
    assert not re.search(rf"\[{tokens.shape[0]},{tokens.shape[1] - 1},{V}\]", compiled)


def test_float16_keeps_the_gradients_of_a_large_batch(model_config: FalconConfig) -> None:
    """Of 65,536 targets each one's share of the mean would be below what float16 can tell apart."""
    tokens = np.tile(tokens_of(model_config).astype(np.int32), (512, 1))[None]
    params = models.random_params(model_config)
    found: dict[str, Any] = {}
    for dtype in ("float32", "float16"):
        options = dataclasses.replace(OPTIONS, compute_dtype=dtype, z_loss=0.0)
        compute = jax.jit(train_step.make_gradients(model_config, options, ForwardOptions(), None))
        found[dtype] = model_params.flatten(compute(params, tokens, None, None)[0])
    for path in ("layers.0.mlp.up.weight", "layers.0.attention.value.weight", "embed.weight"):
        exact, rounded = (np.asarray(found[dtype][path]) for dtype in found)
        assert np.linalg.norm(rounded - exact) < 0.01 * np.linalg.norm(exact), path


@pytest.mark.parametrize("variant", ["falcon-rw-1b", "falcon-7b"])
def test_packed_documents_have_the_gradients_of_each_alone(variant: str) -> None:
    config, separator, sizes = models.tiny(variant, num_layers=2), 3, (7, 1, 9)
    params = models.random_params(config)
    generator = np.random.default_rng(0)
    documents = [np.r_[separator, generator.integers(4, config.vocab_size, size - 1)] for size in sizes]
    options = dataclasses.replace(OPTIONS, separator=separator)
    compute = jax.jit(train_step.make_gradients(config, options, ForwardOptions(), None))

    def gradient(tokens: np.ndarray) -> dict[str, np.ndarray]:
        found, _ = compute(params, jnp.asarray(tokens, jnp.int32)[None, None], None, None)
        return {path: np.asarray(leaf) for path, leaf in model_params.flatten(found).items()}

    packed = gradient(np.concatenate([*documents, [separator]]))
    alone = [gradient(np.r_[document, separator]) for document in documents]
    total = sum(sizes)
    expected = {
        path: np.sum([size / total * each[path] for size, each in zip(sizes, alone, strict=True)], axis=0)
        for path in packed
    }
    assert meshes.largest_gap(expected, packed) < 2e-5


@pytest.mark.parametrize("variant", ["falcon-40b-alibi", "falcon-7b"])
def test_packed_documents_are_read_as_each_alone(variant: str) -> None:
    config, separator = models.tiny(variant, num_layers=2), 3
    params = models.random_params(config)
    generator = np.random.default_rng(0)
    sizes = (7, 1, 9)
    documents = [np.r_[separator, generator.integers(4, config.vocab_size, size - 1)] for size in sizes]
    options = dataclasses.replace(OPTIONS, separator=separator)
    packed = np.concatenate([*documents, [separator]]).astype(np.uint16)
    evaluate = train_step.make_eval_step(config, options, ForwardOptions())
    nats = np.asarray(evaluate(params, packed[None], np.asarray([len(packed) - 1], np.int32)))[0]

    rows = np.full((3, len(packed)), 5, np.uint16)  # by themselves, each with the next one's separator as last target
    for row, document in zip(rows, documents, strict=True):
        row[: len(document) + 1] = [*document, separator]
    alone = np.asarray(evaluate(params, rows, np.asarray(sizes, np.int32)))
    expected = np.concatenate([row[:size] for row, size in zip(alone, sizes, strict=True)])
    np.testing.assert_allclose(nats, expected, atol=1e-5)
    together = train_step.make_eval_step(config, OPTIONS, ForwardOptions())
    assert np.abs(together(params, packed[None], np.asarray([17], np.int32))[0] - nats)[8:].max() > 1e-2
