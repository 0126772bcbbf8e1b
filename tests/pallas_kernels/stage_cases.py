"""Inputs of the stages' tests, for few rows and for many, and what comes out in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import Product, quantize
from pallas_kernels.quantized_matmul.reference import matmul_reference

FORMS = ("native", "int8", "int4")


def normal(seed: int, *shape: int, dtype="bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def weight(seed: int, num_inputs: int, num_outputs: int, form: str) -> Any:
    w = normal(seed, num_inputs, num_outputs) * num_inputs**-0.5
    return w if form == "native" else quantize(w, form)


def product_reference(product: Product) -> jax.Array:
    """In float32, from end to end."""
    x, w = product.x.astype(jnp.float32), product.weight
    if isinstance(w, jax.Array):
        y = jnp.matmul(x, w.astype(jnp.float32), precision="highest")
    else:
        y = matmul_reference(x, w, product.num_outputs)
    if product.bias is not None:
        y += product.bias.astype(jnp.float32)
    return jax.nn.gelu(y, approximate=False) if product.activation else y


def input_stage(form: str, num_inputs: int, outputs: tuple[int, ...], num_rows: int) -> list[Product]:
    """Products side by side: the second has a bias, the last GELU, and every other one reads another norm's output."""
    return [
        Product(
            normal(10 + i % 2, num_rows, num_inputs),
            weight(20 + i, num_inputs, num_outputs, form),
            num_outputs,
            normal(30 + i, num_outputs) if i == 1 else None,
            "gelu" if i == len(outputs) - 1 else None,
        )
        for i, num_outputs in enumerate(outputs)
    ]
