"""Meshes, and one ordered table from parameter path to layout.

Axes: "data" splits the batch, "fsdp" the batch and each parameter's width, "tensor" heads, MLP width and vocabulary,
"stage" layers (pipelines). What an axis does not divide is replicated over it, never refused: 71 heads run on 8
devices.

In training the axes but "tensor" are manual: each device runs the step on its own rows and layers and says itself what
is gathered and summed over them (train/weights.py), while XLA splits products over "tensor". So the state may be
split over "data" too (ZeRO), and gradients of many micro-batches add up on each device before any of it is sent.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.sharded import BATCH_AXES, HEAD_AXIS

AXES = ("data", "fsdp", "tensor", "stage")
STAGE_AXIS = "stage"
MANUAL_AXES = ("data", "fsdp", "stage")  # in training
ZERO_AXES = ("fsdp", "data")  # what the training state's widths are split over, as far as they divide

# The first match wins whose layout has no more dimensions than the parameter. A letter's axis: D -> fsdp; N, K, F, V ->
# tensor; H is never split. Weights in few bits lie as the native ones do (model/quantize.py).
PARAMETER_TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (r".*\.(query|key|value)\.b", PartitionSpec(None, "tensor", None)),  # r N H, of adapters (model/adapters.py)
    (r".*\.attention\.output\.a", PartitionSpec("tensor", None, None)),  # N H r
    (r".*\.mlp\.up\.b", PartitionSpec(None, "tensor")),  # r F
    (r".*\.mlp\.down\.a", PartitionSpec("tensor", None)),  # F r
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

    Neighbours in `devices` share "tensor" first, whose traffic is the most and needs the links inside a machine, then
    "fsdp" and "data"; "stage", with the least, lies the farthest apart.

    Raises:
      ValueError: there are fewer devices than that.
    """
    sizes = (data, fsdp, tensor, stage)
    devices = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes)
    if needed > len(devices):
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"a mesh of {shape} takes {needed} devices; there are {len(devices)}")
    grid = np.asarray(devices[:needed]).reshape(stage, data, fsdp, tensor)
    return Mesh(np.moveaxis(grid, 0, -1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The layout of the parameter at `path`: the table's, less the axes that do not divide."""
    return fitting(shape, mesh, param_spec(path, len(shape)))


def param_spec(path: str, num_dimensions: int) -> PartitionSpec:
    """What the table says of the parameter at `path`."""
    return next(
        spec for pattern, spec in PARAMETER_TABLE if len(spec) <= num_dimensions and re.fullmatch(pattern, path)
    )


def params_sharding(leaves: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """`param_sharding` for each of a flat tree's leaves (anything with a shape)."""
    return {path: param_sharding(path, leaf.shape, mesh) for path, leaf in leaves.items()}


def state_spec(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, num_stacked: int = 0) -> PartitionSpec:
    """The layout of a parameter in the training state: the table's, with widths over ZERO_AXES.

    num_stacked: leading dimensions that `pipeline.stack` put before the parameter's own, of which the first lies over
      "stage".
    """
    spec = param_spec(path, len(shape) - num_stacked)
    stacked = (STAGE_AXIS,) + (None,) * (num_stacked - 1) if num_stacked else ()
    return fitting(shape, mesh, PartitionSpec(*stacked, *_over_zero_axes(spec)), drop="last").spec


def _over_zero_axes(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(ZERO_AXES if axes == "fsdp" else axes for axes in spec))


def unsplit_shares(leaves: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> dict[str, float]:
    """Which axes split less of the training state than they are meant to, since their size does not divide it.

    leaves: what is trained, as a flat tree (anything with a shape), its layers not stacked; moments lie as it does.

    Returns:
      Axis -> the share of the state's bytes, above 0 and at most 1, that lies whole on each of the axis's devices
      though the table has it split. What the table itself leaves whole (norms, most biases; over "stage" embedding and
      head) is never in it. Empty where nothing is lost.
    """
    unsplit: dict[str, int] = dict.fromkeys(AXES, 0)
    for path, leaf in leaves.items():
        meant, found = (
            {axis for axes in axes_by_dimension(spec) for axis in axes}
            for spec in (_over_zero_axes(param_spec(path, len(leaf.shape))), state_spec(path, leaf.shape, mesh))
        )
        for axis in meant - found:
            if mesh.shape.get(axis, 1) > 1:
                unsplit[axis] += math.prod(leaf.shape)
    whole = sum(math.prod(leaf.shape) for leaf in leaves.values())
    return {axis: size / whole for axis, size in unsplit.items() if size}


def restricted(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """`spec` with no other axes than these."""
    return PartitionSpec(*(tuple(axis for axis in names if axis in axes) or None for names in axes_by_dimension(spec)))


def axes_by_dimension(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The axes that each dimension is split over. A spec itself holds a name, a tuple of them or None."""
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]


def micro_batches_sharding(mesh: Mesh) -> NamedSharding:
    """Micro-batches [A, R, ...]: the R rows of each over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Rows over "data" and "fsdp"."""
    return fitting(shape, mesh, PartitionSpec(BATCH_AXES))


def cache_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """A cache array [B, S, K, H]: rows over "data" and "fsdp", heads over "tensor"."""
    return fitting(shape, mesh, PartitionSpec(BATCH_AXES, None, HEAD_AXIS, None))


def rows_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Of what decoding carries from step to step: cache arrays, which alone have four axes, other rows, or scalars."""
    if not shape:
        return replicated(mesh)
    return (cache_sharding if len(shape) == 4 else batch_sharding)(shape, mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def fitting(
    shape: Sequence[int], mesh: Mesh | AbstractMesh, spec: PartitionSpec, *, drop: str = "all"
) -> NamedSharding:
    """`spec` on `mesh` without the axes that the mesh lacks or whose size does not divide their dimension.

    drop: where several axes do not divide a dimension together, "all" of them go, or the "last" until they do.
    """
    kept = []
    unnamed = len(shape) - len(spec)
    for size, axes in zip(shape, axes_by_dimension(spec) + [()] * unnamed, strict=True):
        names = tuple(name for name in axes if name in mesh.shape)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1] if drop == "last" else ()
        kept.append(names or None)
    return NamedSharding(mesh, PartitionSpec(*kept))
