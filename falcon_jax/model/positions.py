"""Positions: ALiBi slopes, and RoPE angles with the scalings published for Falcon.

The trap: Falcon adds ALiBi to q . k before scaling both by 1 / sqrt(H), so the slopes here act 1 / sqrt(H) weaker than
in the paper. The attention function applies that scale; these are the paper's slopes.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from falcon_jax.config import FalconConfig, Rope


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes [N] in float32: a geometric sequence, for a head count off the powers of two filled up from the next.

    Source: Press et al., Train Short, Test Long (2022), and build_alibi_tensor of modeling_falcon.py.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (n + 1) / power) for n in range(power)]
    extra = [2.0 ** (-4.0 * (2 * n + 1) / power) for n in range(num_heads - power)]
    return np.asarray(slopes + extra, np.float32)


def rotary_angles(
    rope: Rope, head_dim: int, positions: Int[Array, "B T"], num_tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """cos and sin [B, T, H] in float32 for the given positions, times the scaling's attention factor.

    `num_tokens` [B] is each row's length including these tokens; dynamic scaling alone depends on it, and rotates
    every position of a row, old ones too, by that length's frequencies.
    Source: modeling_rope_utils.py of transformers, the functions of the same names.
    """
    if rope.scaling == "dynamic":
        assert rope.original_max_tokens is not None
        stretch = jnp.maximum(num_tokens, rope.original_max_tokens).astype(jnp.float32) / rope.original_max_tokens
        base = rope.theta * (rope.factor * stretch - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        inverse_frequencies = 1.0 / base[:, None] ** exponents[None, :]  # [B, H/2]
        factor = rope.table_scale
    else:
        frequencies, factor = _static_frequencies(rope, head_dim)
        inverse_frequencies = jnp.asarray(frequencies)[None, :]
    angles = positions.astype(jnp.float32)[:, :, None] * inverse_frequencies[:, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def keeps_unrotated_keys(config: FalconConfig) -> bool:
    """Whether the cache must hold keys before rotation: dynamic scaling turns old keys anew as a row grows."""
    return config.rope is not None and config.rope.scaling == "dynamic"


def _static_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H/2] in float32 and the factor on cos and sin, for all scalings but the dynamic one."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.float32(rope.theta) ** exponents
    if rope.scaling == "default":
        return 1.0 / wavelengths, rope.table_scale
    if rope.scaling == "linear":
        return 1.0 / wavelengths / np.float32(rope.factor), rope.table_scale

    # YaRN: fast dimensions keep their frequency, slow ones are interpolated, a linear ramp lies between.
    original = rope.original_max_tokens
    assert original is not None

    def dimension_turning(num_rotations: float) -> float:
        turns = original / (num_rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = ramp / (np.float32(rope.factor) * wavelengths) + (1 - ramp) / wavelengths
    return frequencies.astype(np.float32), rope.table_scale
