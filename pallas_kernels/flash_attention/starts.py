"""What an accumulator of scores is set to before q . k is added: ALiBi and the mask, at no cost in the softmax.

An accumulator has to be set to something. Zeros are free, and so nearly are the bias of each column, in units of q . k,
and a large negative number where a key is hidden.

On the GPU the values are computed here in registers with the column as an immediate operand. Written as array
operations the compiler would keep each thread's 32 column numbers in registers across the whole kernel, which has none
to spare; that form, below it, serves interpretation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, vector

# Of a hidden key. Finite: infinities would give NaN.
MASKED = -1e30


def scores_start(
    rows: int,
    keys: int,
    *,
    alibi: str | None,
    slope: Any,
    first_row: Any,
    first_key: Any,
    num_visible: jax.Array | None,
    scale: float,
    dtype: DTypeLike,
    interpretable: bool,
) -> Any:
    """float32 [rows, keys] in the layout of an accumulator.

    Args:
      alibi: None, "float32": slope * (j - first_row) at key position j (shifts a row as a whole compared with the
        distance to its own query, which its softmax does not see), or "hf_bf16": the rounded bias of `alibi_bias`,
        divided by `scale`.
      slope, first_row, first_key: float32 and int32 scalars; the positions of the first query and key.
      num_visible: int32 [rows]; row r sees the first num_visible[r] keys of these. None: all.
    """
    if alibi is None and num_visible is None:
        return plgpu.layout_cast(jnp.zeros((rows, keys), jnp.float32), plgpu.Layout.WGMMA)
    if interpretable:
        return _as_arrays(rows, keys, alibi, slope, first_row, first_key, num_visible, scale, dtype)
    return _in_registers(rows, keys, alibi, slope, first_row, first_key, num_visible, scale, dtype)


def _as_arrays(rows, keys, alibi, slope, first_row, first_key, num_visible, scale, dtype):
    column = jnp.arange(keys, dtype=jnp.int32)
    if alibi is None:
        bias = jnp.zeros(keys, jnp.float32)
    elif alibi == "float32":
        bias = slope * (column + (first_key - first_row)).astype(jnp.float32)
    else:
        j = (column + first_key).astype(jnp.float32)
        product = _rounded(_rounded(slope, jnp.bfloat16) * _rounded(j, jnp.bfloat16), jnp.bfloat16)
        bias = _rounded(product * scale, dtype) / scale
    bias = lax.broadcast_in_dim(bias, (rows, keys), [1])
    if num_visible is None:
        return bias
    return jnp.where(column[None, :] < num_visible[:, None], bias, MASKED)


def _rounded(x: Any, dtype: DTypeLike) -> Any:
    return x.astype(dtype).astype(jnp.float32)


def _in_registers(rows, keys, alibi, slope, first_row, first_key, num_visible, scale, dtype):
    scalar, row_vector = plgpu.Layout.WG_SPLAT(()), plgpu.Layout.WGMMA.reduce(1)
    arguments: list[Any] = []
    if alibi == "float32":
        arguments = [slope, slope * (first_key - first_row).astype(jnp.float32)]
    elif alibi == "hf_bf16":
        arguments = [_rounded(slope, jnp.bfloat16), first_key.astype(jnp.float32)]
    types: list[Any] = [scalar] * len(arguments)
    if num_visible is not None:
        arguments.append(num_visible)
        types.append(row_vector)

    @plgpu.inline_mgpu(
        arg_types=tuple(types),
        return_type=plgpu.ShapeDtypeStruct((rows, keys), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def build(_, *given):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        given = list(given)
        visible = (
            given.pop().broadcast_in_dim((rows, keys), (0,), mgpu.WGMMA_LAYOUT) if num_visible is not None else None
        )
        # The first of a thread's columns: 0, 2, 4 or 6. Its others are 1, 8, 9, 16, 17, ... further.
        lane = arith.muli(arith.remui(mgpu.thread_idx(), mgpu.c(4, i32)), mgpu.c(2, i32))
        lane_f32 = arith.sitofp(f32, lane)
        bias = _column_bias(alibi, [x.registers.item() for x in given], lane_f32, scale, dtype)

        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((rows, keys)), dtype=object)
        strides = layout.tiling.tile_strides((keys, 1))
        for index in np.ndindex(registers.shape):
            column = sum(i * stride for i, stride in zip(index, strides)) % keys
            pair = []
            for element in range(2):
                value = bias(column + element)
                if visible is not None:
                    count = vector.extract(visible.registers[index], [], [element])
                    seen = arith.cmpi(arith.CmpIPredicate.sgt, arith.subi(count, lane), mgpu.c(column + element, i32))
                    value = arith.select(seen, value, mgpu.c(MASKED, f32))
                pair.append(value)
            registers[index] = vector.from_elements(ir.VectorType.get((2,), f32), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return build(*arguments)


def _column_bias(alibi, given, lane, scale, dtype):
    """A function of the column, counted from the thread's first one, that emits its bias."""
    f32 = ir.F32Type.get()
    if alibi is None:
        return lambda column: mgpu.c(0.0, f32)
    slope, base = given
    if alibi == "float32":
        start = math.fma(slope, lane, base)
        return lambda column: math.fma(slope, mgpu.c(float(column), f32), start)

    first = arith.addf(base, lane)

    def rounded(x, dtype):
        narrow = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
        return arith.extf(f32, arith.truncf(narrow, x))

    def bias(column):
        j = arith.addf(first, mgpu.c(float(column), f32))
        product = rounded(arith.mulf(slope, rounded(j, jnp.bfloat16)), jnp.bfloat16)
        return arith.mulf(rounded(arith.mulf(product, mgpu.c(scale, f32)), dtype), mgpu.c(1 / scale, f32))

    return bias
