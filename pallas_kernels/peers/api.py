"""What the devices of a mesh's tensor axis make together of rows: `add_rows` and `gather_columns`.

Both are called inside shard_map, on what a device has.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.peers.memory import Addresses
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.product import in_eights


def add_rows(x: Float[Array, "rows D"], table: Int[Array, " E"], addresses: Addresses) -> Float[Array, "rows D"]:
    """All devices' x added up, in float32 and in the same order on each.

    Args:
      x: D a multiple of 64.
      table: the device's own row of `addresses.table`.

    Raises:
      ValueError: the mailboxes have no room for x.
    """
    _require_room("add_rows", x, addresses)
    from pallas_kernels.peers.exchange import Exchange
    from pallas_kernels.peers.kernels import add_kernel

    return add_kernel(in_eights(x), table, Exchange.of(addresses, x.shape[0]))[: x.shape[0]]


def gather_columns(x: Float[Array, "rows W"], table: Int[Array, " E"], addresses: Addresses) -> Float[Array, "rows nW"]:
    """All devices' columns side by side, in the order of the axis.

    Args:
      x: float32.
      table: the device's own row of `addresses.table`.

    Raises:
      ValueError: the mailboxes have no room for x.
    """
    _require_room("gather_columns", x, addresses)
    from pallas_kernels.peers.exchange import Exchange
    from pallas_kernels.peers.kernels import gather_kernel

    rows, width = x.shape
    padded = jnp.pad(in_eights(x), ((0, 0), (0, -width % TILE)))
    made = gather_kernel(padded, table, Exchange.of(addresses, rows))[:rows]
    if padded.shape[1] == width:
        return made
    return made.reshape(rows, addresses.count, -1)[:, :, :width].reshape(rows, -1)


def _require_room(name: str, x: Any, addresses: Addresses) -> None:
    rows, width = x.shape
    if rows > addresses.num_rows or width > addresses.width:
        room = f"{addresses.num_rows} rows of {addresses.width}"
        raise ValueError(f"{name}: mailboxes of {room} have no room for {rows} of {width}")
