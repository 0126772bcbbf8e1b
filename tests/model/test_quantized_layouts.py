"""Where weights of few bits lie on a mesh: as the native ones, heads whole, wherever whole tiles allow it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from falcon_jax import sharding
from falcon_jax.config import PRESETS
from falcon_jax.model import params as model_params
from falcon_jax.model import quantize, stages
from falcon_jax.model.step import ForwardOptions
from pallas_kernels import compat
from pallas_kernels.sharded import HEAD_AXIS

PART = "layers.0."


def one_layer(name):
    return dataclasses.replace(PRESETS[name], num_layers=1)


def uses_tensor(layout):
    return any(HEAD_AXIS in axes for axes in sharding.axes_by_dimension(layout.spec))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("name", PRESETS)
def test_a_head_is_never_cut_and_what_is_split_has_whole_tiles(name, tensor, weights, cpu_devices):
    config, mesh = one_layer(name), sharding.make_mesh(tensor=tensor, devices=cpu_devices)
    leaves = model_params.flatten(model_params.abstract(config, jnp.bfloat16))
    found = model_params.layouts(config, mesh, weights)
    assert found.keys() == model_params.flatten(model_params.abstract(config, jnp.bfloat16, weights)).keys()
    for path, leaf in leaves.items():
        if not path.startswith(PART) or quantize.form_of(path, weights) == "native":
            continue
        native = sharding.param_sharding(path, leaf.shape, mesh)
        values, scales = found[f"{path}.values"], found[f"{path}.scales"]
        if uses_tensor(values):
            assert uses_tensor(native), path
        shares = np.array(quantize.matrix_shape(path, leaf.shape)) // np.array([128, 64])
        over_inputs = path.endswith(("output.weight", "down.weight"))
        whole = shares[0 if over_inputs else 1] % tensor == 0 and uses_tensor(native)
        matrix = quantize.matrix_shape(path, leaf.shape)
        exact = matrix[0] % 128 == 0 if over_inputs else matrix[1] % 64 == 0
        assert uses_tensor(values) == (whole and exact), path
        if weights == "int4":
            assert scales.spec == values.spec


@pytest.mark.parametrize("weights", quantize.WEIGHTS)
@pytest.mark.parametrize("name", ["falcon-40b-alibi", "falcon-7b", "falcon-40b", "falcon-rw-1b", "falcon-180b"])
def test_the_kernels_take_every_form_over_two_devices(name, weights, cpu_devices):
    """One key head of 128 is two tiles, and 71 heads of 64 fill no even number of groups: both stay on each device."""
    config, mesh = one_layer(name), sharding.make_mesh(tensor=2, devices=cpu_devices)
    params = model_params.abstract(config, jnp.bfloat16, weights)
    with compat.assume_capability(compat.HOPPER):
        decoder = model_params.bind(config, params, ForwardOptions(), mesh)
        assert stages.reason_against(decoder, 8) is None


def test_where_the_matrix_is_split_by_rows_and_columns(cpu_devices):
    mesh = sharding.make_mesh(fsdp=2, tensor=4, devices=cpu_devices)
    found = quantize.layouts("layers.3.mlp.up.weight", (8192, 32768), "int8", mesh)
    specs = [layout.spec for layout in found.values() if layout is not None]
    assert list(found) == [f"layers.3.mlp.up.weight.{name}" for name in ("values", "scales")]
    assert specs == [PartitionSpec(("tensor",), ("fsdp",)), PartitionSpec(("tensor",))]
    found = quantize.layouts("layers.3.mlp.up.weight", (8192, 32768), "int8", None)
    assert set(found.values()) == {None}
