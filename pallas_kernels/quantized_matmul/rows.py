"""Tiles of a few rows in registers, as what comes after the products has them, and what a layer norm knows of a row."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.instructions import integer, own_thread
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE


def _by_rows(num_outputs: int) -> Any:
    tiling = plgpu.Tiling(((8, num_outputs), (2, num_outputs), (num_outputs // 16,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


# [8 rows, 64 outputs]: a warp has two rows, a thread four outputs of one. And of half as many, two.
ROWS, HALF_ROWS = _by_rows(TILE), _by_rows(TILE // 2)
PER_COLUMN = ROWS.reduce(0)  # an output, which is a column there


def own_place() -> tuple[ir.Value, ir.Value]:
    """In emitted code: the row that a thread has in ROWS, and of its columns the first, counted in fours."""
    return arith.divui(own_thread(), integer(16)), arith.remui(own_thread(), integer(16))


def of_registers(registers: Sequence[ir.Value], shape: tuple[int, int]) -> Any:
    """In emitted code: a float32 array as ROWS, of what a thread has of it in order."""
    layout = ROWS.to_mgpu()
    made = np.empty(layout.registers_shape(shape), dtype=object)
    made.flat[:] = registers
    return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)


def load(ref: Any, layout: Any = ROWS) -> Any:
    """A reference's array in registers; it need not fill whole lines of memory."""
    return plgpu.load(ref, layout=layout, optimized=False)


def over_rows(x: Any, dims: tuple[int, ...]) -> Any:
    """A value an output, repeated over the rows."""
    return lax.broadcast_in_dim(x, dims, [1])


def over_outputs(x: Any, dims: tuple[int, ...]) -> Any:
    """A value a row, repeated over the outputs."""
    return lax.broadcast_in_dim(x, dims, [0])


def number_of(shape: tuple[int, ...], axis: int) -> Any:
    """Each element's row or column, int32."""
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, axis), ROWS)


def moments_of_tile(y: Any) -> tuple[Any, Any]:
    """Of float32 y [R, 64], each row's mean and sum of squared distances from it."""
    mean = y.sum(axis=1) * (1.0 / TILE)
    distance = y - over_outputs(mean, y.shape)
    return mean, (distance * distance).sum(axis=1)


def moments_of_rows(means: Any, squares: Any, width: int, epsilon: float) -> tuple[Any, Any]:
    """Of 8 rows of `width`, from their tiles' moments [8, P]: the mean, and the inverse of the standard deviation.

    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
    """
    num_tiles = width // TILE
    exists = number_of(means.shape, 1) < num_tiles
    mean = jnp.where(exists, means, 0.0).sum(axis=1) * (1.0 / num_tiles)
    distance = means - over_outputs(mean, means.shape)
    squares = jnp.where(exists, squares + distance * distance * float(TILE), 0.0)
    return mean, lax.rsqrt(squares.sum(axis=1) * (1.0 / width) + epsilon)
