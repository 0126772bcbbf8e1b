"""Kernels over a mesh of devices: each runs on its own rows and heads.

XLA cannot look into a kernel: under plain jit it would gather sharded operands and run the whole call on every device.
Under shard_map each device runs the kernel on its share, and nothing moves. An axis that does not divide its dimension
is replicated over, never refused.

The trap: query heads may split further than the key/value heads that they share. A shard then takes the one it reads,
and shard_map adds up its gradients over the shards.
"""

import math
from collections.abc import Callable, Sequence
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


def layout(mesh: Mesh, sizes: dict[str, int], *, batch_axes: Sequence[str], head_axis: str) -> Layout:
    """How `mesh` splits B rows, N query heads and K key/value heads (`sizes` by letter)."""
    rows = tuple(axis for axis in batch_axes if axis in mesh.shape)
    if not rows or sizes["B"] % math.prod(mesh.shape[axis] for axis in rows):
        rows = None
    N, K, num_shards = sizes["N"], sizes["K"], mesh.shape.get(head_axis, 1)
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
    if mesh is None or mesh.size == 1:
        return function(*arguments)
    given = {i: array for i, array in enumerate(arguments) if array is not None}
    dimensions = {i: letters[i].split() for i in given}
    sizes: dict[str, int] = {}
    for i, array in given.items():
        sizes.update(zip(dimensions[i], array.shape, strict=True))
    split = layout(mesh, sizes, batch_axes=batch_axes, head_axis=head_axis)

    def on_one_device(shards: dict[int, Array]) -> Any:
        if split.kv_groups:
            head = jax.lax.axis_index(head_axis) * split.kv_groups // mesh.shape[head_axis]
            for i, shard in shards.items():
                if "K" in dimensions[i]:
                    shards[i] = jax.lax.dynamic_slice_in_dim(shard, head, 1, axis=dimensions[i].index("K"))
        return function(*(shards.get(i) for i in range(len(arguments))))

    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=({i: split.spec(letters[i]) for i in given},),
        out_specs=jax.tree.map(split.spec, results),
        check_vma=False,  # a kernel's results do not say over which axes they vary
    )(given)
