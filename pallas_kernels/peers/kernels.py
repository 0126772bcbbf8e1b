"""The kernels of `add_rows` and `gather_columns`: a block for each tile of 64 columns. Pallas, Mosaic GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import store
from pallas_kernels.peers.exchange import Exchange, add_up, launch_of, swap
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.product import ROWS_AT_ONCE
from pallas_kernels.quantized_matmul.rows import load


@functools.partial(jax.jit, static_argnames="exchange")
def add_kernel(x: Float[Array, "R D"], table: Int[Array, " E"], exchange: Exchange) -> Float[Array, "R D"]:
    """The sum over devices, for R a multiple of 8; zeros in rows that mean nothing."""

    def body(x: Any, table: Any, out: Any) -> None:
        tile = lax.axis_index("tile")
        columns = pl.ds(tile * TILE, TILE)
        launch = launch_of(exchange, table, tile)
        own = load(x.at[:, columns]).astype(jnp.float32)
        made = add_up(exchange, table, own, tile=tile, launch=launch)
        store(out.at[:, columns], made.astype(out.dtype))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[1] // TILE,),
        grid_names=("tile",),
        kernel_name="add_rows",
    )(x, table)


@functools.partial(jax.jit, static_argnames="exchange")
def gather_kernel(x: Float[Array, "R W"], table: Int[Array, " E"], exchange: Exchange) -> Float[Array, "R nW"]:
    """All devices' columns, for R a multiple of 8 and W of 64; zeros in rows that mean nothing."""
    rows, width = x.shape

    def body(x: Any, table: Any, out: Any) -> None:
        tile, eighth = lax.axis_index("tile"), lax.axis_index("eighth")
        eight = pl.ds(eighth * ROWS_AT_ONCE, ROWS_AT_ONCE)
        launch = launch_of(exchange, table, tile, eighth)
        own = load(x.at[eight, pl.ds(tile * TILE, TILE)])
        parts = swap(exchange, table, own, tile=tile, launch=launch, eighth=eighth)
        for i, part in enumerate(parts):
            store(out.at[eight, pl.ds(i * width + tile * TILE, TILE)], part)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, exchange.count * width), x.dtype),
        grid=(width // TILE, rows // ROWS_AT_ONCE),
        grid_names=("tile", "eighth"),
        kernel_name="gather_columns",
    )(x, table)
