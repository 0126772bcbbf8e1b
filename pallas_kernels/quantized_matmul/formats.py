"""Weights [I, O] in 8 or 4 bits: what the numbers mean, how they lie in memory, and how they are found.

    int8   w[i, o] ~ code(i, o) * scale[o]             codes -127..127, a float32 scale for each output
    int4   w[i, o] ~ code(i, o) * scale[i // 128, o]   codes -8..7, a bfloat16 scale for each output and 128 inputs

A weight is cut into tiles of 64 outputs and 128 inputs (a group), Q = ceil(O / 64) by P = ceil(I / 128) of them:

    int8   values int32 [Q, P, 2048]   scales float32 [Q, 64]
    int4   values int32 [Q, P, 1024]   scales bfloat16 [Q, P, 64]

The last axis of the values tells the form. Inputs past I and outputs past O, which fill the last tiles, have code 0 and
some finite scale.

A tile's words are the registers of the 128 threads of a warpgroup, for which it is the left operand of Hopper's wgmma:
they read it straight from memory, with no shared memory between. One wgmma takes 16 inputs, so a tile is 8 steps. Of
step s (0..7), thread t = 32 W + 4 g + q in warp W (0..3), g (0..7), q (0..3), holds eight codes (r, h, e: 0 or 1):

    output 16 W + 8 r + g of the tile's 64      input 16 s + 8 h + 2 q + e of its 128

Those eight are one word in int4 (its word j = s) and two in int8 (its word j = 2 s + r). Counted from the word's lowest
bit, a code lies in

    int4   the 4 bits from 4 (2 h + r + 4 e), as code + 8
    int8   the 8 bits from 8 (2 h + e), as code + 128

A register of the operand holds the pair e = 0, 1 in its halves. In int4 these are 16 bits apart: one shift and one mask
bring both to where they belong. Word j of thread t is the tile's word 512 (j // 4) + 4 t + j % 4: a thread reads 16
bytes at a time, and threads lie side by side.

So all codes, in the order of their bits, are an array of the axes [Q, P, j // 4, W, g, q, j % 4, place in the word],
and one transposition leads from it to the matrix: `_Coding.order` and `_IN_MATRIX` name the axes of both.

A scale of 4 bits is rounded to bfloat16 before codes are chosen, so that they make up for it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

GROUP, TILE_OUTPUTS = 128, 64  # inputs and outputs of a tile
ROWS_AT_ONCE = 8  # of x, by the matrix instruction
# What the scale that just holds a group's largest weight is multiplied by, to be tried: the least squared error wins.
SHRINKING = tuple(1.0 - 0.02 * step for step in range(14))

# The axes of a matrix of codes, by the letters above, slowest first: outputs, then inputs. A step's number is two axes:
# S counts the 16 bytes that a thread reads at once, s the steps in them.
_IN_MATRIX = "QWrgPSshqe"


class _Coding(NamedTuple):
    """How a form's codes lie in words.

    bits: of a code.
    bias: is added to make it positive.
    steps: in a thread's 16 bytes.
    order: of the axes, as _IN_MATRIX; the last are a word's codes, from the lowest bits up.
    """

    bits: int
    bias: int
    steps: int
    order: str

    @property
    def codes_per_word(self) -> int:
        return 32 // self.bits

    @property
    def words_per_tile(self) -> int:
        return GROUP * TILE_OUTPUTS // self.codes_per_word


_CODINGS = {"int8": _Coding(8, 128, 2, "QPSWgqsrhe"), "int4": _Coding(4, 8, 4, "QPSWgqsehr")}
FORMS = tuple(_CODINGS)


class QuantizedWeight(NamedTuple):
    """A weight [I, O]; its form is told by the last axis of `values`. Arrays of JAX or numpy, or their descriptions.

    values: int32 [Q, P, 2048] (int8) or [Q, P, 1024] (int4), Q = ceil(O / 64), P = ceil(I / 128).
    scales: float32 [Q, 64] (int8) or bfloat16 [Q, P, 64] (int4).
    """

    values: Any
    scales: Any

    @property
    def form(self) -> str:
        """Raises ValueError where it is none."""
        return _form_of(self.values)


def storage(form: str, num_inputs: int, num_outputs: int) -> QuantizedWeight:
    """The arrays of a weight [I, O] as jax.ShapeDtypeStructs.

    Raises:
      ValueError: an unknown form.
    """
    require_form(form)
    tiles = (-(-num_outputs // TILE_OUTPUTS), -(-num_inputs // GROUP))
    values = jax.ShapeDtypeStruct((*tiles, _CODINGS[form].words_per_tile), jnp.int32)
    if form == "int8":
        return QuantizedWeight(values, jax.ShapeDtypeStruct((tiles[0], TILE_OUTPUTS), jnp.float32))
    return QuantizedWeight(values, jax.ShapeDtypeStruct((*tiles, TILE_OUTPUTS), jnp.bfloat16))


@functools.partial(jax.jit, static_argnames="form")
def quantize(weight: Float[Array, "I O"], form: str) -> QuantizedWeight:
    """Each weight to the nearest code. Memory: a few float32 copies of the weight.

    Raises:
      ValueError: an unknown form.
    """
    require_form(form)
    w = jnp.pad(weight.astype(jnp.float32), ((0, -weight.shape[0] % GROUP), (0, -weight.shape[1] % TILE_OUTPUTS)))
    if form == "int8":
        largest = jnp.max(jnp.abs(w), axis=0)
        scales = jnp.where(largest > 0, largest / 127, 1.0)
        return QuantizedWeight(pack(jnp.round(w / scales).T, form), scales.reshape(-1, TILE_OUTPUTS))
    groups = w.reshape(-1, GROUP, w.shape[1])
    scales = best_scales(groups)
    codes = nearest_codes(groups, scales).reshape(w.shape)
    return QuantizedWeight(pack(codes.T, form), scales.reshape(len(groups), -1, TILE_OUTPUTS).swapaxes(0, 1))


def dequantize(weight: QuantizedWeight, num_inputs: int, num_outputs: int) -> Float[Array, "I O"]:
    """The weight [num_inputs, num_outputs] that a quantized one stands for, in float32."""
    return dequantize_transposed(weight)[:num_outputs, :num_inputs].T


def dequantize_transposed(weight: QuantizedWeight) -> Float[Array, "outputs inputs"]:
    """Whole tiles in float32, [64 Q, 128 P]: zeros past the weight's own outputs and inputs."""
    codes, scales = unpack(weight.values).astype(jnp.float32), weight.scales.astype(jnp.float32)
    if weight.form == "int8":
        return codes * scales.reshape(-1, 1)
    num_tiles = weight.values.shape[:2]
    groups = codes.reshape(num_tiles[0], TILE_OUTPUTS, num_tiles[1], GROUP)
    return (groups * scales.swapaxes(1, 2)[..., None]).reshape(codes.shape)


