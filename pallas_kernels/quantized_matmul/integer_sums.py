"""What products of integers come to, in registers: float32, of accumulators with high and low parts side by side.

A thread has two neighbouring columns of an accumulator, which are a row's two parts (integers.py). So the sum of a row
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

from pallas_kernels.instructions import REF, add, element, inlined, integer, multiply, own_thread, shared_address
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.integers import CODE_OFFSET, LOW_BITS

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
