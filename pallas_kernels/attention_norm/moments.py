"""How blocks of an output stage tell each other what a layer norm needs to know of their tiles.

That is, of each row of a tile, the mean and the sum of squared distances from it. Nobody waits at a counter and then
reads what others have written, which takes two ways to the GPU's cache and back, and a fence. Numbers are read until
they are there: each lies in a word of 64 bits with the number of its launch, and the GPU writes and reads such words
whole. meeting.py says where.

Launch n + 1 writes n + 1 into its words, and the count of launches when one block has seen those of all, which have
read the count by then.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

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
    make,
    multiply,
    own_thread,
    scalar,
)
from pallas_kernels.quantized_matmul.deferred import padded_tiles
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.rows import ROWS

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
        row, column = _own()
        start = add(multiply(row, row_ints), multiply(_place_of(tile), 4), HEADER)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, column, integer(0))):
            for i, numbers in enumerate(zip(mean.registers.flat, squares.registers.flat, strict=True)):
                address = device_address(meeting, add(start, 8 * i * row_ints), 4)
                ptx = """{
                    .reg .b64 first, second;
                    mov.b64 first, {$1, $3};
                    mov.b64 second, {$2, $3};
                    st.relaxed.gpu.global.v2.b64 [$0], {first, second};
                }"""
                do(ptx, address, *(element(register, 0) for register in numbers), launch)

    emit(meeting, mean, squares, jnp.int32(tile), launch)


def read(meeting: Any, first_row: int, *, width: int, launch: Any) -> tuple[Any, Any]:
    """Means and squares of 8 rows, float32 [8, P] as ROWS, when all blocks have published them; of no tile, zeros."""
    row_ints, num_tiles, shape = 4 * padded_tiles(width), width // TILE, (8, padded_tiles(width))
    out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ROWS)

    @inlined(REF, SCALAR, return_type=[out, out])
    def emit(_, meeting, launch):
        launch = scalar(launch)
        row, column = _own()
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
            numbers = _await(places, lefts, launch)
            for i in range(0, len(numbers), 8):
                for which in range(2):
                    parts[which].append(vector.from_elements(fours, numbers[i + which : i + 8 : 2]))
        return [_fragmented(part, shape) for part in parts]

    means, squares = emit(meeting, launch)
    return means, squares


def end_launch(meeting: Any, launch: Any) -> None:
    """What one block does when it has read what all have published."""

    @inlined(REF, SCALAR)
    def emit(_, meeting, launch):
        with mgpu.utils.when(is_first_thread()):
            do("st.relaxed.gpu.global.b32 [$0], $1;", device_address(meeting, integer(0), 4), scalar(launch))

    emit(meeting, launch)


def _await(places: list[tuple[ir.Value, int]], lefts: list[ir.Value | None], launch: ir.Value) -> Sequence[ir.Value]:
    """Reads two words at each place, address and offset, again and again until they hold the launch's number.

    lefts: None, or what is above 0 where the place exists. The others' words are zero.
    """
    n = len(places)
    inputs = [launch, *(address for address, _ in places), *(left for left in lefts if left is not None)]
    operand = {value: f"${2 * n + i}" for i, value in enumerate(inputs)}
    number = operand[launch]
    lines = [".reg .pred p;", ".reg .b32 one, other, differs;", f".reg .b32 missing<{n}>;", f".reg .b64 word<{2 * n}>;"]
    for i, left in enumerate(lefts):
        lines.append(f"mov.b32 missing{i}, 1;")
        if left is not None:
            lines += [f"setp.gt.s32 p, {operand[left]}, 0;", f"selp.b32 missing{i}, 1, 0, p;"]
            lines += [f"mov.b64 word{2 * i + which}, {{0, {number}}};" for which in range(2)]
    lines.append("again:")  # those that are there already are not asked for again
    for i, (address, offset) in enumerate(places):
        words = f"{{word{2 * i}, word{2 * i + 1}}}"
        lines.append(f"setp.ne.s32 p, missing{i}, 0;")
        lines.append(f"@p ld.relaxed.gpu.global.v2.b64 {words}, [{operand[address]} + {offset}];")
    lines.append("mov.b32 differs, 0;")
    for i in range(n):
        lines.append(f"mov.b64 {{${2 * i}, one}}, word{2 * i};")
        lines.append(f"mov.b64 {{${2 * i + 1}, other}}, word{2 * i + 1};")
        lines += [f"xor.b32 one, one, {number};", f"xor.b32 other, other, {number};"]
        lines += [f"or.b32 missing{i}, one, other;", f"or.b32 differs, differs, missing{i};"]
    lines += ["setp.ne.s32 p, differs, 0;", "@p bra again;"]
    ptx = "{\n" + "\n".join(lines) + "\n}"
    return make(ptx, *inputs, num_results=2 * n)


def _own() -> tuple[ir.Value, ir.Value]:
    """The row that a thread has in ROWS, and of its columns the first, counted in fours."""
    return arith.divui(own_thread(), integer(16)), arith.remui(own_thread(), integer(16))


def _place_of(tile: ir.Value) -> ir.Value:
    """As meeting.py has it."""
    within = arith.remui(tile, integer(TILE))
    every_fourth = multiply(arith.remui(within, integer(4)), TILE // 4)
    return add(arith.subi(tile, within), every_fourth, arith.divui(within, integer(4)))


def _fragmented(registers: list[ir.Value], shape: tuple[int, int]) -> Any:
    layout = ROWS.to_mgpu()
    made = np.empty(layout.registers_shape(shape), dtype=object)
    made.flat[:] = registers
    return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)
