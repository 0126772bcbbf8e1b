"""The output stage over the tensor axis of a mesh: partial sums by each device, then their sum, residual and norms."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from pallas_kernels.attention_norm.reference import Norm, layer_norm
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
        is_first = lax.axis_index(HEAD_AXIS) == 0
        # What all devices have counts once.
        own = [x if is_split else jnp.where(is_first, x, 0) for x, is_split in zip(xs, are_split, strict=True)]
        out = lax.psum(add(own, weights), HEAD_AXIS)
        out = sum(biases, out) + residual
        return out, [layer_norm(out, norm, epsilon) for norm in norms]

    rows = [
        PartitionSpec(*[None] * (x.ndim - 1), HEAD_AXIS) if is_split else WHOLE
        for x, is_split in zip(xs, are_split, strict=True)
    ]
    layouts = [output_layout(weight, is_split) for weight, is_split in zip(weights, are_split, strict=True)]
    inputs = rows, layouts, WHOLE, WHOLE, WHOLE
    return on_all(on_device, mesh, inputs, WHOLE)(list(xs), list(weights), residual, list(norms), list(biases))
