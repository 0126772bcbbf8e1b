"""Kernels over a mesh of devices: each runs on its own rows and heads.

XLA cannot look into a kernel: under plain jit it would gather sharded operands and run the whole call on every device.
Under shard_map each device runs the kernel on its share, and nothing moves. An axis that does not divide its dimension
is replicated over, never refused.

Within a shard_map over some of the mesh's axes, as in training, the arrays at hand are a device's share already, and
the other axes alone split them further.

The trap: query heads may split further than the key/value heads that they share. A shard then takes the one it reads,
and shard_map adds up its gradients over the shards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"


class Layout(NamedTuple):
    """What one call's dimensions are split over. B, N, K: mesh axes, None where each shard holds all of it.

    kv_groups: 0, or the number K of key/value heads of which each shard takes the one that its query heads read.
    """

    B: tuple[str, ...] | None
    N: str | None
    K: str | None
    kv_groups: int

    def spec(self, letters: str) -> PartitionSpec:
        """The layout of an array with these dimensions, as in "B T N H"."""
        return PartitionSpec(*(getattr(self, letter) if letter in "BNK" else None for letter in letters.split()))


def layout(axes: Mapping[str, int], sizes: dict[str, int], *, batch_axes: Sequence[str], head_axis: str) -> Layout:
    """How a mesh of these `axes` (name to size) splits B rows, N query heads and K key/value heads (`sizes`)."""
    rows = tuple(axis for axis in batch_axes if axis in axes)
    if not rows or sizes["B"] % math.prod(axes[axis] for axis in rows):
        rows = None
    N, K, num_shards = sizes["N"], sizes["K"], axes.get(head_axis, 1)
    if num_shards == 1 or N % num_shards:
        return Layout(rows, None, None, 0)
    if K % num_shards == 0:
        return Layout(rows, head_axis, head_axis, 0)
    if num_shards % K == 0:  # no shard's query heads straddle two key/value heads
        return Layout(rows, head_axis, None, K if K > 1 else 0)
    return Layout(rows, None, None, 0)


def over_mesh(
    function: Callable[..., Any],
    mesh: Mesh | None,
    arguments: Sequence[Array | None],
    letters: Sequence[str],
    results: Any,
    *,
    batch_axes: Sequence[str] = BATCH_AXES,
    head_axis: str = HEAD_AXIS,
) -> Any:
    """function(*arguments), each device of `mesh` on its share; without a mesh, just that.

    Args:
      function: gets arrays of the same rank, with fewer rows and heads; None stays None.
      letters: each argument's dimensions, as in "B T N H". B is split over `batch_axes`, N and K over `head_axis`.
      results: the dimensions of what `function` returns: a string, or a tuple of them.

    Returns:
      What `function` returns, laid out as `results` says. Differentiable where `function` is.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = {} if mesh is None else {axis: size for axis, size in mesh.shape.items() if axis not in manual}
    # In a region of manual axes those of size 1 are made manual too: cuDNN's call is refused beside axes of XLA's own.
    if not axes or (math.prod(axes.values()) == 1 and not manual):
        return function(*arguments)
    given = {i: array for i, array in enumerate(arguments) if array is not None}
    dimensions = {i: letters[i].split() for i in given}
    sizes: dict[str, int] = {}
    for i, array in given.items():
        sizes.update(zip(dimensions[i], array.shape, strict=True))
    split = layout(axes, sizes, batch_axes=batch_axes, head_axis=head_axis)

    def on_one_device(shards: dict[int, Array]) -> Any:
        if split.kv_groups:
            head = jax.lax.axis_index(head_axis) * split.kv_groups // axes[head_axis]
            for i, shard in shards.items():
                if "K" in dimensions[i]:
                    shards[i] = jax.lax.dynamic_slice_in_dim(shard, head, 1, axis=dimensions[i].index("K"))
        return function(*(shards.get(i) for i in range(len(arguments))))

    return jax.shard_map(
        on_one_device,
        mesh=None if manual else mesh,  # inside a region of manual axes: the rest of its mesh
        axis_names=set(axes),
        in_specs=({i: split.spec(letters[i]) for i in given},),
        out_specs=jax.tree.map(split.spec, results),
        check_vma=False,  # a kernel's results do not say over which axes they vary
    )(given)


def over_axis(
    function: Callable[..., Any],
    axis: str,
    mesh: Mesh | None,
    inputs: tuple[PartitionSpec, ...],
    output: PartitionSpec,
) -> Callable[..., Any]:
    """`function` on each device's part of its arguments along one axis.

    The mesh's other axes stay as they are: XLA's own, or manual already where the call stands inside such a region
    (then `mesh` may be None).
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return jax.shard_map(
        function,
        mesh=None if manual else mesh,
        in_specs=inputs,
        out_specs=output,
        axis_names={axis},
        check_vma=False,
    )