def output_rows(weight: QuantizedWeight, outputs: Int[Array, "*any"]) -> Float[Array, "*any inputs"]:
    """What an int8 weight stands for in some outputs' columns, as rows in float32: [..., 128 P], zeros past its inputs.

    Raises:
      ValueError: a weight of another form.
    """
    if weight.form != "int8":
        raise ValueError(f"output_rows takes a weight of 'int8', not {weight.form!r}")
    Q, P, _ = weight.values.shape
    words = weight.values.reshape(Q, P, 4, 4, 8, 4, 2, 2)  # Q P S W g q s r
    flat = outputs.reshape(-1)
    tile, place = flat // TILE_OUTPUTS, flat % TILE_OUTPUTS
    W, r, g = place // 16, place // 8 % 2, place % 8
    found = words[tile, :, :, W, g, :, :, r]  # [outputs, P, S, q, s]
    codes = _codes(found, _CODINGS["int8"]).reshape(*found.shape, 2, 2)  # a word's are h and e
    codes = codes.transpose(0, 1, 2, 4, 5, 3, 6).reshape(len(flat), P * GROUP)  # inputs go by P S s h q e
    rows = codes.astype(jnp.float32) * weight.scales.reshape(-1)[flat][:, None]
    return rows.reshape(*outputs.shape, P * GROUP)


