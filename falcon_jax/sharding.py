"""Meshes, and one ordered table from parameter path to layout.

Axes: "data" splits the batch, "fsdp" the batch and each parameter's width, "tensor" heads, MLP width and vocabulary,
"stage" layers (pipelines; no parameter axis). What an axis does not divide is replicated over it, never refused: 71
heads run on 8 devices.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.sharded import BATCH_AXES, HEAD_AXIS

AXES = ("data", "fsdp", "tensor", "stage")

# First match wins. A letter's axis: D -> fsdp, N, K, F, V -> tensor; H is never split.
PARAMETER_TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    # In few bits, tiles of 64 outputs and 128 inputs: Q P words, the outputs first.
    (r".*\.(query|key|value|up)\.weight\.values", PartitionSpec("tensor", "fsdp", None)),
    (r".*\.(output|down)\.weight\.values", PartitionSpec("fsdp", "tensor", None)),
    (r".*\.weight\.scales", PartitionSpec()),  # 1/32 of the values at most: each device takes what it needs
    (r"embed\.weight", PartitionSpec("tensor", "fsdp")),  # V D
    (r"lm_head\.weight", PartitionSpec("fsdp", "tensor")),  # D V
    (r".*\.(query|key|value)\.weight", PartitionSpec("fsdp", "tensor", None)),  # D N H
    (r".*\.(query|key|value)\.bias", PartitionSpec("tensor", None)),  # N H
    (r".*\.attention\.output\.weight", PartitionSpec("tensor", None, "fsdp")),  # N H D
    (r".*\.mlp\.up\.weight", PartitionSpec("fsdp", "tensor")),  # D F
    (r".*\.mlp\.up\.bias", PartitionSpec("tensor")),  # F
    (r".*\.mlp\.down\.weight", PartitionSpec("tensor", "fsdp")),  # F D
    (r".*", PartitionSpec()),  # norms and the other biases
)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, stage: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over the first data * fsdp * tensor * stage devices, with all four axes and automatic sharding.

    Raises:
      ValueError: there are fewer devices than that.
    """
    sizes = (data, fsdp, tensor, stage)
    devices = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes)
    if needed > len(devices):
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"a mesh of {shape} takes {needed} devices; there are {len(devices)}")
    grid = np.asarray(devices[:needed]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The layout of the parameter at `path`: the table's, less the axes that do not divide."""
    spec = next(spec for pattern, spec in PARAMETER_TABLE if re.fullmatch(pattern, path))
    return fitting(shape, mesh, spec)


def params_sharding(leaves: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """`param_sharding` for each of a flat tree's leaves (anything with a shape)."""
    return {path: param_sharding(path, leaf.shape, mesh) for path, leaf in leaves.items()}


def batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Rows over "data" and "fsdp"."""
    return fitting(shape, mesh, PartitionSpec(BATCH_AXES))


def cache_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """A cache array [B, S, K, H]: rows over "data" and "fsdp", heads over "tensor"."""
    return fitting(shape, mesh, PartitionSpec(BATCH_AXES, None, HEAD_AXIS, None))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def fitting(shape: Sequence[int], mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """`spec` on `mesh` without the axes that the mesh lacks or whose size does not divide their dimension."""
    kept = []
    for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        names = tuple(name for name in names if name in mesh.shape)
        kept.append(names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*kept))
