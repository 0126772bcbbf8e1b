"""The array through which blocks of an output stage's kernel meet, and which its launches hand on: int32.

    [0]                                        what counts the launches; with many rows, the blocks that have come
    [4 + 4 (row P + place) + (0, 1, 2, 3)]     with few rows: a tile's mean, launch, squares, launch (moments.py)

Tiles are 64 outputs, P of them in a row, filled up to a multiple of 64. Of each 64 every fourth lies side by side,
place 16 (tile % 4) + tile / 4: a thread has four neighbours, and asks for one of them at the same time as others do.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.deferred import padded_tiles
from pallas_kernels.quantized_matmul.product import MAX_ROWS

HEADER = 4  # int32 before the first tile's, which keeps them where 16 bytes begin


def meeting_size(num_rows: int, width: int) -> int:
    """How many int32 launches of so many rows and outputs take."""
    return HEADER if num_rows > MAX_ROWS else HEADER + 4 * (num_rows + -num_rows % 8) * padded_tiles(width)


def new_meeting(num_rows: int, width: int) -> jax.Array:
    """int32 [M], zeros: what the first call of a chain takes as `meeting`. M is `meeting_size`.

    Args:
      num_rows: of the residual, all its axes but the last together.
      width: of the residual, in outputs; a multiple of 64 where the kernels run.
    """
    return jnp.zeros(meeting_size(num_rows, width), jnp.int32)
