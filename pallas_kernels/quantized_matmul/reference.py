"""Products with quantized weights by plain JAX: the formula, and the order of operations that XLA runs best.

y[r, o] = sum_i x[r, i] w[i, o], w as in formats.py
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from pallas_kernels.quantized_matmul.formats import QuantizedWeight, dequantize, dequantize_transposed, unpack


def matmul_reference(x: Float[Array, "*rows I"], weight: QuantizedWeight, num_outputs: int) -> Float[Array, "*rows O"]:
    """The formula, weights and products in float32, rounded once to x's dtype."""
    w = dequantize(weight, x.shape[-1], num_outputs)
    y = jnp.matmul(x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def matmul_xla(
    x: Float[Array, "*rows I"], weight: QuantizedWeight, num_outputs: int, dtype: DTypeLike | None = None
) -> Float[Array, "*rows O"]:
    """Codes in x's dtype, which holds them exactly, are the operands of one product (int8); weights rounded to x's
    dtype are (int4), since a product for each group would keep all its sums.

    A weight is unpacked when x is there and not before: XLA would else unpack those of many layers at once, and hold
    a second model in memory. So would a gradient that kept what was unpacked: it is unpacked again for it.

    Differentiable in x, and in that alone: the weight is a constant, whose gradient comes out as zero.

    dtype: of the result; None for x's.
    """
    return _matmul(x, weight, (x.shape[-1], num_outputs), (x.dtype, jnp.dtype(dtype or x.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: Array, weight: QuantizedWeight, sizes: tuple[int, int], dtypes: tuple[Any, Any]) -> Array:
    """dtypes: x's and the result's."""
    x, values = lax.optimization_barrier((x, weight.values))
    w, scales = _operands(QuantizedWeight(values, weight.scales), sizes)
    y = _product(x, w, over=1)
    return (y if scales is None else y * scales).astype(dtypes[1])


def _matmul_forward(
    x: Array, weight: QuantizedWeight, sizes: tuple[int, int], dtypes: tuple[Any, Any]
) -> tuple[Array, QuantizedWeight]:
    return _matmul(x, weight, sizes, dtypes), weight


def _matmul_backward(
    sizes: tuple[int, int], dtypes: tuple[Any, Any], weight: QuantizedWeight, dy: Array
) -> tuple[Array, QuantizedWeight]:
    """dx = dy w^T, rounded to x's dtype, in which dy is multiplied."""
    dy, values = lax.optimization_barrier((dy, weight.values))
    w, scales = _operands(QuantizedWeight(values, weight.scales), sizes)
    scaled = (dy if scales is None else dy.astype(jnp.float32) * scales).astype(dtypes[0])
    nothing = QuantizedWeight(np.zeros(values.shape, jax.dtypes.float0), jnp.zeros_like(weight.scales))
    return _product(scaled, w, over=0).astype(dtypes[0]), nothing


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _operands(weight: QuantizedWeight, sizes: tuple[int, int]) -> tuple[Num[Array, "O I"], Float[Array, " O"] | None]:
    """What x is multiplied with, and what the product is: None for nothing more.

    Cut before the product: the kernel that unpacks leaves out what fills the last tiles, and x need not be padded.
    """
    num_inputs, num_outputs = sizes
    if weight.form == "int8":
        return unpack(weight.values)[:num_outputs, :num_inputs], weight.scales.reshape(-1)[:num_outputs]
    return dequantize_transposed(weight)[:num_outputs, :num_inputs], None


def _product(x: Array, w: Num[Array, "O I"], *, over: int) -> Array:
    """Over w's axis `over`, w in x's dtype, summed up and left in float32."""
    contract = (((x.ndim - 1,), (over,)), ((), ()))
    return lax.dot_general(x, w.astype(x.dtype), contract, preferred_element_type=jnp.float32)


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), computed in float32 by erf as modeling_falcon.py does, in x's dtype.

    jax.nn.gelu computes it by erfc, with which a long prompt spent a twentieth of its time on a GPU here
    (benchmarks/LOG.md). What erf costs is accuracy relative to results below 1e-6.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)
