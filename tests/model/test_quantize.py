"""Models whose projections have 8 or 4 bits: the same as the native model of the weights that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import falcon_jax
from falcon_jax import sharding
from falcon_jax.checkpoint import CheckpointError, load
from falcon_jax.checkpoint.manifest import Manifest
from falcon_jax.model import params as model_params
from falcon_jax.model import quantize
from pallas_kernels.quantized_matmul import FORMS
from tests import hf_models
from tests.models import native_again, random_params, tiny
from tests.thorough import thorough

VARIANTS = ("falcon-rw-1b", "falcon-7b", "falcon-40b", "falcon2-11b", "falcon-40b-alibi")
USUAL = [("falcon-rw-1b", "int8"), ("falcon-7b", "int4")]
IDS = np.random.default_rng(0).integers(0, 64, (2, 11))


def quantized(params, weights):
    made = {}
    for path, leaf in model_params.flatten(params).items():
        made |= quantize.on_host(path, np.asarray(leaf), weights)
    return jax.tree.map(jnp.asarray, model_params.unflatten(made))


@pytest.mark.parametrize(
    ("name", "weights"),
    [*USUAL, *thorough((name, form) for name in VARIANTS for form in FORMS if (name, form) not in USUAL)],
)
def test_logits_and_text_are_those_of_the_weights_that_it_stands_for(name, weights):
    config = tiny(name)
    params = quantized(random_params(config), weights)
    assert model_params.weights_of(params) == weights
    model, same = falcon_jax.Falcon(config, params), falcon_jax.Falcon(config, native_again(params, config))
    np.testing.assert_allclose(model.logits(IDS), same.logits(IDS), rtol=1e-4, atol=1e-3)
    options = {"max_new_tokens": 12, "temperature": 0.0}
    made, expected = (m.generate([[5, 6, 7], [9]], **options) for m in (model, same))
    assert [c.token_ids for c in made] == [c.token_ids for c in expected]


def test_eight_bits_are_closer_than_four():
    config = tiny("falcon-40b")
    params = random_params(config)
    exact = falcon_jax.Falcon(config, params).logits(IDS)
    errors = [
        float(np.abs(falcon_jax.Falcon(config, quantized(params, weights)).logits(IDS) - exact).mean())
        for weights in FORMS
    ]
    assert 0 < 5 * errors[0] < errors[1] < 0.5 * float(np.abs(exact).mean())


@pytest.mark.parametrize("weights", FORMS)
def test_described_and_made_trees_are_alike(weights):
    # Neither 320 inputs nor some of the outputs are whole tiles, and the host takes 1184 outputs in several pieces.
    config = tiny("falcon-7b", width=320, num_heads=5, mlp_width=1184)
    described = model_params.flatten(model_params.abstract(config, "bfloat16", weights))
    made = model_params.flatten(model_params.init(config, jax.random.key(0), jnp.bfloat16, weights=weights))
    assert {path: (x.shape, x.dtype) for path, x in made.items()} == {
        path: (x.shape, x.dtype) for path, x in described.items()
    }
    native = model_params.init(config, jax.random.key(0), jnp.bfloat16)
    for path, leaf in model_params.flatten(quantized(native, weights)).items():
        np.testing.assert_array_equal(leaf, made[path])
    assert model_params.num_bytes(made) < model_params.num_bytes(native)


# Tiles of outputs and inputs in all, and of each of 2 x 2 devices: what does not divide is on all of them.
UP_AND_DOWN = {
    64: {"up": ((4, 1), (2, 1)), "down": ((1, 2), (1, 1))},
    256: {"up": ((16, 2), (8, 1)), "down": ((4, 8), (2, 4))},
}


# The vocabulary is over the tensor axis where its tiles divide by two.
@pytest.mark.parametrize(
    ("weights", "width", "vocab_size"),
    [("int8", 64, 256), ("int4", 256, 100), *thorough([("int8", 256, 200), ("int4", 64, 128)])],
)
def test_a_mesh_changes_nothing(weights, width, vocab_size, cpu_devices):
    config = tiny("falcon-40b", width=width, mlp_width=4 * width, initializer_range=0.1, vocab_size=vocab_size)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=cpu_devices)
    key = jax.random.key(3)
    with jax.default_device(cpu_devices[0]):
        plain = falcon_jax.Falcon.from_config(config, key=key, dtype="float32", weights=weights)
        spread = falcon_jax.Falcon.from_config(config, key=key, dtype="float32", weights=weights, mesh=mesh)
        table = spread.params["embed"]["weight"]["values"]
        num_tiles = -(-vocab_size // 64)
        split = 2 if vocab_size % 128 == 0 else 1
        assert table.sharding.shard_shape(table.shape)[0] == num_tiles // split
        for name, (tiles, tiles_of_a_device) in UP_AND_DOWN[width].items():
            values = spread.params["layers"][0]["mlp"][name]["weight"]["values"]
            assert values.shape[:2] == tiles
            assert values.sharding.shard_shape(values.shape) == (*tiles_of_a_device, values.shape[2])
        np.testing.assert_allclose(spread.logits(IDS), plain.logits(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", FORMS)
def test_converted_and_loaded_on_the_fly_are_the_same_bits(weights, tmp_path):
    source = tmp_path / "hf"
    hf_models.save_model(hf_models.make_model(hf_models.tiny_config("falcon-7b")), source)
    converted = falcon_jax.convert(source, tmp_path / "few", dtype="bfloat16", weights=weights, progress=False)
    native = falcon_jax.convert(source, tmp_path / "native", dtype="bfloat16", progress=False)
    trees = [
        model_params.flatten(load(folder, dtype="bfloat16", weights=weights).params)
        for folder in (converted, native, source)
    ]
    for path, leaf in trees[0].items():
        for other in trees[1:]:
            np.testing.assert_array_equal(leaf, other[path])
    assert list(trees[0]) == list(trees[1]) == list(trees[2])
    with pytest.raises(CheckpointError, match=f"holds {weights} weights, and weights='native' was asked for"):
        falcon_jax.Falcon.from_checkpoint(converted)
    with pytest.raises(CheckpointError, match="export a native conversion"):
        falcon_jax.export(converted, tmp_path / "back")
    array = converted / "params" / "layers.0.mlp.up.weight.values" / "0.0.0"
    damaged = bytearray(array.read_bytes())
    damaged[3] ^= 1
    array.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"mlp\.up\.weight\.values has changed"):
        falcon_jax.Falcon.from_checkpoint(converted, weights=weights)


@pytest.mark.parametrize("weights", FORMS)
def test_a_folder_of_another_layout_is_refused(weights, tmp_path):
    hf_models.save_model(hf_models.make_model(hf_models.tiny_config("falcon-7b")), tmp_path / "hf")
    folder = falcon_jax.convert(tmp_path / "hf", tmp_path / "few", weights=weights, progress=False)
    made = Manifest.read(folder)
    path = "layers.0.mlp.up.weight.values"
    rows_of_outputs = dataclasses.replace(made.arrays[path], shape=(40, 160), dtype="int8")
    dataclasses.replace(made, arrays={**made.arrays, path: rows_of_outputs}).write(folder)
    with pytest.raises(CheckpointError, match="does not list the arrays of its configuration: convert again"):
        falcon_jax.Falcon.from_checkpoint(folder, weights=weights)


def test_unknown_weights_are_named(tmp_path):
    for call in (
        lambda: falcon_jax.Falcon.from_checkpoint(weights="int3"),
        lambda: falcon_jax.Falcon.from_config(tiny("falcon-7b"), weights="int3"),
        lambda: falcon_jax.convert(tmp_path, tmp_path / "out", weights="int3"),
    ):
        with pytest.raises(ValueError, match="weights is 'int3'; supported: 'native', 'int8', 'int4'"):
            call()


def test_a_budget_counts_the_bits_that_are_kept():
    native = falcon_jax.Falcon.from_checkpoint()
    budget = model_params.num_bytes(native.params)  # no room for a cache beside these
    with pytest.raises(ValueError, match="too small"):
        falcon_jax.Falcon.from_checkpoint(memory_budget=budget)
    model = falcon_jax.Falcon.from_checkpoint(weights="int4", memory_budget=budget)
    assert model.generate("The sea", max_new_tokens=3)[0].text
