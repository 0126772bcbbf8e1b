"""What the blocks of a head tell one another of its newest token, and where it goes: the instructions (projected.py).

Each warpgroup of a cluster has sums over some of the inputs, [64 outputs, 8 rows] of float32 as the matrix instruction
leaves them: of four threads side by side each has two outputs of two rows. Row 0 is sent, the token, by the first of
them, and by the last one rows 6 and 7, which a deferred norm wants (quantized_matmul/deferred.py). Query, key and value
each have a block of the cluster that adds up and sends what comes of it to all.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import sending
from pallas_kernels.decode_attention.cluster import MATRIX
from pallas_kernels.hopper import tiling
from pallas_kernels.instructions import (
    REF,
    SCALAR,
    add,
    do,
    element,
    inlined,
    integer,
    make,
    multiply,
    own_thread,
    scalar,
    shared_address,
)
from pallas_kernels.quantized_matmul.formats import ROWS_AT_ONCE

NAMES = ("query", "key", "value")
HEAD = 64  # outputs of each
MAX_BLOCKS = 4  # of a cluster
# An output of a sum, which the four threads of a row of the matrix have alike.
PER_OUTPUT = MATRIX.reduce(1)
_FOURS = 32  # in a warpgroup
_LAST_BYTES, _FIRST_BYTES = 16, 8  # what the last and the first of four send
_PART_BYTES = _FOURS * (_LAST_BYTES + _FIRST_BYTES)
_NEWEST_BYTES = 4 * HEAD


def buffers(num_shares: int) -> dict[str, Any]:
    """Shared memory: for the parts of all sums, and for query, key and value when they are done."""
    return {
        "parts": plgpu.SMEM((len(NAMES), num_shares, _PART_BYTES // 4), jnp.float32),
        "parts_there": sending.barriers(len(NAMES)),
        "newest": plgpu.SMEM((len(NAMES), HEAD), jnp.float32),
        "newest_there": sending.barriers(len(NAMES)),
    }


def make_ready(smem: dict[str, Any], warpgroup: Any) -> None:
    """Before anything is sent; all threads of all blocks call it, then `expect` at one more barrier (sending.py)."""
    of_parts = smem["parts"].shape[1] * _PART_BYTES

    @inlined(*[REF] * (2 * len(NAMES)), SCALAR)
    def emit(_, *barriers_and_warpgroup):
        *barriers, warpgroup = barriers_and_warpgroup
        for barrier, num_bytes in zip(barriers, [of_parts] * len(NAMES) + [_NEWEST_BYTES] * len(NAMES), strict=True):
            sending.make_ready(barrier, scalar(warpgroup), integer(num_bytes))

    barriers = [smem[name].at[which] for name in ("parts_there", "newest_there") for which in range(len(NAMES))]
    emit(*barriers, jnp.int32(warpgroup))


def _places_in_part(parts: ir.Value, number: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Addresses of a part, by its number in `parts`: what the last and what the first of this thread's four sends."""
    start, four = add(shared_address(parts), multiply(number, _PART_BYTES)), arith.divui(own_thread(), integer(4))
    of_first = add(start, _FOURS * _LAST_BYTES, multiply(four, _FIRST_BYTES))
    return add(start, multiply(four, _LAST_BYTES)), of_first


def _is_of_four(which: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, arith.remui(own_thread(), integer(4)), integer(which))


def send_part(smem: dict[str, Any], which: int, share: Any, partial: Any, *, block: int) -> None:
    """Sends a warpgroup's sums, [64, 8], to a block. which: of NAMES; share: the warpgroup's number in the cluster."""
    num_shares = smem["parts"].shape[1]

    @inlined(REF, REF, SCALAR, MATRIX)
    def emit(_, parts, there, share, partial):
        places = _places_in_part(parts, add(scalar(share), which * num_shares))
        of_last, of_first = (sending.in_block(place, integer(block)) for place in places)
        barrier = sending.in_block(shared_address(there), integer(block))
        values = [element(register, i) for register in partial.registers.flat for i in range(2)]
        with mgpu.utils.when(_is_of_four(3)):
            sending.send(of_last, values, barrier)
        with mgpu.utils.when(_is_of_four(0)):
            sending.send(of_first, values[::2], barrier)

    emit(smem["parts"], smem["parts_there"].at[which], jnp.int32(share), partial)


