"""From the training state's split float32 weights to what a device computes with, and back for gradients.

Inside the step the mesh's axes but "tensor" are manual (sharding.MANUAL_AXES). A device holds a share of each weight,
computes with the whole of it (its part over "tensor", which XLA looks after), and owes its share the sum of all
devices' gradients. Over "data" weights are gathered once a step and gradients summed once (ZeRO's first two stages);
over "fsdp" by each block for itself, forward and again backward, so that whole weights of few blocks exist at a time
(its third); in a pipeline, whose blocks run once for each micro-batch, over "fsdp" too but once. Without a mesh there
is one device, and nothing to do but round.

The trap: gradients add up in float32, over micro-batches and over devices, though products run in the compute dtype.
The gradient of a rounded weight would be rounded too, so each weight comes with a sink: zeros of its shape in float32,
never read, whose gradient is the weight's (`computed`).

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (2020).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from falcon_jax import sharding
from falcon_jax.model import params as model_params
from falcon_jax.model.params import Params
from pallas_kernels.sharded import HEAD_AXIS, over_axis

Gathering = tuple[tuple[int, tuple[str, ...]], ...]  # (dimension, axes)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one leaf of the training state lies.

    spec: its layout over the mesh, and on_tensor: what of it XLA looks after, if anything. once, by_block: what it is
    split over and a device computes with whole, gathered once a step or by each block. summed: the other manual axes,
    on each of which all devices hold the same.
    """

    spec: PartitionSpec
    on_tensor: PartitionSpec | None = None
    once: Gathering = ()
    by_block: Gathering = ()
    summed: tuple[str, ...] = ()

    def manual_spec(self) -> PartitionSpec:
        return sharding.restricted(self.spec, sharding.MANUAL_AXES)


def placements(params: Params, mesh: Mesh | None, num_stacked: int = 0) -> Params:
    """The Placement of each leaf of a training state's `params` (abstract ones do).

    num_stacked: leading dimensions of the layers' leaves that are the pipeline's.
    """
    leaves = model_params.flatten(params)
    if mesh is None:
        return model_params.unflatten(dict.fromkeys(leaves, Placement(PartitionSpec())))
    placed = {}
    for path, leaf in leaves.items():
        stacked = num_stacked if path.startswith("layers.") else 0
        spec = sharding.state_spec(path, leaf.shape, mesh, stacked)
        placed[path] = _placement(spec, mesh, stacked, in_pipeline=num_stacked > 0)
    return model_params.unflatten(placed)


def _placement(spec: PartitionSpec, mesh: Mesh, num_stacked: int, in_pipeline: bool) -> Placement:
    manual = sharding.axes_by_dimension(sharding.restricted(spec, sharding.MANUAL_AXES))
    own = [(i, axes) for i, axes in enumerate(manual) if axes and i >= num_stacked]
    used = {axis for axes in manual for axis in axes}
    summed = tuple(axis for axis in sharding.MANUAL_AXES if axis not in used and mesh.shape[axis] > 1)
    own_by_xla = sharding.restricted(spec, (HEAD_AXIS,))
    on_tensor = own_by_xla if any(own_by_xla) and mesh.shape[HEAD_AXIS] > 1 else None
    if in_pipeline:
        return Placement(spec, on_tensor, tuple(own), (), summed)
    once = tuple((i, ("data",)) for i, axes in own if "data" in axes)
    by_block = tuple((i, ("fsdp",)) for i, axes in own if "fsdp" in axes)
    return Placement(spec, on_tensor, once, by_block, summed)


def prepared(params: Params, layout: Params, dtype: DTypeLike) -> Params:
    """A device's weights in the compute dtype, gathered over "data", still split over "fsdp"."""

    def of_leaf(leaf: Array, place: Placement) -> Array:
        return _gathered(_held(leaf, place), place.once, place)

    return jax.tree.map(of_leaf, model_params.cast(params, dtype), layout)


