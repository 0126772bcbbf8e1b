"""The stages over the tensor axis of a mesh: each device works on its part of the weights.

The input stage makes a device's own outputs. The output stage reads its own inputs, and what its device's part comes to
is added up over the axis. A weight that the axis does not divide lies on every device whole: of the input stage each
makes all of its outputs, and in the output stage the first device alone has inputs that are not zero.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from pallas_kernels.quantized_matmul.formats import QuantizedWeight
from pallas_kernels.quantized_matmul.product import Product
from pallas_kernels.sharded import HEAD_AXIS

WHOLE = PartitionSpec()


def size_of(mesh: Mesh | None) -> int:
    """Devices that the stages are split over."""
    return 1 if mesh is None else mesh.shape.get(HEAD_AXIS, 1)


def project_over(
    mesh: Mesh | None,
    products: Sequence[Product],
    moments: Any,
    project: Callable[..., list[Array]],
) -> list[Array]:
    """`project(products, moments=moments)`, each device on what it has of the weights, biases and slots."""
    count = size_of(mesh)

    def on_device(products: list[Product], moments: Any) -> list[Array]:
        own = [
            dataclasses.replace(product, num_outputs=product.num_outputs // count, is_split=False)
            if product.is_split
            else product
            for product in products
        ]
        return project(own, moments=moments)

    inputs = [_input_layout(product) for product in products]
    outputs = [PartitionSpec(None, HEAD_AXIS) if product.is_split else WHOLE for product in products]
    return on_all(on_device, mesh, (inputs, WHOLE), outputs)(list(products), moments)


def on_all(function: Callable[..., Any], mesh: Mesh | None, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` on each device of the mesh, with what these layouts give it of its arguments."""
    # Results of kernels do not say over which axes they vary.
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _input_layout(product: Product) -> Any:
    """A Product of PartitionSpecs."""
    if not product.is_split:
        return WHOLE
    columns, first = PartitionSpec(None, HEAD_AXIS), PartitionSpec(HEAD_AXIS)
    return dataclasses.replace(
        product,
        x=WHOLE,
        weight=QuantizedWeight(first, first) if isinstance(product.weight, QuantizedWeight) else columns,
        bias=None if product.bias is None else first,
        rotary=None if product.rotary is None else (WHOLE, WHOLE),
        slots=None if product.slots is None else (columns, WHOLE),
        affine=None if product.affine is None else columns,
    )


def output_layout(weight: Any, is_split: bool) -> Any:
    """Of a weight [I, O] of the output stage, whose inputs lie over the axis where it is split."""
    if not is_split:
        return WHOLE
    if not isinstance(weight, QuantizedWeight):
        return PartitionSpec(HEAD_AXIS)
    groups = PartitionSpec(None, HEAD_AXIS)
    return QuantizedWeight(groups, groups if weight.scales.ndim == 3 else WHOLE)  # int8 has a scale an output
