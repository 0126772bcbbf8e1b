"""Adapters: what they add, their gradients, and steps that train them and nothing else."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.errors import ConfigError
from falcon_jax.model import adapters as model_adapters
from falcon_jax.model import params as model_params
from falcon_jax.model import quantize
from falcon_jax.model.adapters import LoRA
from falcon_jax.model.cache import KVCache
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import lora as train_lora
from falcon_jax.train.loss import cross_entropy
from falcon_jax.train.step import StepOptions
from tests import models
from tests.models import native_again

CONFIG = models.tiny("falcon-40b")  # grouped heads: all projections differ in shape
EVERYWHERE = LoRA(4, 8.0, ("query_key_value", "output", "up", "down"))
OPTIONS = StepOptions(compute_dtype="float32", weight_decay=0.0, loss_chunk_tokens=12)
MODEL = train_lora.AdaptedModel(CONFIG, EVERYWHERE, OPTIONS, ForwardOptions(remat="block"))
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 14))


@pytest.fixture(scope="module")
def frozen():
    return models.random_params(CONFIG)


def random_adapters(lora=EVERYWHERE, seed=1):
    """With a b that is not zero."""
    rng = np.random.default_rng(seed)
    leaves = model_params.flatten(model_adapters.abstract(CONFIG, lora))
    made = {path: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)) for path, leaf in leaves.items()}
    return model_params.unflatten(made)


def in_few_bits(params, form):
    leaves = {}
    for path, leaf in model_params.flatten(params).items():
        parts = quantize.described(path, leaf.shape, leaf.dtype, form)
        leaves |= quantize.on_device(path, leaf, form, dict.fromkeys(parts))
    return model_params.unflatten(leaves)


def plain_nats(params, tokens):
    """Of a model without adapters, and the logarithms of the softmax's denominators; all logits at once."""
    decoder = model_params.bind(CONFIG, params)
    return cross_entropy(decoder.logits(decoder(tokens[:, :-1])[0]), tokens[:, 1:])


def plain_loss(params, tokens):
    nats, log_total = plain_nats(params, tokens)
    return jnp.mean(nats + OPTIONS.z_loss * log_total**2), nats


# One executable for the tests that differ only in numbers.
gradients = jax.jit(train_lora.gradients, static_argnums=0)
plain_gradients = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))


