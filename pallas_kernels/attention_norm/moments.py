"""How blocks of an output stage tell each other what a layer norm needs to know of their tiles.

That is, of each row of a tile, the mean and the sum of squared distances from it. Nobody waits at a counter and then
reads what others have written, which takes two ways to the GPU's cache and back, and a fence. Numbers are read until
they are there (words.py). meeting.py says where.

Launch n + 1 writes n + 1 into its words, and the count of launches when one block has seen those of all, which have
read the count by then.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import words
from pallas_kernels.attention_norm.meeting import HEADER
from pallas_kernels.instructions import (
    REF,
    SCALAR,
    add,
    device_address,
    do,
    element,
    inlined,
    integer,
    is_first_thread,
    multiply,
    scalar,
)
from pallas_kernels.quantized_matmul.deferred import padded_tiles
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.rows import ROWS, of_registers, own_place

_AT_ONCE = 2 * TILE  # tiles that a thread's asks for are under way at the same time
_PER_ROW = ROWS.reduce(1)


def count_of_launches(meeting: Any) -> Any:
    """Of those that have ended: to be read before anything is published."""
    return meeting[0]


def publish(meeting: Any, mean: Any, squares: Any, *, tile: Any, width: int, launch: Any) -> None:
    """Writes those of a tile's rows, float32 [R] in the layout of ROWS' rows."""
    row_ints = 4 * padded_tiles(width)

    @inlined(REF, _PER_ROW, _PER_ROW, SCALAR, SCALAR)
    def emit(_, meeting, mean, squares, tile, launch):
        tile, launch = scalar(tile), scalar(launch)
        row, column = own_place()
        start = add(multiply(row, row_ints), multiply(_place_of(tile), 4), HEADER)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, column, integer(0))):
            for i, numbers in enumerate(zip(mean.registers.flat, squares.registers.flat, strict=True)):
                address = device_address(meeting, add(start, 8 * i * row_ints), 4)
                words.put(address, [element(register, 0) for register in numbers], launch, scope="gpu")

    emit(meeting, mean, squares, jnp.int32(tile), launch)


def read(meeting: Any, first_row: int, *, width: int, launch: Any) -> tuple[Any, Any]:
    """Means and squares of 8 rows, float32 [8, P] as ROWS, when all blocks have published them; of no tile, zeros."""
    row_ints, num_tiles, shape = 4 * padded_tiles(width), width // TILE, (8, padded_tiles(width))
    out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ROWS)

    @inlined(REF, SCALAR, return_type=[out, out])
    def emit(_, meeting, launch):
        launch = scalar(launch)
        row, column = own_place()
        start = add(multiply(row, row_ints), HEADER + first_row * row_ints)
        fours = ir.VectorType.get((4,), ir.F32Type.get())
        parts: list[list[ir.Value]] = [[], []]
        for first in range(0, shape[1], _AT_ONCE):
            places, lefts = [], []
            for block in range(first, min(first + _AT_ONCE, shape[1]), TILE):
                own = add(multiply(column, 4), block)  # the first of the thread's four tiles
                address = device_address(meeting, add(start, multiply(add(column, block), 4)), 4)
                places += [(address, i * TILE // 4 * 16) for i in range(4)]
                is_whole = block + TILE <= num_tiles
                lefts += [None if is_whole else arith.subi(integer(num_tiles - i), own) for i in range(4)]
            numbers = words.take(places, lefts, launch, scope="gpu")
            for i in range(0, len(numbers), 8):
                for which in range(2):
                    parts[which].append(vector.from_elements(fours, numbers[i + which : i + 8 : 2]))
        return [of_registers(part, shape) for part in parts]

    means, squares = emit(meeting, launch)
    return means, squares


def end_launch(meeting: Any, launch: Any) -> None:
    """What one block does when it has read what all have published."""

    @inlined(REF, SCALAR)
    def emit(_, meeting, launch):
        with mgpu.utils.when(is_first_thread()):
            do("st.relaxed.gpu.global.b32 [$0], $1;", device_address(meeting, integer(0), 4), scalar(launch))

    emit(meeting, launch)


def _place_of(tile: ir.Value) -> ir.Value:
    """As meeting.py has it."""
    within = arith.remui(tile, integer(TILE))
    every_fourth = multiply(arith.remui(within, integer(4)), TILE // 4)
    return add(arith.subi(tile, within), every_fourth, arith.divui(within, integer(4)))
