"""Products with quantized weights by plain JAX: the formula, and the order of operations that XLA runs best.

y[r, o] = sum_i x[r, i] w[i, o], w as in formats.py
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from pallas_kernels.quantized_matmul.formats import QuantizedWeight, dequantize, dequantize_transposed, unpack


def matmul_reference(x: Float[Array, "*rows I"], weight: QuantizedWeight, num_outputs: int) -> Float[Array, "*rows O"]:
    """The formula, weights and products in float32, rounded once to x's dtype."""
    w = dequantize(weight, x.shape[-1], num_outputs)
    y = jnp.matmul(x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def matmul_xla(x: Float[Array, "*rows I"], weight: QuantizedWeight, num_outputs: int) -> Float[Array, "*rows O"]:
    """Codes in x's dtype, which holds them exactly, are the operands of one product (int8); weights rounded to x's
    dtype are (int4), since a product for each group would keep all its sums.

    A weight is unpacked when x is there and not before: XLA would else unpack those of many layers at once, and hold
    a second model in memory.
    """
    x, values = lax.optimization_barrier((x, weight.values))
    weight = QuantizedWeight(values, weight.scales)
    if weight.form == "int8":
        y = _product(x, unpack(weight.values), num_outputs) * weight.scales.reshape(-1)[:num_outputs]
    else:
        y = _product(x, dequantize_transposed(weight), num_outputs)
    return y.astype(x.dtype)


def _product(x: Array, w: Num[Array, "outputs inputs"], num_outputs: int) -> Array:
    # Cut before the product: the kernel that unpacks leaves out what fills the last tiles, and x need not be padded.
    w = w[:num_outputs, : x.shape[-1]].astype(x.dtype)
    return lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), computed in float32 by erf as modeling_falcon.py does, in x's dtype.

    jax.nn.gelu computes it by erfc, with which a long prompt spent a twentieth of its time on a GPU here
    (benchmarks/LOG.md). What erf costs is accuracy relative to results below 1e-6.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)