def pack(codes: Num[Array, "outputs inputs"], form: str) -> Int[Array, "Q P words"]:
    """The words of whole tiles of a form's codes [64 Q, 128 P]."""
    coding = _CODINGS[form]
    tiles = (codes.shape[0] // TILE_OUTPUTS, codes.shape[1] // GROUP)
    biased = (codes.astype(jnp.int32) + coding.bias).astype(jnp.uint32)
    ordered = _reordered(biased, coding, tiles, _IN_MATRIX, coding.order)
    placed = ordered.reshape(*tiles, coding.words_per_tile, coding.codes_per_word) << _places(coding)
    # No two share a bit, so that the sum is their union.
    return lax.bitcast_convert_type(jnp.sum(placed, axis=-1, dtype=jnp.uint32), jnp.int32)


def unpack(values: Int[Array, "Q P words"]) -> Int[Array, "outputs inputs"]:
    """`pack`'s inverse: int32 codes [64 Q, 128 P]. XLA fuses all of it, and what follows up to a product, into one
    kernel."""
    coding, tiles = _CODINGS[_form_of(values)], values.shape[:2]
    ordered = _reordered(_codes(values, coding), coding, tiles, coding.order, _IN_MATRIX)
    return ordered.reshape(tiles[0] * TILE_OUTPUTS, tiles[1] * GROUP)


def require_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"a quantized weight's form is {form!r}; known are {', '.join(map(repr, FORMS))}")


def _form_of(values: Any) -> str:
    forms = {coding.words_per_tile: form for form, coding in _CODINGS.items()}
    if len(values.shape) != 3 or values.shape[2] not in forms:
        raise ValueError(f"values are {values.shape}; the last of their three axes is {' or '.join(map(str, forms))}")
    return forms[values.shape[2]]


def _codes(words: Int[Array, "*any"], coding: _Coding) -> Int[Array, "*any codes"]:
    """Those in each word, from the lowest bits up."""
    bits = lax.bitcast_convert_type(words, jnp.uint32)[..., None] >> _places(coding)
    return (bits & (2**coding.bits - 1)).astype(jnp.int32) - coding.bias


def _places(coding: _Coding) -> Array:
    """The lowest bit of each of a word's codes."""
    return jnp.arange(coding.codes_per_word, dtype=jnp.uint32) * coding.bits


def _reordered(codes: Array, coding: _Coding, tiles: tuple[int, ...], source: str, target: str) -> Array:
    """The codes of [Q, P] tiles from one order of the axes to another."""
    sizes = dict(zip("QP", tiles, strict=True)) | {"S": 8 // coding.steps, "s": coding.steps}
    sizes |= {"W": 4, "g": 8, "q": 4, "r": 2, "h": 2, "e": 2}
    return codes.reshape([sizes[axis] for axis in source]).transpose([source.index(axis) for axis in target])


def nearest_codes(groups: Float[Array, "P 128 O"], scales: Float[Array, "P O"]) -> Float[Array, "P 128 O"]:
    """Of 4 bits."""
    return jnp.clip(jnp.round(groups / scales.astype(jnp.float32)[:, None]), -8, 7)


def best_scales(
    groups: Float[Array, "P 128 O"], importance: Float[Array, "P 128"] | None = None
) -> Float[Array, "P O"]:
    """Of each group, of 4 bits. They have a sign: the largest weight, whichever its own is, gets the code -8, which has
    no opposite.

    Args:
      importance: what the squared error of an input's weights counts; None: all the same.
    """
    place = jnp.argmax(jnp.abs(groups), axis=1, keepdims=True)
    largest = jnp.take_along_axis(groups, place, axis=1)[:, 0]
    largest = jnp.where(largest == 0, -8.0, largest)
    factors = jnp.asarray(SHRINKING, jnp.float32)

    def try_one(step, best):
        found, least = best
        scales = (largest / -8 * factors[step]).astype(jnp.bfloat16)
        difference = nearest_codes(groups, scales) * scales.astype(jnp.float32)[:, None] - groups
        weighed = difference * difference if importance is None else difference * difference * importance[..., None]
        error = jnp.sum(weighed, axis=1)
        better = error < least
        return jnp.where(better, scales, found), jnp.where(better, error, least)

    none = jnp.zeros(largest.shape, jnp.bfloat16), jnp.full(largest.shape, jnp.inf, jnp.float32)
    return lax.fori_loop(0, len(SHRINKING), try_one, none)[0]
