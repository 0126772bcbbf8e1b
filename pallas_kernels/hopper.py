"""What the kernels for Hopper have in common: how shared memory is laid out, and values by column in registers.

A thread holds two neighbouring elements of an accumulator at a time, in columns 0, 2, 4 or 6 and every 8 further. Array
operations on column numbers would make the compiler keep all of a thread's, 32 or 64, in registers across the whole
kernel, which has none to spare. What depends on the column is therefore emitted here an element at a time, with the
column as an immediate operand; the interpreter, which takes no such code, gets array operations.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.instructions import (
    REF,
    SCALAR,
    device_address,
    do,
    element,
    inlined,
    integer,
    is_first_thread,
    multiply,
    number,
    scalar,
)

LOG2E = math.log2(math.e)  # exponentials are base 2
Accumulator = plgpu.WGMMAAccumulatorRef


def tiled(*shape: int, dtype: Any) -> Any:
    """Shared memory as copies fill it and the tensor cores read it: in tiles of 8 rows of 128 bytes."""
    return plgpu.SMEM(shape, dtype, transforms=tiling(dtype))


def tiling(dtype: Any) -> tuple[Any, ...]:
    """What `tiled` makes of an array's order in memory."""
    tile = (8, 128 // jnp.dtype(dtype).itemsize)
    return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


def store(ref: Any, x: Any) -> None:
    """ref[...] = x where x does not fill whole lines of memory, which newer versions of JAX want said."""
    if (plain := getattr(plgpu, "store", None)) is not None:
        plain(ref, x, optimized=False)
    else:
        ref[...] = x


def wait_until_results_have_left() -> None:
    """What comes last in a kernel that sends results by copies from shared memory: it must not give that back before
    they have been read. That they are in device memory is what the end of the launch means; nobody waits for it here.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def fence_memory() -> None:
    """Makes what was written before visible to the whole GPU before anything that comes after."""

    @inlined()
    def emit(_: Any = None):
        do("fence.acq_rel.gpu;")

    emit()


def meet(counters: Any, index: Any, number: Any, count: Any, *, waits: bool = True) -> None:
    """Returns when all `count` warpgroups of a meeting have come here; what they wrote before can then be read.

    A counter needs no setting to zero between one meeting and the next: a meeting adds 2^31 to it in all, and who waits
    looks for its highest bit to change.

    Args:
      counters: int32 in device memory; `index`: the meeting's.
      number: this warpgroup's, 0 to count - 1.
      waits: False returns at once, for one that has nothing to read.
    """

    @inlined(REF, SCALAR, SCALAR, SCALAR)
    def emit(_, counters, *numbers):
        index, number, count = map(scalar, numbers)
        is_first = arith.cmpi(arith.CmpIPredicate.eq, number, integer(0))
        increment = arith.select(is_first, arith.subi(integer(1 - 2**31), count), integer(1))
        mgpu.warpgroup_barrier()
        with mgpu.utils.when(is_first_thread()):
            wait = """again:
                ld.acquire.gpu.global.u32 now, [$0];
                xor.b32 now, now, before;
                setp.ge.s32 waits, now, 0;
                @waits bra again;
                fence.acq_rel.gpu;"""
            ptx = """{
                .reg .b32 before, now;
                .reg .pred waits;
                fence.acq_rel.gpu;
                atom.add.acq_rel.gpu.global.u32 before, [$0], $1;
                %s
            }""" % (wait if waits else "")
            do(ptx, device_address(counters, index, 4), increment)
        mgpu.warpgroup_barrier()

    numbers = (jnp.int32(x) for x in (index, number, count))
    emit(counters, *numbers)


def filled(shape: tuple[int, ...], value: Any, layout: Any) -> Any:
    """float32 registers in a layout, all of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def rounded(x: Any, dtype: DTypeLike) -> Any:
    """float32 with the precision of `dtype`; inside a kernel, where no compiler drops a cast there and back."""
    return x.astype(dtype).astype(jnp.float32)


def not_before(x: Any, layout: Any = SCALAR) -> Any:
    """x, int32 or float32 in a layout, for use from here on. What was read from memory earlier the compiler may else
    have the kernel wait for where it was read, or in front of a loop that does not change it."""
    made = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)

    @inlined(layout, return_type=made)
    def emit(_, x):
        registers = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            is_vector = isinstance(register.type, ir.VectorType)
            elements = [element(register, i) for i in range(register.type.shape[0])] if is_vector else [register]
            count, types = len(elements), [part.type for part in elements]
            move = "\n".join(f"mov.b32 ${i}, ${i + count};" for i in range(count))
            moved = mgpu.utils.inline_ptx(move, *elements, result_types=types, has_side_effects=True)
            registers[at] = vector.from_elements(register.type, moved) if is_vector else moved[0]
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)

    return emit(x)


def first_column() -> ir.Value:
    """The first of a thread's columns: 0, 2, 4 or 6; int32. For use in `inline_mgpu`, as the rest below."""
    return multiply(arith.remui(mgpu.thread_idx(), integer(4)), 2)


def emit_by_column(shape: tuple[int, int], emit: Callable[[tuple[int, ...], int, int], ir.Value]) -> Any:
    """An accumulator's float32 array whose elements are emit(register, element, column).

    register, element: where a fragmented array of this shape and layout holds the element. column: counted from
    `first_column`.
    """
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    strides = layout.tiling.tile_strides((shape[1], 1))
    for register in np.ndindex(registers.shape):
        column = sum(i * stride for i, stride in zip(register, strides)) % shape[1]
        pair = [emit(register, element, column + element) for element in range(2)]
        registers[register] = vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), pair)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def over_columns(per_row: Any, shape: tuple[int, int]) -> Any:
    """A value a row, repeated over the columns of an accumulator's array."""
    return per_row.broadcast_in_dim(shape, (0,), mgpu.WGMMA_LAYOUT)


def element_of(x: Any, register: tuple[int, ...], element: int) -> ir.Value:
    return vector.extract(x.registers[register], [], [element])


def hide_columns(x: jax.Array, first_seen: jax.Array, value: float, *, interpretable: bool) -> jax.Array:
    """float32 `x` [rows, columns] where column >= first_seen[row], else `value`; in the layout of an accumulator."""
    rows, columns = x.shape
    if interpretable:
        return jnp.where(jnp.arange(columns, dtype=jnp.int32)[None, :] >= first_seen[:, None], x, value)

    made = plgpu.ShapeDtypeStruct((rows, columns), jnp.float32, layout=plgpu.Layout.WGMMA)

    @inlined(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), return_type=made)
    def hide(_, x, first_seen):
        first_seen, lane = over_columns(first_seen, (rows, columns)), first_column()

        def emit(register, element, column):
            first = arith.subi(element_of(first_seen, register, element), lane)
            seen = arith.cmpi(arith.CmpIPredicate.sle, first, integer(column))
            return arith.select(seen, element_of(x, register, element), number(value))

        return emit_by_column((rows, columns), emit)

    return hide(x, first_seen)
