"""Rotary position embedding, the plain form."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "*rows M H"], cos: Float[Array, "*rows H"], sin: Float[Array, "*rows H"]
) -> Float[Array, "*rows M H"]:
    """Rotates each head's pairs (h, h + H/2); cos and sin are rounded to x's dtype first, as Falcon was trained."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos[..., None, :].astype(x.dtype) + turned * sin[..., None, :].astype(x.dtype)
