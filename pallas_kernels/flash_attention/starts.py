"""What an accumulator of scores is set to before q . k is added: ALiBi and the mask, at no cost in the softmax.

An accumulator has to be set to something. Zeros are free, and so nearly are the bias of each column, in units of q . k,
and a large negative number where a key is hidden.

On the GPU the values are computed in registers, an element at a time (`hopper.emit_by_column`); interpretation takes
array operations.
"""

import functools
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
from pallas_kernels.instructions import SCALAR, inlined, integer, number, scalar


def scores_start(
    rows: int,
    keys: int,
    *,
    alibi: str | None,
    slope: Any,
    first_row: Any,
    first_key: Any,
    num_visible: jax.Array | None,
    num_hidden: jax.Array | None = None,
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
      num_hidden: int32 [rows], beside num_visible only: row r does not see the first num_hidden[r]. None: it does.
    """
    if alibi is None and num_visible is None:
        return plgpu.layout_cast(jnp.zeros((rows, keys), jnp.float32), plgpu.Layout.WGMMA)
    build = _as_arrays if interpretable else _in_registers
    return build(rows, keys, alibi, slope, first_row, first_key, num_visible, num_hidden, scale, dtype)


def hide_unseen(
    start: jax.Array, first_seen: jax.Array, key: jax.Array, starts: jax.Array, *, interpretable: bool
) -> jax.Array:
    """float32 `start` of transposed scores, [keys, queries], where a query sees a key, else MASKED.

    Args:
      first_seen: int32 [keys]; key r is seen from column first_seen[r] on,
      key, starts: int32 [keys] and [queries]; and only by queries with starts[column] <= key[r].
    """
    rows, columns = shape = start.shape[0], start.shape[1]
    if interpretable:
        column = jnp.arange(columns, dtype=jnp.int32)[None, :]
        return jnp.where((column >= first_seen[:, None]) & (starts[None, :] <= key[:, None]), start, MASKED)

    per_row, per_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    made = plgpu.ShapeDtypeStruct((rows, columns), jnp.float32, layout=plgpu.Layout.WGMMA)

    @inlined(plgpu.Layout.WGMMA, per_row, per_row, per_column, return_type=made)
    def hide(_, start, first_seen, key, starts):
        first_seen, key = (hopper.over_columns(x, shape) for x in (first_seen, key))
        starts, lane = starts.broadcast_in_dim(shape, (1,), mgpu.WGMMA_LAYOUT), hopper.first_column()

        def emit(register, element, column):
            value, first, key_here, start_here = (
                hopper.element_of(x, register, element) for x in (start, first_seen, key, starts)
            )
            by_order = arith.cmpi(arith.CmpIPredicate.sle, arith.subi(first, lane), integer(column))
            by_document = arith.cmpi(arith.CmpIPredicate.sle, start_here, key_here)
            return arith.select(arith.andi(by_order, by_document), value, number(MASKED))

        return hopper.emit_by_column(shape, emit)

    return hide(start, first_seen, key, starts)


def _as_arrays(rows, keys, alibi, slope, first_row, first_key, num_visible, num_hidden, scale, dtype):
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
    visible = column[None, :] < num_visible[:, None]
    if num_hidden is not None:
        visible &= column[None, :] >= num_hidden[:, None]
    return jnp.where(visible, bias, MASKED)


def _in_registers(rows, keys, alibi, slope, first_row, first_key, num_visible, num_hidden, scale, dtype):
    row_vector = plgpu.Layout.WGMMA.reduce(1)
    arguments: list[Any] = []
    if alibi == "float32":
        arguments = [slope, slope * (first_key - first_row).astype(jnp.float32)]
    elif alibi == "hf_bf16":
        arguments = [hopper.rounded(slope, jnp.bfloat16), first_key.astype(jnp.float32)]
    types: list[Any] = [SCALAR] * len(arguments)
    bounds = [bound for bound in (num_visible, num_hidden) if bound is not None]
    types += [row_vector] * len(bounds)

    made = plgpu.ShapeDtypeStruct((rows, keys), jnp.float32, layout=plgpu.Layout.WGMMA)

    @inlined(*types, return_type=made)
    def build(_, *given):
        scalars, given_bounds = given[: len(arguments)], given[len(arguments) :]
        over_columns = [hopper.over_columns(bound, (rows, keys)) for bound in given_bounds]
        lane = hopper.first_column()
        bias = _column_bias(alibi, [scalar(x) for x in scalars], arith.sitofp(ir.F32Type.get(), lane), scale, dtype)

        def emit(register, element, column):
            # Seen where num_visible > column and num_hidden <= column.
            seen = [
                arith.cmpi(seen_if, arith.subi(hopper.element_of(bound, register, element), lane), integer(column))
                for bound, seen_if in zip(over_columns, (arith.CmpIPredicate.sgt, arith.CmpIPredicate.sle))
            ]
            if not seen:
                return bias(column)
            return arith.select(functools.reduce(arith.andi, seen), bias(column), number(MASKED))

        return hopper.emit_by_column((rows, keys), emit)

    return build(*arguments, *bounds)


def _column_bias(alibi, given, lane, scale, dtype):
    """A function of the column, counted from the thread's first one, that emits its bias."""
    f32 = ir.F32Type.get()
    if alibi is None:
        return lambda column: number(0.0)
    slope, base = given
    if alibi == "float32":
        start = math.fma(slope, lane, base)
        return lambda column: math.fma(slope, number(float(column)), start)

    first = arith.addf(base, lane)

    def rounded(x, dtype):
        narrow = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
        return arith.extf(f32, arith.truncf(narrow, x))

    def bias(column):
        j = arith.addf(first, number(float(column)))
        product = rounded(arith.mulf(slope, rounded(j, jnp.bfloat16)), jnp.bfloat16)
        return arith.mulf(rounded(arith.mulf(product, number(scale)), dtype), number(1 / scale))

    return bias
