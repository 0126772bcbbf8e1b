"""The output stage over the tensor axis of a mesh: partial sums by each device, then their sum, residual and norms.

The sum is XLA's, between the kernel and what follows, or made by the kernels of all devices themselves, each of which
then does all the rest (pallas_kernels/peers).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from pallas_kernels.attention_norm.reference import Norm, layer_norm
from pallas_kernels.peers import Addresses
from pallas_kernels.quantized_matmul.sharded import WHOLE, on_all, output_layout
from pallas_kernels.sharded import HEAD_AXIS


def attention_norm_over(
    mesh: Mesh | None,
    xs: Sequence[Array],
    weights: Sequence[Any],
    are_split: Sequence[bool],
    residual: Array,
    norms: Sequence[Norm],
    biases: Sequence[Array],
    epsilon: float,
    add: Callable[[Sequence[Array], Sequence[Any]], Array],
) -> tuple[Array, list[Array]]:
    """The new residual and its norms, on all devices; `add` gives the sum of a device's own products."""

    def on_device(xs, weights, residual, norms, biases):
        out = lax.psum(add(_own(xs, are_split), weights), HEAD_AXIS)
        out = sum(biases, out) + residual
        return out, [layer_norm(out, norm, epsilon) for norm in norms]

    inputs = *_layouts(xs, weights, are_split), WHOLE, WHOLE, WHOLE
    return on_all(on_device, mesh, inputs, WHOLE)(list(xs), list(weights), residual, list(norms), list(biases))


def by_peers(
    mesh: Mesh | None,
    xs: Sequence[Array],
    weights: Sequence[Any],
    are_split: Sequence[bool],
    peers: Addresses,
    rest: Any,
    run: Callable[[Sequence[Array], Sequence[Any], Array, Any], Any],
) -> Any:
    """run(xs, weights, the device's row of `peers.table`, rest) on each device with its part of the first two.

    rest: arrays that all devices have whole, as are the results.
    """

    def on_device(xs, weights, table, rest):
        return run(_own(xs, are_split), weights, table.reshape(-1), rest)

    inputs = *_layouts(xs, weights, are_split), PartitionSpec(HEAD_AXIS), WHOLE
    return on_all(on_device, mesh, inputs, WHOLE)(list(xs), list(weights), peers.table, rest)


def _own(xs: Sequence[Array], are_split: Sequence[bool]) -> list[Array]:
    """On a device: what it adds to the sum. What all devices have counts once."""
    is_first = lax.axis_index(HEAD_AXIS) == 0
    return [x if is_split else jnp.where(is_first, x, 0) for x, is_split in zip(xs, are_split, strict=True)]


def _layouts(xs: Sequence[Array], weights: Sequence[Any], are_split: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    rows = [
        PartitionSpec(*[None] * (x.ndim - 1), HEAD_AXIS) if is_split else WHOLE
        for x, is_split in zip(xs, are_split, strict=True)
    ]
    return rows, [output_layout(weight, is_split) for weight, is_split in zip(weights, are_split, strict=True)]
