"""Fused stages over the tensor axis: what one device's plain layers give, for every variant and form of weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.model import params as model_params
from falcon_jax.model import stages
from falcon_jax.model.step import ForwardOptions, Step, spans
from pallas_kernels import compat
from tests.model.test_sharding import place
from tests.model.test_stages import start, through_layers
from tests.models import VARIANTS, tiny
from tests.thorough import thorough


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def through_stages(config, params, cache, ids, mesh):
    decoder = model_params.bind(config, params, ForwardOptions(), mesh)
    offsets, ends = spans(cache, ids.shape[0], ids.shape[1], None)
    step = Step.begin(config, ForwardOptions(), ids.shape[1], offsets, ends, cache, mesh)
    return stages.run(decoder, decoder.token_vectors(ids), step, cache, "xla")


def of_size(name: str, head_dim: int):
    config = tiny(name, num_layers=2)
    return dataclasses.replace(config, width=config.num_heads * head_dim, mlp_width=1024)


# Heads and MLP split, or either of them not: 4 of 6 heads do not, nor does one key/value head.
USUAL = ("falcon-rw-1b", "falcon-7b")
CASES: list = [(name, "native", 8, 2) for name in USUAL]
CASES += thorough((name, "native", 8, 2) for name in VARIANTS if name not in USUAL)
CASES += [("falcon-40b", "native", 8, 4), *thorough([("falcon-rw-7b", "native", 8, 4)])]
CASES += [("falcon-40b-alibi", "int4", 128, 4)]
CASES += thorough([("falcon-40b", "int8", 64, 2), ("falcon-rw-1b", "int8", 64, 4)])
CASES += [("falcon-7b", "int4", 64, 8)]


@pytest.mark.parametrize(("name", "weights", "head_dim", "count"), CASES)
def test_stages_over_devices_equal_the_layers_of_one(name, weights, head_dim, count, cpu_devices):
    with jax.default_device(cpu_devices[0]):
        config = of_size(name, head_dim)
        params, cache, ids = start(config, 3, 1, jnp.float32, weights)
        expected, expected_kept = through_layers(config, params, cache, ids, jnp.ones(3, jnp.int32))
        mesh = sharding.make_mesh(tensor=count, devices=cpu_devices)
        made, kept = through_stages(config, place(params, mesh), _on(cache, mesh), ids, mesh)
    np.testing.assert_allclose(made, expected, atol=2e-5)
    for some, others in zip(jax.tree.leaves(kept), jax.tree.leaves(expected_kept), strict=True):
        np.testing.assert_allclose(some, others, atol=2e-5)


def _on(cache, mesh):
    def put(x):
        where = sharding.cache_sharding(x.shape, mesh) if x.ndim == 4 else sharding.replicated(mesh)
        return jax.device_put(x, where)

    return jax.tree.map(put, cache)


def test_what_kernels_do_not_take_on_a_mesh_is_said(cpu_devices):
    def reason(name: str, weights: str = "native", num_tokens: int = 1, head_dim: int = 64, **axes: int) -> str | None:
        config = of_size(name, head_dim)
        mesh = sharding.make_mesh(**axes, devices=cpu_devices)
        params = model_params.abstract(config, jnp.bfloat16, weights)
        with compat.assume_capability(compat.HOPPER):
            return stages.reason_against(model_params.bind(config, params, ForwardOptions(), mesh), num_tokens)

    assert reason("falcon-40b", tensor=2) is None
    assert reason("falcon-40b", "int8", tensor=2) is None
    assert reason("falcon-7b", tensor=8) is None  # 5 heads, on every device
    assert reason("falcon-40b", data=2, tensor=2) == "of a mesh it takes the tensor axis alone"
    assert "up to 64 tokens" in str(reason("falcon-40b", num_tokens=65, tensor=2))
    assert "it takes multiples of 64" in str(reason("falcon-40b", tensor=2, head_dim=8))
    # Four tiles of outputs stay together where the two heads of 128 that they are do.
    assert reason("falcon2-11b", "int8", tensor=4, head_dim=128) is None
    # Two heads of 32 split over two devices, the tile that they are does not.
    assert "heads do not lie over 2 devices as their weights do" in str(
        reason("falcon2-11b", "int8", tensor=2, head_dim=32)
    )
