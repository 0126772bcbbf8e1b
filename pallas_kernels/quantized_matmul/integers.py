"""Rows of x as integers, for products with weights of 8 and 4 bits that the tensor cores add up exactly.

    x[r, i] ~ (128 high + low) scale[r, i // 64]      high -128..127, low 0..127, scale a power of two

Codes of weights are integers already: as the operand of an instruction that multiplies integers four of them come out
of a word by one or two operations, where bfloat16 takes five to ten (fragments.py). high and low are rows of their own,
of which an instruction takes eight as fast as one.

    values  int8 [2 R, I]         rows 2 r and 2 r + 1: high and low of row r, one of R = 8 or 4 that are held
    blocks  int32 [I / 64, 2 R]   of each 64 inputs, at 2 r and 2 r + 1, the bits of scale, float32, and what takes off
                                  the offset in codes of 4 bits: -8 times the sum of 128 high + low; else 0

Four rows do for one or two tokens with a deferred norm (deferred.py): those of the tokens, and its scale and shift; and
for three or four where it is known what these two come to. An instruction with eight columns then has all parts, and
half as many sums are to be scaled.

Inputs are in the order in which a word has their codes, 16 by 16: place 4 q + j is the input 2 q + (0, 8, 1, 9)[j] for
weights of 4 bits and 2 q + (0, 1, 8, 9)[j] for 8.

Which models ask for it: falcon_jax/model/stages.py, integers_pay.

Rounding: a bfloat16 that is at least 1/64 of the largest one of its 64 inputs is kept as it is; others lose up to 2^-14
of that one, a thirty-second of what it has lost itself when it was rounded to bfloat16.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from pallas_kernels.quantized_matmul.formats import ROWS_AT_ONCE, require_form

BLOCK = 64  # inputs that share a scale
FEW_TOKENS = 2
NUM_AFFINE = 2  # the last rows, where a deferred norm has its scale and shift
# Rows that are held: all, few tokens with scale and shift, as many tokens alone.
ALL_ROWS = tuple(range(ROWS_AT_ONCE))
FEW_ROWS = (*range(FEW_TOKENS), *range(ROWS_AT_ONCE - NUM_AFFINE, ROWS_AT_ONCE))
TOKEN_ROWS = tuple(range(FEW_TOKENS + NUM_AFFINE))
LOW_BITS = 7
CODE_OFFSET = {"int8": 0, "int4": 8}  # that codes have as integers
_IN_WORD = {"int4": (1, 2, 0), "int8": (1, 0, 2)}  # q, e, h and q, h, e
_HIGHEST_EXPONENT = 13  # of 128 high + low
_SMALLEST = 2.0**-100  # so that the scale of zeros is a number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerRows:
    """x [8, I] as integers. form: of the weights that it is for. dtype: of that x. rows: which are held."""

    values: Any
    blocks: Any
    form: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    rows: tuple[int, ...] = dataclasses.field(default=ALL_ROWS, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Of the x that it stands for."""
        return ROWS_AT_ONCE, self.values.shape[1]

    @property
    def num_held(self) -> int:
        """Rows that it has."""
        return len(self.rows)

    @property
    def ndim(self) -> int:
        return 2

    def floats(self) -> Float[Array, "8 I"]:
        """That x but for rounding, float32; zeros in rows that it lacks."""
        num_rows, num_inputs = self.num_held, self.shape[1]
        high, low = self.values.astype(jnp.int32).reshape(num_rows, 2, num_inputs).swapaxes(0, 1)
        numbers = ((high << LOW_BITS) + low).astype(jnp.float32).reshape(num_rows, -1, BLOCK)
        scales = lax.bitcast_convert_type(self.blocks[:, ::2], jnp.float32).T
        held = in_order((numbers * scales[..., None]).reshape(num_rows, num_inputs), self.form, back=True)
        if num_rows == ROWS_AT_ONCE:
            return held
        return jnp.zeros((ROWS_AT_ONCE, num_inputs), jnp.float32).at[np.array(self.rows)].set(held)


def in_order(x: Shaped[Array, "R I"], form: str, *, back: bool = False) -> Shaped[Array, "R I"]:
    """Inputs as integers have them; or back from there."""
    axes = _IN_WORD[form]
    sizes = np.array([2, 4, 2])  # of an input's number within 16: h, q and e of formats.py
    split, order = (sizes[list(axes)], np.argsort(axes)) if back else (sizes, axes)
    x16 = x.reshape(*x.shape[:-1], -1, *split.tolist())
    first = x16.ndim - 3
    return x16.transpose(*range(first), *(first + int(axis) for axis in order)).reshape(x.shape)


def to_integers(x: Float[Array, "R I"], form: str, rows: tuple[int, ...] = ALL_ROWS) -> IntegerRows:
    """Those rows of x for products with weights of a form. I: a multiple of 64.

    Raises:
      ValueError: an unknown form, or another number of rows or inputs.
    """
    require_form(form)
    if x.shape[0] != ROWS_AT_ONCE or x.shape[1] % BLOCK:
        raise ValueError(f"x is {x.shape}; as integers it is {ROWS_AT_ONCE} rows of a multiple of {BLOCK}")
    if rows != ALL_ROWS:
        x = jnp.concatenate([x[row : row + 1] for row in rows])
    num_rows, num_inputs = x.shape
    ordered = in_order(x.astype(jnp.float32), form).reshape(num_rows, -1, BLOCK)
    scales = _scales(jnp.max(jnp.abs(ordered), axis=-1))
    numbers = jnp.round(ordered / scales[..., None]).astype(jnp.int32)
    values = jnp.stack([numbers >> LOW_BITS, numbers & (2**LOW_BITS - 1)], axis=1).astype(jnp.int8)
    offsets = -CODE_OFFSET[form] * numbers.sum(axis=-1)
    blocks = jnp.stack([lax.bitcast_convert_type(scales, jnp.int32), offsets], axis=-1)
    blocks = blocks.swapaxes(0, 1).reshape(-1, 2 * num_rows)
    return IntegerRows(values.reshape(2 * num_rows, num_inputs), blocks, form, x.dtype, rows)


@dataclasses.dataclass(frozen=True)
class Integers:
    """As which integers a kernel writes rows: for weights of a form, those rows."""

    form: str
    rows: tuple[int, ...] = ALL_ROWS

    @property
    def num_held(self) -> int:
        return len(self.rows)

    def of(self, x: Float[Array, "8 I"]) -> IntegerRows:
        return to_integers(x, self.form, self.rows)

    def described(self, num_inputs: int, dtype: DTypeLike) -> IntegerRows:
        """The arrays of such rows as jax.ShapeDtypeStructs."""
        values = jax.ShapeDtypeStruct((2 * self.num_held, num_inputs), jnp.int8)
        blocks = jax.ShapeDtypeStruct((num_inputs // BLOCK, 2 * self.num_held), jnp.int32)
        return IntegerRows(values, blocks, self.form, jnp.dtype(dtype), self.rows)


def _scales(largest: Array) -> Array:
    """Powers of two, by which the largest numbers are below 2^14, and at least half of that."""
    bits = lax.bitcast_convert_type(jnp.maximum(largest, _SMALLEST), jnp.int32)
    exponent = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    return exponent * 2.0**-_HIGHEST_EXPONENT