def sinks(weights: Params, layout: Params) -> Params:
    """Zeros in float32 whose gradients are those of `weights`."""

    def zeros(leaf: Array, place: Placement) -> Array:
        return _held(jnp.zeros(leaf.shape, jnp.float32), place)

    return jax.tree.map(zeros, weights, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def computed(weight: Num[Array, "..."], sink: Float[Array, "..."], place: Placement) -> Num[Array, "..."]:
    """The weight as a block takes it; its gradient goes to the float32 `sink`, summed over what was gathered.

    A weight of few bits is integers, and has none.
    """
    return _gathered(weight, place.by_block, place)


def _computed_forward(weight: Array, sink: Array, place: Placement) -> tuple[Array, None]:
    return _gathered(weight, place.by_block, place), None


def _computed_backward(place: Placement, _: None, gradient: Array) -> tuple[Array, Array]:
    share = _scattered(gradient.astype(jnp.float32), place.by_block, place)
    return jnp.zeros(share.shape, gradient.dtype), share


computed.defvjp(_computed_forward, _computed_backward)


def all_computed(pair: tuple[Params, Params], layout: Params) -> Params:
    """`computed` for all leaves of a pair (weights, sinks)."""
    return jax.tree.map(computed, *pair, layout)


def reduced(gradients: Params, layout: Params) -> Params:
    """The sum over all devices of what arrived in their sinks, as each device's share."""

    def of_leaf(gradient: Array, place: Placement) -> Array:
        share = _scattered(gradient, place.once, place)
        return _on_shards(lambda x: jax.lax.psum(x, place.summed), share, place) if place.summed else share

    return jax.tree.map(of_leaf, gradients, layout)


def num_row_shards(mesh: Mesh | None) -> int:
    """Over how many devices the rows of a batch are split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)


def total(x: Any, mesh: Mesh | None) -> Any:
    """The sum of a value over all devices that have a part of the batch or of the layers."""
    axes = () if mesh is None else tuple(axis for axis in sharding.MANUAL_AXES if mesh.shape[axis] > 1)
    return jax.lax.psum(x, axes) if axes else x


def unstacked_layout(layout: Any, count: int) -> Any:
    """The layout of layers that `count` leading dimensions were taken off."""

    def moved(gathering: Gathering) -> Gathering:
        return tuple((i - count, axes) for i, axes in gathering)

    def of_leaf(place: Placement) -> Placement:
        spec, on_tensor = PartitionSpec(*tuple(place.spec)[count:]), place.on_tensor
        on_tensor = None if on_tensor is None else PartitionSpec(*tuple(on_tensor)[count:])
        return Placement(spec, on_tensor, moved(place.once), moved(place.by_block), place.summed)

    return jax.tree.map(of_leaf, layout)


def _held(x: Array, place: Placement) -> Array:
    """Tells XLA how `x` lies over the one axis that is its own to split over."""
    return x if place.on_tensor is None else jax.lax.with_sharding_constraint(x, place.on_tensor)


def _gathered(x: Array, gathering: Gathering, place: Placement) -> Array:
    def gather(x: Array) -> Array:
        for dimension, names in gathering:
            x = jax.lax.all_gather(x, names, axis=dimension, tiled=True)
        return x

    return _on_shards(gather, x, place) if gathering else x


def _scattered(x: Array, gathering: Gathering, place: Placement) -> Array:
    def scatter(x: Array) -> Array:
        for dimension, names in reversed(gathering):
            x = jax.lax.psum_scatter(x, names, scatter_dimension=dimension, tiled=True)
        return x

    return _on_shards(scatter, x, place) if gathering else x


def _on_shards(exchange: Callable[[Array], Array], x: Array, place: Placement) -> Array:
    """`exchange` by each device of a tensor group on its part: left to XLA, each would get the whole of it first."""
    if place.on_tensor is None:
        return exchange(x)
    return over_axis(exchange, HEAD_AXIS, None, (place.on_tensor,), place.on_tensor)(x)