def assert_close(left, right, tolerance=2e-5):
    left, right = model_params.flatten(left), model_params.flatten(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        largest = float(jnp.max(jnp.abs(right[path])))
        np.testing.assert_allclose(leaf, right[path], rtol=0, atol=tolerance * largest, err_msg=path)


def test_gradients_are_those_of_the_merged_weights_seen_through_the_other_factor(frozen):
    adapters, scale = random_adapters(), EVERYWHERE.scale
    grads, sums = gradients(MODEL, adapters, frozen, TOKENS[None])
    merged = model_adapters.merge(frozen, adapters, EVERYWHERE)
    (value, _), of_weights = plain_gradients(merged, TOKENS)
    np.testing.assert_allclose(sums.nats + OPTIONS.z_loss * sums.squares, value, rtol=1e-6)
    of_weights = model_params.flatten(of_weights)
    expected = dict.fromkeys(model_params.flatten(adapters), jnp.zeros(()))
    for projection, (a, b) in model_adapters.pairs(adapters).items():
        shared = re.sub(r"(query|key|value)$", "query_key_value", projection)
        rank = b.shape[0]
        of_weight = of_weights[f"{projection}.weight"].reshape(a.size // rank, -1)
        expected[f"{projection}.b"] = scale * (a.reshape(-1, rank).T @ of_weight).reshape(b.shape)
        expected[f"{shared}.a"] += scale * (of_weight @ b.reshape(rank, -1).T).reshape(a.shape)
    assert_close(grads, model_params.unflatten(expected))


def test_fresh_adapters_change_nothing_and_others_do(frozen):
    fresh = train_lora.init_state(MODEL, seed=0)["params"]
    for path, leaf in model_params.flatten(fresh).items():
        assert bool(jnp.any(leaf)) == path.endswith(".a"), path
    evaluate, counts = train_lora.make_eval_step(MODEL), np.array([13, 13, 5, 13])
    nats = evaluate(fresh, frozen, TOKENS, counts)
    (_, plain), _ = plain_gradients(frozen, TOKENS)
    expected = np.where(np.arange(13) < counts[:, None], plain, 0.0)
    np.testing.assert_allclose(nats, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(evaluate(random_adapters(), frozen, TOKENS, counts) - nats)).max() > 0.1


def result_shapes_of_products(compiled):
    """Sorted dimensions of all that XLA multiplies matrices into, but those of 1."""
    found = re.findall(r"= \w+\[([\d,]+)\][^=\n]* (?:dot|custom-call)\(", compiled.as_text())
    return {tuple(sorted(int(size) for size in dims.split(",") if size != "1")) for dims in found}


def test_no_product_of_the_step_is_a_frozen_weights_gradient(frozen):
    """Not even a matrix of its size: the same search finds them all where they are asked for."""
    D, F, V = CONFIG.width, CONFIG.mlp_width, CONFIG.vocab_size
    kv = CONFIG.num_kv_heads * CONFIG.head_dim
    weights = {(D, D), (kv, D), (D, F), (D, V)}
    adapters = random_adapters()
    ours = gradients.lower(MODEL, adapters, frozen, TOKENS[None]).compile()
    everything = plain_gradients.lower(frozen, TOKENS).compile()
    assert weights & result_shapes_of_products(ours) == set()
    assert weights <= result_shapes_of_products(everything)


def test_weights_of_few_bits_pass_gradients_as_what_they_stand_for(frozen):
    adapters = random_adapters()
    few = in_few_bits(frozen, "int8")
    grads, _ = gradients(MODEL, adapters, few, TOKENS[None])
    expected, _ = gradients(MODEL, adapters, native_again(few, CONFIG), TOKENS[None])
    assert_close(grads, expected, tolerance=1e-4)


def test_steps_lower_the_loss_and_leave_the_frozen_model_alone(frozen):
    """In bfloat16 on weights of 4 bits, two micro-batches, of which a step may use the first alone."""
    options = dataclasses.replace(OPTIONS, compute_dtype="bfloat16", num_micro_batches=2, ema_decay=0.9)
    model = dataclasses.replace(MODEL, options=options)
    base = in_few_bits(model_params.cast(frozen, "bfloat16"), "int4")
    before = jax.tree.map(np.asarray, base)
    step, state = train_lora.make_train_step(model), train_lora.init_state(model, seed=0)
    both, first = np.int32(2), np.int32(1)
    losses = []
    for _ in range(12):
        state, metrics = step(state, base, TOKENS, np.float32(3e-2), both)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, base))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state["params"], state["ema"])))
    # Every second row is the first micro-batch: the others may hold anything.
    other = TOKENS.copy()
    other[1::2] = 0
    kept = jax.tree.map(np.asarray, state)
    results = [
        step(jax.tree.map(jnp.asarray, kept), base, tokens, np.float32(1e-3), first)[0] for tokens in (TOKENS, other)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_any_mesh_gives_the_gradients_of_one_device(frozen, cpu_devices):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=cpu_devices)
    model = dataclasses.replace(MODEL, mesh=mesh)
    adapters = random_adapters()
    expected, _ = gradients(MODEL, adapters, frozen, TOKENS[None])

    def placed(tree):
        leaves = model_params.flatten(tree)
        return model_params.unflatten(jax.device_put(leaves, sharding.params_sharding(leaves, mesh)))

    tokens = jax.device_put(TOKENS[None], sharding.micro_batches_sharding(mesh))
    grads, _ = gradients(model, placed(adapters), placed(frozen), tokens)
    assert_close(grads, expected)
    abstract, state = train_lora.abstract_state(model), train_lora.init_state(model, 0, adapters)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state
    )


