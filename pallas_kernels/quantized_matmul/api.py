"""`quantized_matmul` and `project`: what models call. They check arguments, pick the implementation and run it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pallas_kernels import compat, dispatch
from pallas_kernels.quantized_matmul import deferred
from pallas_kernels.quantized_matmul.formats import QuantizedWeight
from pallas_kernels.quantized_matmul.integers import IntegerRows
from pallas_kernels.quantized_matmul.product import (
    MAX_ROWS,
    SIDE,
    Product,
    form_of,
    in_eights,
    in_order,
    reason_against_products,
)
from pallas_kernels.quantized_matmul.reference import exact_gelu, matmul_xla
from pallas_kernels.quantized_matmul.sharded import project_over, size_of
from pallas_kernels.rotary import rotate


def quantized_matmul(
    x: Float[Array, "*rows I"],
    weight: QuantizedWeight,
    num_outputs: int,
    *,
    dtype: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows O"]:
    """x times a weight of 8 or 4 bits (formats.py), added up in float32.

    Differentiable with respect to x where "xla" runs.

    Args:
      num_outputs: O, which the weight's tiles tell only up to a multiple of 64.
      dtype: of the result: None for x's, or "float32".
      implementation: "mosaic" (Hopper GPUs, bfloat16), "xla", or None: "xla", which alone is differentiable and takes
        arrays that lie on several devices.

    Returns:
      [..., O].

    Raises:
      ValueError: arrays that are no weight [I, O], another dtype, or an unknown `implementation`.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    return project([Product(x, weight, num_outputs, dtype=dtype)], implementation=implementation or "xla")[0]


def project(
    products: Sequence[Product],
    *,
    moments: deferred.Moments | None = None,
    num_sms: int | None = None,
    mesh: Mesh | None = None,
    implementation: str | None = None,
) -> list[Float[Array, "*rows O"]]:
    """Several products at once: the input stage of a layer, whose projections read one normalized input or two.

    Args:
      products: weights of one form, all with as many inputs and rows.
      moments: None, or what `attention_norm_deferred` returned beside the rows that are the products' x: the layer norm
        ends here. Of 8 rows the last two come out as anything.
      num_sms: of the GPU's multiprocessors, how many the kernel of up to 64 rows may have; it leaves the others to what
        runs beside it. None for all.
      mesh: None, or one whose tensor axis the products' `is_split` is about. Each device makes its own outputs, and
        all others too; nothing is exchanged.
      implementation: "mosaic" (Hopper GPUs, bfloat16: one launch), "xla", or None for the faster one that takes the
        call.

    Returns:
      [..., O] of each product; of one with slots those, [S, O].

    Raises:
      ValueError: a weight that does not fit its x, x that is not of these moments, no multiprocessor for the kernel, or
        an unknown `implementation`.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    for product in products:
        product.check("project")
    deferred.check(products, moments)
    if size_of(mesh) > 1:
        on_device = functools.partial(project, num_sms=num_sms, implementation=implementation)
        return project_over(mesh, products, moments, on_device)
    candidates = {"mosaic": lambda: _mosaic_reason(products, moments), "xla": lambda: None}
    candidates = in_order(products[0].num_rows, form_of(products[0].weight), candidates)
    if dispatch.choose("project", implementation, candidates) == "xla":
        return [_project_xla(product, moments) for product in products]

    shapes = [(*product.x.shape[:-1], product.num_outputs) for product in products]
    if products[0].num_rows > MAX_ROWS:
        from pallas_kernels.quantized_matmul.wide import project_wide

        rows = [dataclasses.replace(product, x=product.x.reshape(product.num_rows, -1)) for product in products]
        return [y.reshape(shape) for y, shape in zip(project_wide(rows), shapes, strict=True)]

    from pallas_kernels.quantized_matmul.mosaic import project_mosaic

    num_rows = None if moments is not None else products[0].num_rows
    rows = [_in_eights(product) for product in products]
    made = project_mosaic(rows, moments=moments, num_sms=num_sms, num_rows=num_rows)
    return [
        y if product.slots is not None else y[: product.num_rows].reshape(shape)
        for y, product, shape in zip(made, products, shapes, strict=True)
    ]


def _in_eights(product: Product) -> Product:
    rotary = None if product.rotary is None else tuple(map(in_eights, product.rotary))
    return dataclasses.replace(product, x=in_eights(product.x), rotary=rotary)


def _as_floats(x: Any) -> Array:
    return x.floats().astype(x.dtype) if isinstance(x, IntegerRows) else x


def _project_xla(product: Product, moments: deferred.Moments | None) -> Array:
    x, out_dtype, affine = _as_floats(product.x), product.out_dtype, product.affine
    if moments is not None and affine is None:
        x = deferred.finish(x, moments)
    dtype = out_dtype if affine is None else jnp.float32
    if isinstance(product.weight, QuantizedWeight):
        y = matmul_xla(x, product.weight, product.num_outputs, dtype)
    else:
        y = lax.dot_general(x, product.weight, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)
    if affine is not None:
        assert moments is not None  # by `deferred.check`
        y = deferred.end(y, affine[0], affine[1], moments, x.shape[-1]).astype(out_dtype)
    if product.bias is not None:
        y = y + product.bias
    if product.activation == "gelu":
        y = exact_gelu(y)
    if product.rotary is not None:
        heads = y.reshape(product.num_rows, -1, SIDE)
        y = rotate(heads, *(jnp.concatenate([angles] * 2, axis=-1) for angles in product.rotary)).reshape(y.shape)
    if product.slots is not None:
        array, places = product.slots
        return array.at[places].set(y.reshape(-1, y.shape[-1])[: len(places)], mode="drop")
    return y


def _mosaic_reason(products: Sequence[Product], moments: deferred.Moments | None) -> str | None:
    if (reason := compat.mosaic_reason()) is not None:
        return reason
    if moments is not None and (reason := deferred.reason_against_kernel()) is not None:
        return reason
    if len({(product.x.shape, getattr(product.x, "num_held", None)) for product in products}) > 1:
        return "it takes x of one shape and kind"
    return reason_against_products(products)
