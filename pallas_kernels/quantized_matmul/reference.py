"""Products with quantized weights by plain JAX: the formula, and the order of operations that XLA runs best.

y[r, o] = sum_i x[r, i] w[i, o], w as in formats.py
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul.formats import QuantizedWeight, dequantize


def matmul_reference(x: Float[Array, "*rows I"], weight: QuantizedWeight) -> Float[Array, "*rows O"]:
    """The formula, weights and products in float32, rounded once to x's dtype."""
    y = jnp.matmul(x.astype(jnp.float32), dequantize(weight, x.shape[-1]), precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def matmul_xla(x: Float[Array, "*rows I"], weight: QuantizedWeight) -> Float[Array, "*rows O"]:
    """Codes in x's dtype, which holds them exactly, are the operands of one product (int8); weights rounded to x's
    dtype are (int4), since a product for each group would keep all its sums."""
    if weight.form == "int8":
        y = _product(x, weight.values.astype(x.dtype)) * weight.scales
        return y.astype(x.dtype)
    return _product(x, dequantize(weight, x.shape[-1]).astype(x.dtype)).astype(x.dtype)


def _product(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
