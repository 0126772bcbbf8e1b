"""Integers in registers: rows that become such (integers.py), and what products of them come to.

Of an accumulator a thread has two neighbouring columns, which are a row's two parts (integers.py). So the sum of a row
is the thread's own, and it has half as many.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.instructions import REF, add, do, element, inlined, integer, multiply, own_thread, shared_address
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.integers import ALL_ROWS, CODE_OFFSET, LOW_BITS, Integers
from pallas_kernels.quantized_matmul.rows import ROWS, own_place

MATRIX = plgpu.Layout.WGMMA
# [64 outputs, rows]: an accumulator's layout with one number where that has two.
BY_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((TILE, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def sum_of_blocks(made: Sequence[Any], blocks: Sequence[Any], form: str, *, interpretable: bool) -> Any:
    """Float32 [64 outputs, R], as BY_ROWS: integers of several blocks of 64 inputs times their scales, added up.

    Args:
      made: of each block int32 [64 outputs, 2 R], codes times high and low parts.
      blocks: of each in shared memory its scales and offsets, int32 [2 R].
      form: of the weights.
    """
    num_rows = made[0].shape[1] // 2
    if interpretable:
        total = jnp.zeros((TILE, num_rows), jnp.float32)
        for sums, ref in zip(made, blocks, strict=True):
            block = ref[...]
            high, low = sums.reshape(TILE, num_rows, 2).transpose(2, 0, 1)
            scale, offset = lax.bitcast_convert_type(block[::2], jnp.float32), block[1::2]
            total += ((high << LOW_BITS) + low + offset).astype(jnp.float32) * scale
        return total

    out = plgpu.ShapeDtypeStruct((TILE, num_rows), jnp.float32, layout=BY_ROWS)

    @inlined(*[MATRIX] * len(made), *[REF] * len(blocks), return_type=out)
    def emit(_, *arguments):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        layout = BY_ROWS.to_mgpu()
        shape = layout.registers_shape((TILE, num_rows))
        totals: list[Any] = [None] * int(np.prod(shape))
        row = arith.remui(own_thread(), integer(4))  # the first of a thread's, every fourth of which is its own
        for sums, block in zip(arguments[: len(made)], arguments[len(made) :], strict=True):
            start = add(shared_address(block), multiply(row, 8))
            of_rows = [
                mgpu.utils.inline_ptx(
                    "ld.shared.v2.b32 {$0, $1}, [$2];", add(start, 32 * eighth), result_types=[f32, i32],
                    has_side_effects=True,
                )
                for eighth in range(num_rows // 4)
            ]  # fmt: skip
            # Both have a register for each 4 rows and each half of 16 outputs, in the same order.
            registers = sums.registers.reshape(num_rows // 4, 2)
            for (eighth, half), register in np.ndenumerate(registers):
                scale, offset = of_rows[eighth]
                whole = add(multiply(element(register, 0), 2**LOW_BITS), element(register, 1))
                if CODE_OFFSET[form]:
                    whole = add(whole, offset)
                as_float, at = arith.sitofp(f32, whole), eighth * 2 + half
                before = totals[at]
                totals[at] = (
                    arith.mulf(as_float, scale)
                    if before is None
                    else mgpu.utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", as_float, scale, before, result_types=f32)
                )
        registers = np.empty(len(totals), dtype=object)
        registers[:] = [vector.from_elements(ir.VectorType.get((1,), f32), [total]) for total in totals]
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return emit(*made, *blocks)


def store_integers(values: Any, blocks: Any, x: Any, integers: Integers, *, interpretable: bool) -> None:
    """Writes a tile of rows, float32 [8, 64] as ROWS, into shared memory as `Integers.of` makes them.

    values: int8 [2 R, 64], R rows that are held; blocks: int32 [2 R].
    """
    if interpretable:
        made = integers.of(x)
        values[...], blocks[...] = made.values, made.blocks[0]
        return
    # Of a thread's four inputs, side by side, the places after the first one's (integers.in_order).
    step, places = {"int4": (1, (0, 2, 4, 6)), "int8": (2, (0, 1, 4, 5))}[integers.form]
    # The rows that are held are the first ones, and maybe the last.
    num_first = next((i for i, row in enumerate(integers.rows) if row != i), integers.num_held)
    first_of_last = len(ALL_ROWS) - (integers.num_held - num_first)

    @inlined(REF, REF, ROWS)
    def emit(_, values, blocks, x):
        row, fours = own_place()
        (register,) = x.registers.flat
        numbers = [element(register, i) for i in range(4)]
        scale, whole, offset = _of_a_row(numbers, CODE_OFFSET[integers.form])
        # Sixteens of inputs; in one, threads 0 and 1 have the first eight, as have 2 and 3 of the last.
        first = add(
            multiply(arith.divui(fours, integer(4)), 16),
            multiply(arith.remui(fours, integer(2)), 8),
            multiply(arith.remui(arith.divui(fours, integer(2)), integer(2)), step),
        )
        is_first = arith.cmpi(arith.CmpIPredicate.ult, row, integer(num_first))
        is_last = arith.cmpi(arith.CmpIPredicate.uge, row, integer(first_of_last))
        held = arith.select(is_first, row, add(row, num_first - first_of_last))
        is_held = arith.ori(is_first, is_last)
        start = add(shared_address(values), multiply(held, 2 * TILE), first)
        for number, place in zip(whole, places, strict=True):
            ptx = f"""{{ .reg .b32 high, low;
                shr.s32 high, $1, {LOW_BITS};
                and.b32 low, $1, {2**LOW_BITS - 1};
                st.shared.b8 [$0 + {place}], high;
                st.shared.b8 [$0 + {place + TILE}], low; }}"""
            with mgpu.utils.when(is_held):
                do(ptx, start, number)
        is_one = arith.andi(arith.cmpi(arith.CmpIPredicate.eq, fours, integer(0)), is_held)
        at = add(shared_address(blocks), multiply(held, 8))
        do("st.shared.v2.b32 [$0], {$1, $2};", at, scale, offset, predicate=is_one)

    emit(values, blocks, x)


def _of_a_row(numbers: Sequence[ir.Value], code_offset: int) -> tuple[ir.Value, list[ir.Value], ir.Value]:
    """Of a row whose 64 numbers 16 threads side by side have: its scale, a thread's as integers, and its offset."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    lanes, own = (8, 4, 2, 1), range(4)
    # Results come last: they may be the same registers as the arguments.
    lines = [".reg .f32 x<4>, largest, other, scale, inverse;", ".reg .b32 n<4>, bits, sum, more;"]
    lines += [f"mov.f32 x{i}, ${6 + i};" for i in own]
    lines.append("abs.f32 largest, x0;")
    for i in own[1:]:
        lines += [f"abs.f32 other, x{i};", "max.f32 largest, largest, other;"]
    for lane in lanes:
        lines += [f"shfl.sync.bfly.b32 other, largest, {lane}, 31, -1;", "max.f32 largest, largest, other;"]
    lines += [
        "max.f32 largest, largest, 0f0D800000;",  # 2^-100
        "mov.b32 bits, largest;",
        "and.b32 bits, bits, 0x7F800000;",
        "mov.b32 scale, bits;",
        "mul.f32 scale, scale, 0f39000000;",  # 2^-13
        "sub.u32 bits, 0x85800000, bits;",  # the exponent of its inverse
        "mov.b32 inverse, bits;",
        "mov.b32 sum, 0;",
    ]
    for i in own:
        lines += [f"mul.f32 other, x{i}, inverse;", f"cvt.rni.s32.f32 n{i}, other;", f"add.s32 sum, sum, n{i};"]
    for lane in lanes:
        lines += [f"shfl.sync.bfly.b32 more, sum, {lane}, 31, -1;", "add.s32 sum, sum, more;"]
    lines += ["mov.f32 $0, scale;", *(f"mov.b32 ${1 + i}, n{i};" for i in own), f"mul.lo.s32 $5, sum, {-code_offset};"]
    ptx = "{\n" + "\n".join(lines) + "\n}"
    types = [f32, *[i32] * 5]
    scale, *integers, offset = mgpu.utils.inline_ptx(ptx, *numbers, result_types=types, has_side_effects=True)
    return scale, integers, offset
