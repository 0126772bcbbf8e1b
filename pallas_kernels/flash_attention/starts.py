"""What an accumulator of scores is set to before q . k is added: ALiBi and the mask, at no cost in the softmax.

An accumulator has to be set to something. Zeros are free, and so nearly are the bias of each column, in units of q . k,
and a large negative number where a key is hidden.

On the GPU the values are computed in registers, an element at a time (`hopper.emit_by_column`); interpretation takes
array operations.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math

from pallas_kernels import hopper
from pallas_kernels.flash_attention.reference import MASKED, hf_bf16_bias


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
        bias = hf_bf16_bias(slope, j, scale, dtype, hopper.rounded) / scale
    bias = lax.broadcast_in_dim(bias, (rows, keys), [1])
    if num_visible is None:
        return bias
    return jnp.where(column[None, :] < num_visible[:, None], bias, MASKED)


def _in_registers(rows, keys, alibi, slope, first_row, first_key, num_visible, scale, dtype):
    scalar, row_vector = plgpu.Layout.WG_SPLAT(()), plgpu.Layout.WGMMA.reduce(1)
    arguments: list[Any] = []
    if alibi == "float32":
        arguments = [slope, slope * (first_key - first_row).astype(jnp.float32)]
    elif alibi == "hf_bf16":
        arguments = [hopper.rounded(slope, jnp.bfloat16), first_key.astype(jnp.float32)]
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
        visible = None if num_visible is None else hopper.over_columns(given.pop(), (rows, keys))
        lane = hopper.first_column()
        bias = _column_bias(alibi, [x.registers.item() for x in given], arith.sitofp(f32, lane), scale, dtype)

        def emit(register, element, column):
            if visible is None:
                return bias(column)
            count = arith.subi(hopper.element_of(visible, register, element), lane)
            seen = arith.cmpi(arith.CmpIPredicate.sgt, count, mgpu.c(column, i32))
            return arith.select(seen, bias(column), mgpu.c(MASKED, f32))

        return hopper.emit_by_column((rows, keys), emit)

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
