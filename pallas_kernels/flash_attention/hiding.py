"""Hiding the early columns of a tile in registers, with the column as an immediate operand.

Written as array operations the compiler would keep each thread's column numbers, 32 or 64, in registers across the
whole kernel, which has none to spare; that form serves interpretation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector


def hide_columns(x: jax.Array, first_seen: jax.Array, value: float, *, interpretable: bool) -> jax.Array:
    """float32 `x` [rows, columns] where column >= first_seen[row], else `value`; in the layout of an accumulator."""
    rows, columns = x.shape
    if interpretable:
        return jnp.where(jnp.arange(columns, dtype=jnp.int32)[None, :] >= first_seen[:, None], x, value)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct((rows, columns), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def hide(_, x, first_seen):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        first_seen = first_seen.broadcast_in_dim((rows, columns), (0,), mgpu.WGMMA_LAYOUT)
        # The first of a thread's columns: 0, 2, 4 or 6. Its others are 1, 8, 9, 16, 17, ... further.
        lane = arith.muli(arith.remui(mgpu.thread_idx(), mgpu.c(4, i32)), mgpu.c(2, i32))
        strides = mgpu.WGMMA_LAYOUT.tiling.tile_strides((columns, 1))
        registers = np.empty_like(x.registers)
        for index in np.ndindex(registers.shape):
            column = sum(i * stride for i, stride in zip(index, strides)) % columns
            pair = []
            for element in range(2):
                first = arith.subi(vector.extract(first_seen.registers[index], [], [element]), lane)
                seen = arith.cmpi(arith.CmpIPredicate.sle, first, mgpu.c(column + element, i32))
                kept = vector.extract(x.registers[index], [], [element])
                pair.append(arith.select(seen, kept, mgpu.c(value, f32)))
            registers[index] = vector.from_elements(ir.VectorType.get((2,), f32), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return hide(x, first_seen)  # pyright: ignore[reportCallIssue] (the first argument is the decorator's)