def test_unmerging_gives_back_what_was_there_up_to_rounding(frozen):
    adapters = random_adapters()
    merged = model_adapters.merge(frozen, adapters, EVERYWHERE)
    for path, leaf in model_params.flatten(model_adapters.unmerge(merged, adapters, EVERYWHERE)).items():
        np.testing.assert_allclose(leaf, model_params.flatten(frozen)[path], rtol=0, atol=1e-6, err_msg=path)
    coarse = model_params.cast(frozen, "bfloat16")
    again = model_adapters.merge(coarse, adapters, EVERYWHERE)
    sizes = {path: float(jnp.max(jnp.abs(leaf))) for path, leaf in model_params.flatten(again).items()}
    again = model_adapters.unmerge(again, adapters, EVERYWHERE, donate=True)
    for path, leaf in model_params.flatten(again).items():
        assert leaf.dtype == jnp.bfloat16
        expected = np.asarray(model_params.flatten(coarse)[path], np.float32)
        np.testing.assert_allclose(np.asarray(leaf, np.float32), expected, rtol=0, atol=2**-7 * sizes[path])


def test_what_does_not_fit_is_said_in_a_line(frozen, cpu_devices):
    adapters = random_adapters()
    loss_of, tokens = functools.partial(train_lora.loss_of, MODEL), jnp.asarray(TOKENS)
    with pytest.raises(ConfigError, match=r"layers.0.attention.key.weight is in few bits: adapters are merged into"):
        model_adapters.merge(model_params.abstract(CONFIG, "float32", "int4"), adapters, EVERYWHERE)
    deeper, wider = (
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model_adapters.abstract(config, EVERYWHERE))
        for config in (dataclasses.replace(CONFIG, num_layers=3), dataclasses.replace(CONFIG, mlp_width=80))
    )
    with pytest.raises(ConfigError, match=r"an adapter of layers.2.attention.key, which the model does not have"):
        model_adapters.merge(frozen, deeper, EVERYWHERE)
    with pytest.raises(ConfigError, match=r"layers.0.mlp.down, \[80, 4\] and \[4, 64\], does not fit \[256, 64\]"):
        model_adapters.merge(frozen, wider, EVERYWHERE)
    for other in (deeper, wider):
        with pytest.raises(ConfigError, match="does not fit the model"):
            jax.eval_shape(loss_of, other, frozen, tokens)
    with pytest.raises(ConfigError, match="the frozen model is bfloat16, and compute_dtype 'float32': load it as"):
        jax.eval_shape(loss_of, adapters, model_params.cast(frozen, "bfloat16"), tokens)
    leaves = model_params.flatten(adapters)
    half = {path: leaf for path, leaf in leaves.items() if path != "layers.1.mlp.up.a"}
    with pytest.raises(ConfigError, match=r"layers.1.mlp.up.b has no a beside it"):
        model_adapters.pairs(model_params.unflatten(half))
    with pytest.raises(ConfigError, match=r"layers.1.mlp.side.a is half an adapter"):
        model_adapters.pairs(model_params.unflatten(leaves | {"layers.1.mlp.side.a": jnp.zeros(2)}))
    for wrong, said in [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a number above 0"),
        (
            {"targets": ("query", "dense")},
            r"targets are \['query', 'dense'\]; take each once, of query_key_value, query",
        ),
        ({"targets": ()}, "take each once"),
        ({"targets": ("query_key_value", "key")}, "both query_key_value and key, which is part of it"),
    ]:
        with pytest.raises(ConfigError, match=said):
            LoRA(**wrong)
    with pytest.raises(ConfigError, match="LoRA has no pipeline"):
        dataclasses.replace(MODEL, mesh=sharding.make_mesh(stage=2, devices=cpu_devices))
    with pytest.raises(ConfigError, match="remat 'stage' is for a pipeline"):
        dataclasses.replace(MODEL, forward=ForwardOptions(remat="stage"))


def test_fused_stages_do_not_pass_adapters_by(frozen):
    cache = KVCache.create(CONFIG, 1, 8, "float32")

    def decode(params, adapters):
        decoder = model_params.bind(CONFIG, params, ForwardOptions(stages="mosaic"))
        model_adapters.bind(decoder, adapters, EVERYWHERE)
        return decoder(jnp.zeros((1, 1), jnp.int32), cache=cache)[0]

    with pytest.raises(NotImplementedError, match="stages='mosaic' cannot run here: the model has adapters"):
        jax.eval_shape(decode, frozen, random_adapters())
