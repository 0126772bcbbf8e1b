"""Eight simulated devices give what one gives, for every variant, whatever divides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from falcon_jax import sharding
from falcon_jax.config import PRESETS
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import KVCache
from tests.models import VARIANTS, random_params, tiny
from tests.thorough import thorough

# 71 heads as published, on 8 devices.
CONFIGS = {name: tiny(name) for name in VARIANTS}
CONFIGS["falcon-7b, 71 heads"] = tiny(
    "falcon-7b", num_heads=71, width=8 * 71, mlp_width=64, num_layers=1, initializer_range=0.05
)
USUAL = ("falcon-rw-1b", "falcon-40b", "falcon-7b, 71 heads")
MESHES: list = [(name, {"tensor": 8}) for name in USUAL]
MESHES += thorough((name, {"tensor": 8}) for name in CONFIGS if name not in USUAL)
MESHES += [("falcon-7b, 71 heads", {"data": 2, "tensor": 4})]
MESHES += thorough((name, {"data": 2, "tensor": 4}) for name in ("falcon-rw-1b", "falcon-40b"))
MESHES += [("falcon2-11b", {"fsdp": 4, "tensor": 2})]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def extend(config, params, cache, ids):
    decoder = model_params.bind(config, params)
    hidden, cache = decoder(ids, cache=cache)
    return decoder.logits(hidden), cache


def place(params, mesh):
    flat = model_params.flatten(params)
    layouts = sharding.params_sharding(flat, mesh)
    return model_params.unflatten({path: jax.device_put(leaf, layouts[path]) for path, leaf in flat.items()})


@pytest.mark.parametrize(("name", "axes"), MESHES)
def test_eight_devices_equal_one(name, axes, cpu_devices):
    with jax.default_device(cpu_devices[0]):
        check_mesh(CONFIGS[name], sharding.make_mesh(**axes, devices=cpu_devices))


def check_mesh(config, mesh):
    params = random_params(config)
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    expected, cache = extend(config, params, KVCache.create(config, 2, 16, jnp.float32), ids)
    expected_next, _ = extend(config, params, cache, ids[:, :1])

    placed = place(params, mesh)
    rows = jax.device_put(ids, sharding.batch_sharding(ids.shape, mesh))
    cache = KVCache.create(config, 2, 16, jnp.float32, mesh)
    logits, cache = extend(config, placed, cache, rows)
    logits_next, _ = extend(config, placed, cache, rows[:, :1])
    np.testing.assert_allclose(logits, expected, atol=3e-5)
    np.testing.assert_allclose(logits_next, expected_next, atol=3e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_splits_every_large_parameter_of_every_model(name, cpu_devices):
    """On 8 tensor devices nothing over 1 % of the model is replicated whole, the 71 odd heads apart."""
    config = PRESETS[name]
    mesh = sharding.make_mesh(tensor=8, devices=cpu_devices)
    flat = model_params.flatten(model_params.abstract(config, "bfloat16"))
    for path, layout in sharding.params_sharding(flat, mesh).items():
        share = np.prod(flat[path].shape, dtype=int) / config.num_parameters
        odd_heads = config.num_heads % 8 and "attention." in path
        if share > 0.01 and not odd_heads:
            assert layout.spec != PartitionSpec(*[None] * len(flat[path].shape)), path


def test_what_does_not_divide_is_replicated(cpu_devices):
    mesh = sharding.make_mesh(fsdp=2, tensor=4, devices=cpu_devices)
    spec = sharding.param_sharding("layers.0.attention.query.weight", (568, 71, 8), mesh).spec
    assert spec == PartitionSpec(("fsdp",), None, None)
    assert sharding.cache_sharding((3, 16, 1, 8), mesh).spec == PartitionSpec(None, None, None, None)


def test_random_parameters_are_made_in_their_layout(cpu_devices):
    config = tiny("falcon-40b")
    mesh = sharding.make_mesh(tensor=8, devices=cpu_devices)
    params = model_params.flatten(model_params.init(config, jax.random.key(0), "float32", mesh))
    plain = model_params.flatten(model_params.init(config, jax.random.key(0), "float32"))
    for path, leaf in params.items():
        assert leaf.sharding == sharding.param_sharding(path, leaf.shape, mesh)
        np.testing.assert_allclose(leaf, plain[path], atol=1e-6)


def test_a_mesh_larger_than_the_machine_is_refused(cpu_devices):
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=8, stage=1 takes 24 devices; there are 8"):
        sharding.make_mesh(data=3, tensor=8, devices=cpu_devices)


def test_odd_batches_run_on_a_data_mesh(cpu_devices):
    config = tiny("falcon-7b")
    mesh = sharding.make_mesh(data=8, devices=cpu_devices)
    assert sharding.batch_sharding((3, 5), mesh).spec == PartitionSpec(None, None)
    assert KVCache.create(config, 3, 8, jnp.float32, mesh).batch_size == 3