def sum_of_parts(smem: dict[str, Any], which: int) -> Any:
    """In the block that adds up, when all have come: [64, 8], in the order of the shares. Rows 1 to 5 are anything."""
    sending.wait_for_all_sent(smem["parts_there"].at[which])
    num_shares = smem["parts"].shape[1]
    shape = plgpu.ShapeDtypeStruct((HEAD, ROWS_AT_ONCE), jnp.float32, layout=MATRIX)

    @inlined(REF, return_type=shape)
    def emit(_, parts):
        totals: list[Any] = []
        for share in range(num_shares):
            of_last, of_first = _places_in_part(parts, integer(which * num_shares + share))
            part = [
                *make("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", of_last, num_results=4),
                *make("ld.shared.v2.f32 {$0, $1}, [$2];", of_first, num_results=2),
            ]
            totals = [arith.addf(x, y) for x, y in zip(totals, part, strict=True)] if totals else part
        *own, one, other = totals
        first = _is_of_four(0)
        own[0], own[2] = arith.select(first, one, own[0]), arith.select(first, other, own[2])
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape((HEAD, ROWS_AT_ONCE)), dtype=object)
        two = ir.VectorType.get((2,), ir.F32Type.get())
        registers.flat[:] = [vector.from_elements(two, own[i : i + 2]) for i in (0, 2)]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return emit(smem["parts"])


def send_newest(smem: dict[str, Any], which: int, y: Any, num_blocks: int) -> None:
    """Sends float32 y [64], as PER_OUTPUT, one of NAMES, to all blocks of the cluster: one to `MAX_BLOCKS`."""

    @inlined(REF, REF, PER_OUTPUT)
    def emit(_, newest, there, y):
        thread = own_thread()
        warp, lane = arith.divui(thread, integer(32)), arith.remui(thread, integer(32))
        output = add(multiply(warp, 16), arith.divui(lane, integer(4)), which * HEAD)
        own = add(shared_address(newest), multiply(output, 4))
        # The four threads that have an output alike share out the blocks.
        block = arith.remui(lane, integer(MAX_BLOCKS))
        exists = arith.cmpi(arith.CmpIPredicate.ult, block, integer(num_blocks))
        block = arith.select(exists, block, integer(0))
        barrier = sending.in_block(shared_address(there), block)
        for half, register in enumerate(y.registers.flat):
            address = sending.in_block(add(own, 32 * half), block)
            sending.send(address, [element(register, 0)], barrier, predicate=exists)

    emit(smem["newest"], smem["newest_there"].at[which], y)


def wait_for_newest(smem: dict[str, Any], which: int) -> None:
    """Returns when one of NAMES has come."""
    sending.wait_for_all_sent(smem["newest_there"].at[which])


def first_of(ref: Any) -> Any:
    """The first of shared memory's float32 [n], repeated [64] as PER_OUTPUT."""
    shape = plgpu.ShapeDtypeStruct((HEAD,), jnp.float32, layout=PER_OUTPUT)

    @inlined(REF, return_type=shape)
    def emit(_, ref):
        (x,) = make("ld.shared.f32 $0, [$1];", shared_address(ref), num_results=1)
        layout = PER_OUTPUT.to_mgpu()
        registers = np.empty(layout.registers_shape((HEAD,)), dtype=object)
        one = vector.from_elements(ir.VectorType.get((1,), ir.F32Type.get()), [x])
        registers.flat[:] = [one] * registers.size
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return emit(ref)


def put_in_tile(tile: Any, key: Any, newest: Any) -> None:
    """Writes float32 `newest` [64] into a tile of K or V in shared memory, [keys, 64] as copies fill it."""
    dtype = tile.dtype
    pair = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]

    @inlined(plgpu.RefType(tiling(dtype)), SCALAR, REF)
    def emit(_, tile, key, newest):
        thread, key = own_thread(), scalar(key)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, integer(8))):
            source = add(shared_address(newest), multiply(thread, 32))
            values = [
                value
                for half in range(2)
                for value in make("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", add(source, 16 * half), num_results=4)
            ]
            # A key has a line of 128 bytes, whose eight pieces change places from line to line.
            place = arith.xori(thread, arith.remui(key, integer(8)))
            target = add(shared_address(tile), multiply(key, 128), multiply(place, 16))
            lines = [".reg .b32 x<4>;"]
            lines += [f"cvt.rn.{pair}.f32 x{i}, ${2 + 2 * i}, ${1 + 2 * i};" for i in range(4)]
            lines += ["st.shared.v4.b32 [$0], {x0, x1, x2, x3};"]
            do("{ " + " ".join(lines) + " }", target, *values)

    emit(tile, jnp.int32(key), newest)
