"""Codes of 8 and 4 bits in shared memory to operands of a matrix instruction, in registers.

Words lie in the order in which threads hold the instruction's left operand (formats.py), so nothing moves between
threads: a thread reads its words, and each pair of its weights is cut out of one of them. The arithmetic is exact. A
code's bits under a fixed exponent are the number "something + code", from which that something is taken off.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.instructions import REF, THREADS, add, inlined, multiply, own_thread, shared_address
from pallas_kernels.quantized_matmul.formats import GROUP, unpack
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.integers import CODE_OFFSET, in_order

# Inputs of one operand: as many as 128 bytes of the other one hold.
DEPTH = 64
STEPS = DEPTH // 16  # of the instruction, 16 inputs each


def fragments(words: Any, form: str, *, interpretable: bool) -> list[Any]:
    """The codes of a group as bfloat16 [64 outputs, 64 inputs], twice: its first 64 inputs and its last.

    words: a reference to shared memory, int32 [words of a group / 128, 128].
    """
    if interpretable:
        codes = unpack(words[...].reshape(1, 1, -1)).astype(jnp.bfloat16)
        return [codes[:, start : start + DEPTH] for start in range(0, GROUP, DEPTH)]

    shape = plgpu.ShapeDtypeStruct((TILE, DEPTH), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @inlined(REF, return_type=[shape] * (GROUP // DEPTH))
    def emit(_, words):
        return [operand(words, form, part) for part in range(GROUP // DEPTH)]

    return emit(words)


def integer_fragments(words: Any, form: str, *, interpretable: bool) -> list[Any]:
    """The codes of a group as int8 [64 outputs, 64 inputs], twice, inputs in the order of integers.py. Those of 4 bits
    are `CODE_OFFSET[form]` too large.

    words: as of `fragments`.
    """
    if interpretable:
        codes = in_order(unpack(words[...].reshape(1, 1, -1)), form) + CODE_OFFSET[form]
        return [codes[:, start : start + DEPTH].astype(jnp.int8) for start in range(0, GROUP, DEPTH)]

    shape = plgpu.ShapeDtypeStruct((TILE, DEPTH), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)

    @inlined(REF, return_type=[shape] * (GROUP // DEPTH))
    def emit(_, words):
        return [integer_operand(words, form, part) for part in range(GROUP // DEPTH)]

    return emit(words)


def integer_operand(words: ir.Value, form: str, part: int) -> Any:
    """A part of 64 inputs, in `inline_mgpu`: registers [16 inputs, half of 16 outputs], four inputs each."""
    i32, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    mine = _own_words(words, form, part)
    registers = np.empty((STEPS, 2), dtype=object)
    for step, row_half in np.ndindex(STEPS, 2):
        if form == "int8":
            word, ptx = mine[2 * step + row_half], "xor.b32 $0, $1, 0x80808080;"  # code + 128 as code
        elif row_half == 0:
            word, ptx = mine[step], "and.b32 $0, $1, 0x0F0F0F0F;"
        else:
            word, ptx = mine[step], "{ .reg .b32 a; shr.u32 a, $1, 4; and.b32 $0, a, 0x0F0F0F0F; }"
        codes = mgpu.utils.inline_ptx(ptx, word, result_types=i32)
        registers[step, row_half] = mgpu.utils.bitcast(codes, four)
    layout = plgpu.Layout.WGMMA_8BIT.to_mgpu()
    registers = registers.reshape(layout.registers_shape((TILE, DEPTH)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _own_words(words: ir.Value, form: str, part: int) -> list[ir.Value]:
    """A thread's words of a part of 64 inputs."""
    start = add(shared_address(words), multiply(own_thread(), 16))
    num_words = STEPS * {"int8": 2, "int4": 1}[form]
    mine = []
    for quad in range(num_words // 4):
        at = add(start, (part * num_words // 4 + quad) * THREADS * 16)
        ptx = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
        four = [ir.IntegerType.get_signless(32)] * 4
        mine += mgpu.utils.inline_ptx(ptx, at, result_types=four, has_side_effects=True)
    return mine


def operand(words: ir.Value, form: str, part: int) -> Any:
    """A part of 64 inputs, in `inline_mgpu`: registers [block of 8 inputs, half of 16 outputs], two inputs each."""
    bf16 = ir.BF16Type.get()
    mine = _own_words(words, form, part)
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty((2 * STEPS, 2), dtype=object)
    for step in range(STEPS):
        for row_half in range(2):
            for column_half in range(2):
                if form == "int4":
                    pair = _pair_of_4_bits(mine[step], 2 * column_half + row_half)
                else:
                    pair = _pair_of_8_bits(mine[2 * step + row_half], column_half)
                registers[2 * step + column_half, row_half] = mgpu.utils.bitcast(pair, ir.VectorType.get((2,), bf16))
    registers = registers.reshape(layout.registers_shape((TILE, DEPTH)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _pair_of_4_bits(word: ir.Value, place: int) -> ir.Value:
    """The codes at bits 4 place and 4 place + 16, as two bfloat16."""
    # 0x4300 is 128, whose last bit counts 1; 0x4308 is 136: codes are kept with 8 added.
    ptx = """{
        .reg .b32 a, b;
        shr.u32 a, $1, %d;
        lop3.b32 b, a, 0x000F000F, 0x43004300, 0xEA;
        sub.rn.bf16x2 $0, b, $2;
    }""" % (4 * place)  # noqa: UP031 (braces and percent signs are PTX's own)
    i32 = ir.IntegerType.get_signless(32)
    return mgpu.utils.inline_ptx(ptx, word, mgpu.c(0x43084308, i32), result_types=i32)


def _pair_of_8_bits(word: ir.Value, half: int) -> ir.Value:
    """The codes of the lower or the upper two bytes, as two bfloat16."""
    # 0x4B000000 is 2^23, whose last bit counts 1; 0x4B000080 is 2^23 + 128: codes are kept with 128 added.
    ptx = """{
        .reg .b32 a, b;
        .reg .f32 x, y;
        prmt.b32 a, $1, 0x4B000000, 0x744%d;
        prmt.b32 b, $1, 0x4B000000, 0x744%d;
        mov.b32 x, a;
        mov.b32 y, b;
        sub.rn.f32 x, x, 0f4B000080;
        sub.rn.f32 y, y, 0f4B000080;
        cvt.rn.bf16x2.f32 $0, y, x;
    }""" % (2 * half, 2 * half + 1)  # noqa: UP031
    return mgpu.utils.inline_ptx(ptx, word, result_types=ir.IntegerType.get_signless(32))
