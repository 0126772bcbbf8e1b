"""Does a model that only runs fit: its weights and its cache against the device, exactly, before anything is loaded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.train.planning.devices import Device
from falcon_jax.train.planning.job import bytes_a_device, mesh_of_nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """Bytes of one device: the weights, and the cache of `rows` rows of `length` tokens."""

    device: Device
    tensor: int
    rows: int
    length: int
    weight_bytes: int
    cache_bytes: int

    @property
    def spare_bytes(self) -> int:
        return self.device.usable_bytes - self.weight_bytes - self.cache_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    def record(self) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "gpus": self.tensor,
            "batch_rows": self.rows,
            "length": self.length,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "usable_bytes": self.device.usable_bytes,
            "memory_bytes": self.device.memory_bytes,
            "spare_bytes": self.spare_bytes,
            "fits": self.fits,
        }


def serve(
    config: FalconConfig, device: Device, *, rows: int, length: int, tensor: int, dtype: str, weights: str
) -> ServingPlan:
    """For a mesh of `tensor` devices. dtype, weights: as for Falcon.from_checkpoint.

    Raises: ConfigError where a size is below 1.
    """
    for name, size in {"batch": rows, "length": length, "tensor": tensor}.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}; it must be at least 1")
    mesh = mesh_of_nothing(tensor=tensor)

    def placed(shape: tuple[int, ...], dtype: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    leaves = model_params.flatten(model_params.abstract(config, jnp.dtype(dtype), weights))
    where = model_params.layouts(config, mesh, weights)
    slot = (rows, length, config.num_kv_heads, config.head_dim)
    cached = placed(slot, jnp.dtype(dtype), sharding.cache_sharding(slot, mesh))
    return ServingPlan(
        device=device,
        tensor=tensor,
        rows=rows,
        length=length,
        weight_bytes=bytes_a_device([placed(leaf.shape, leaf.dtype, where[path]) for path, leaf in leaves.items()]),
        cache_bytes=2 * config.num_layers * bytes_a_device(cached),
    )
