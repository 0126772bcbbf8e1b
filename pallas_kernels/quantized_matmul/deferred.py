"""Layer norms that end in the products which read them, for a few rows.

With mean m and standard deviation s of a row x, and scale g and shift h of a norm, a product of the normalized row is

    ((x - m) / s * g + h) @ W = ((x * g) @ W - m (g @ W)) / s + h @ W

So what makes x does not wait for m and s, for which its blocks would have to meet: it writes x * g and, of each tile of
64, what m and s can be put together from. What reads them has m and s long before it has the products. g @ W and h @ W
cost nothing: a matrix instruction multiplies eight rows as fast as one, and g and h are the last two. Where x comes as
integers, two rows each, that holds for two tokens; of four it is faster to have g @ W and h @ W made once and for all
(`Product.affine`).

    rows    [8, D]      x * g in x's dtype; in the last two rows g and h
    tiles   [2, 8, P]   float32, of each row of a tile: its mean, and the sum of squared distances from that

Rounding: a norm rounds (x - m) / s * g + h, this rounds x * g. x itself has been rounded to that precision before, so
that rows far from zero lose no more here than they have already.

Source: Graef, Wasielewski and Clapp, FlashNorm: fast normalization for LLMs (2024), which defers what divides a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.integers import NUM_AFFINE, IntegerRows
from pallas_kernels.quantized_matmul.product import ROWS_AT_ONCE, SIDE

SCALE_ROW, SHIFT_ROW = range(ROWS_AT_ONCE - NUM_AFFINE, ROWS_AT_ONCE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """What the products of deferred norms must know of x.

    tiles: float32 [2, 8, P], as above.
    epsilon: is added to the variance.
    """

    tiles: Any
    epsilon: float = dataclasses.field(metadata={"static": True})


def fits(num_tokens: int, width: int) -> bool:
    """Whether norms of so many rows of x can be deferred, and end in a kernel where there are kernels."""
    return num_tokens <= SCALE_ROW and width % SIDE == 0 and reason_against_kernel() is None


def reason_against_kernel() -> str | None:
    """Why the input stage's kernel cannot end a norm, or None where it can."""
    # Compiled for an H100 with jax 0.12.0.1, it was still looking for layouts after a minute; 0.11.2 takes a second.
    return "jax 0.12 finds no layouts for a deferred norm" if jax.__version_info__ >= (0, 12) else None


def padded_tiles(width: int) -> int:
    """P: a warpgroup has 64 of them side by side. What lies past the last tile may be anything."""
    return -(-width // TILE // TILE) * TILE


def begin(
    x: Float[Array, "8 D"], norms: Sequence[tuple[Array, Array]], epsilon: float
) -> tuple[list[Float[Array, "8 D"]], Moments]:
    """By plain JAX, what an output stage makes of the x that it has made: the rows for each norm, and x's moments."""
    y, row = x.astype(jnp.float32), jnp.arange(ROWS_AT_ONCE)[:, None]

    def with_affine(scale: Array, shift: Array) -> Array:
        # Chosen in one operation, where writing rows into an array would be a copy each.
        scale, shift = scale.astype(jnp.float32), shift.astype(jnp.float32)
        return jnp.where(row == SCALE_ROW, scale, jnp.where(row == SHIFT_ROW, shift, y * scale)).astype(x.dtype)

    rows = [with_affine(scale, shift) for scale, shift in norms]
    tiles = y.reshape(ROWS_AT_ONCE, -1, TILE)
    means = tiles.mean(axis=-1)
    squares = jnp.square(tiles - means[..., None]).sum(axis=-1)
    missing = padded_tiles(x.shape[-1]) - means.shape[-1]
    return rows, Moments(jnp.pad(jnp.stack([means, squares]), ((0, 0), (0, 0), (0, missing))), epsilon)


def finish(rows: Float[Array, "8 D"], moments: Moments) -> Float[Array, "8 D"]:
    """By plain JAX, the normalized rows, in the dtype of `rows`; of the last two anything."""
    y = rows.astype(jnp.float32)
    return end(y, y[SCALE_ROW], y[SHIFT_ROW], moments, rows.shape[-1]).astype(rows.dtype)


def end(
    y: Float[Array, "8 O"], scale: Float[Array, " O"], shift: Float[Array, " O"], moments: Moments, width: int
) -> Float[Array, "8 O"]:
    """By plain JAX, of products of the rows, or of themselves, those of the normalized rows. scale, shift: in place of
    x, what they come to. width: of x."""
    means, squares = moments.tiles[:, :, : width // TILE]
    mean = means.mean(axis=-1, keepdims=True)
    variance = (squares + TILE * jnp.square(means - mean)).sum(axis=-1, keepdims=True) / width
    return (y - mean * scale) * lax.rsqrt(variance + moments.epsilon) + shift


def check(products: Sequence[Any], moments: Moments | None) -> None:
    """Raises ValueError where the products' rows are not as these moments need them."""
    if moments is None:
        if any(product.affine is not None for product in products):
            raise ValueError("project: what scale and shift of a deferred norm come to is given without its moments")
        return
    for product in products:
        rows, tiles = product.x.shape, moments.tiles.shape
        if len(rows) != 2 or rows[0] != ROWS_AT_ONCE or tiles != (2, ROWS_AT_ONCE, padded_tiles(rows[1])):
            wanted = f"{ROWS_AT_ONCE} rows, the last two of them its scale and shift"
            raise ValueError(f"project: moments {tiles} do not fit rows {rows}; a deferred norm has {wanted}")
        holds_affine = not isinstance(product.x, IntegerRows) or SHIFT_ROW in product.x.rows
        if holds_affine == (product.affine is not None):
            lacks = "both in x and" if holds_affine else "neither in x nor"
            raise ValueError(f"project: scale and shift of a deferred norm are {lacks} beside it; give them once")
