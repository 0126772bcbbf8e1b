"""The output stage by plain JAX: the formula, and the order of operations and roundings of the model's own layers.

out = sum of (x @ weight) + biases + residual;  normed = (out - mean) / sqrt(variance + epsilon) * scale + shift
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul import Product, QuantizedWeight, dequantize, project

Norm = tuple[Float[Array, " D"], Float[Array, " D"]]


def attention_norm_reference(
    xs: Sequence[Array],
    weights: Sequence[Any],
    biases: Sequence[Array],
    residual: Array,
    norms: Sequence[Norm],
    epsilon: float,
) -> tuple[Array, list[Array]]:
    """The formula, all of it in float32 until the end."""
    out = residual.astype(jnp.float32)
    for x, weight in zip(xs, weights, strict=True):
        if isinstance(weight, QuantizedWeight):
            weight = dequantize(weight, x.shape[-1], residual.shape[-1])
        out += jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    out += sum(bias.astype(jnp.float32) for bias in biases)
    return out.astype(residual.dtype), [layer_norm(out, norm, epsilon).astype(residual.dtype) for norm in norms]


def attention_norm_xla(
    xs: Sequence[Array],
    weights: Sequence[Any],
    biases: Sequence[Array],
    residual: Array,
    norms: Sequence[Norm],
    epsilon: float,
) -> tuple[Array, list[Array]]:
    """As a Falcon layer does it: each product rounded, the last one first, the residual last."""
    D = residual.shape[-1]
    every_bias = list(biases) or [None] * len(xs)
    products = [Product(x, weight, D, bias) for x, weight, bias in zip(xs, weights, every_bias, strict=True)]
    out = add_xla(products) + residual
    return out, [layer_norm(out, norm, epsilon) for norm in norms]


def add_xla(products: Sequence[Product]) -> Array:
    """The sum of products, each rounded, the last one first."""
    made = project(products, implementation="xla")
    return sum(reversed(made[:-1]), made[-1])


def layer_norm(x: Float[Array, "... D"], norm: Norm, epsilon: float) -> Float[Array, "... D"]:
    """Over the last axis: statistics and affine in float32, rounded once to x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * norm[0].astype(jnp.float32) + norm[1].astype(jnp.float32)).astype(x.dtype)
