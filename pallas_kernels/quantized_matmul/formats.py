"""Weights [I, O] in 8 or 4 bits: what the numbers mean, how they lie in memory, and how they are found.

    int8   w[i, o] ~ values[i, o] * scales[o]                   int8 [I, O], float32 [O]
    int4   w[i, o] ~ code(i, o) * scales[i // 128, o]           uint8 [64 P, O], bfloat16 [P, O], P = ceil(I / 128)

Four-bit codes go from -8 to 7 and are kept as 0 to 15. Byte (64 p + r, o) has in its low half that of input 128 p + r,
in its high half that of input 128 p + 64 + r: what is unpacked of 64 rows of bytes is two blocks of 64 inputs, each of
them whole, and nothing has to be interleaved. Inputs past I, up to a multiple of 128, are zero.

A scale of 4 bits is rounded to bfloat16 before codes are chosen, so that they make up for it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

FORMS = ("int8", "int4")
GROUP = 128  # inputs that share a scale in int4
HALF = GROUP // 2
# What the scale that just holds a group's largest weight is multiplied by, to be tried: the least squared error wins.
SHRINKING = tuple(1.0 - 0.02 * step for step in range(14))


class QuantizedWeight(NamedTuple):
    """A weight [I, O]; its form is told by the dtype of `values`. Arrays of JAX or numpy, or their descriptions.

    values: int8 [I, O], or uint8 [64 ceil(I / 128), O].
    scales: float32 [O], or bfloat16 [ceil(I / 128), O].
    """

    values: Any
    scales: Any

    @property
    def form(self) -> str:
        return "int8" if self.values.dtype == jnp.int8 else "int4"


def storage(form: str, num_inputs: int, num_outputs: int) -> QuantizedWeight:
    """The arrays of a weight [I, O] as jax.ShapeDtypeStructs.

    Raises:
      ValueError: an unknown form.
    """
    require_form(form)
    if form == "int8":
        values = jax.ShapeDtypeStruct((num_inputs, num_outputs), jnp.int8)
        return QuantizedWeight(values, jax.ShapeDtypeStruct((num_outputs,), jnp.float32))
    num_groups = -(-num_inputs // GROUP)
    values = jax.ShapeDtypeStruct((num_groups * HALF, num_outputs), jnp.uint8)
    return QuantizedWeight(values, jax.ShapeDtypeStruct((num_groups, num_outputs), jnp.bfloat16))


@functools.partial(jax.jit, static_argnames="form")
def quantize(weight: Float[Array, "I O"], form: str) -> QuantizedWeight:
    """Each weight to the nearest code. Memory: a few float32 copies of the weight.

    Raises:
      ValueError: an unknown form.
    """
    require_form(form)
    w = weight.astype(jnp.float32)
    if form == "int8":
        largest = jnp.max(jnp.abs(w), axis=0)
        scales = jnp.where(largest > 0, largest / 127, 1.0)
        return QuantizedWeight(jnp.round(w / scales).astype(jnp.int8), scales)
    w = jnp.pad(w, ((0, -w.shape[0] % GROUP), (0, 0)))
    groups = w.reshape(-1, GROUP, w.shape[1])
    scales = _best_scales(groups)
    return QuantizedWeight(pack(_codes(groups, scales).reshape(w.shape)), scales)


def dequantize(weight: QuantizedWeight, num_inputs: int) -> Float[Array, "I O"]:
    """The weight that a quantized one stands for, in float32."""
    if weight.form == "int8":
        return weight.values.astype(jnp.float32) * weight.scales
    codes = unpack(weight.values).astype(jnp.float32)
    groups = codes.reshape(-1, GROUP, codes.shape[-1]) * weight.scales.astype(jnp.float32)[:, None]
    return groups.reshape(codes.shape)[:num_inputs]


def pack(codes: Num[Array, "I O"]) -> Num[Array, "rows O"]:
    """Codes from -8 to 7, I a multiple of 128, two to a byte."""
    biased = (codes.astype(jnp.int32) + 8).astype(jnp.uint8).reshape(-1, 2, HALF, codes.shape[1])
    return (biased[:, 0] | (biased[:, 1] << 4)).reshape(-1, codes.shape[1])


def unpack(values: Num[Array, "rows O"]) -> Num[Array, "I O"]:
    """`pack`'s inverse, int8."""
    halves = values.reshape(-1, 1, HALF, values.shape[1])
    biased = jnp.concatenate([halves & 15, halves >> 4], axis=1)
    return (biased.astype(jnp.int8) - 8).reshape(-1, values.shape[1])


def require_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"a quantized weight's form is {form!r}; known are {', '.join(map(repr, FORMS))}")


def _codes(groups: Float[Array, "P 128 O"], scales: Float[Array, "P O"]) -> Float[Array, "P 128 O"]:
    return jnp.clip(jnp.round(groups / scales.astype(jnp.float32)[:, None]), -8, 7)


def _best_scales(groups: Float[Array, "P 128 O"]) -> Float[Array, "P O"]:
    """Of each group. Scales have a sign: the largest weight, whichever its own is, gets the code -8, which has no
    opposite."""
    place = jnp.argmax(jnp.abs(groups), axis=1, keepdims=True)
    largest = jnp.take_along_axis(groups, place, axis=1)[:, 0]
    largest = jnp.where(largest == 0, -8.0, largest)
    factors = jnp.asarray(SHRINKING, jnp.float32)

    def try_one(step, best):
        best_scales, least = best
        scales = (largest / -8 * factors[step]).astype(jnp.bfloat16)
        difference = _codes(groups, scales) * scales.astype(jnp.float32)[:, None] - groups
        error = jnp.sum(difference * difference, axis=1)
        better = error < least
        return jnp.where(better, scales, best_scales), jnp.where(better, error, least)

    none = jnp.zeros(largest.shape, jnp.bfloat16), jnp.full(largest.shape, jnp.inf, jnp.float32)
    return lax.fori_loop(0, len(SHRINKING), try_one, none)[0]
