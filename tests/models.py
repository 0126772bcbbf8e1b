"""Small models of our own for tests, with every parameter random: a default norm would hide a swapped one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model import quantize
from pallas_kernels.quantized_matmul import QuantizedWeight, dequantize
from tests import hf_models

VARIANTS = hf_models.VARIANTS


def tiny(name: str, **changes) -> FalconConfig:
    """The published variant `name` in the small shape of `hf_models`; `changes` are fields of FalconConfig."""
    config = FalconConfig.from_hf(hf_models.tiny_config(name).to_dict())
    return dataclasses.replace(config, **({"initializer_range": 0.3} | changes))


def random_params(config: FalconConfig, seed: int = 0, dtype: str = "float32") -> model_params.Params:
    """Parameters with random norms and biases too."""
    params = model_params.flatten(model_params.init(config, jax.random.key(seed), "float32"))
    generator = np.random.default_rng(seed)
    for path, leaf in params.items():
        if path.endswith((".scale", ".bias")):
            noise = 0.3 * generator.standard_normal(leaf.shape, np.float32)
            params[path] = leaf + jnp.asarray(noise)
    return jax.tree.map(lambda x: x.astype(dtype), model_params.unflatten(params))


def native_again(params: model_params.Params, config: FalconConfig) -> model_params.Params:
    """The native tree, in float32 where that is new, of the numbers that one in few bits stands for."""
    leaves, made = model_params.flatten(params), {}
    for path, leaf in model_params.flatten(model_params.abstract(config, "float32")).items():
        if path in leaves:
            made[path] = leaves[path]
        else:
            weight = QuantizedWeight(leaves[f"{path}.values"], leaves[f"{path}.scales"])
            matrix = dequantize(weight, *quantize.matrix_shape(path, leaf.shape))
            made[path] = matrix.T if path == quantize.EMBEDDING else matrix.reshape(leaf.shape)
    return model_params.unflatten(made)
