"""How blocks of a cluster, which share out the inputs of a tile, bring their sums together in the first of them.

Each sends its part into the first one's shared memory, where a barrier counts the bytes. So nobody needs a fence for
what it has sent, nor waits before it ends; the first one waits for all.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from pallas_kernels.instructions import (
    REF,
    SCALAR,
    do,
    element,
    inlined,
    integer,
    own_thread,
    scalar,
    shared_address,
)
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.plan import Plan
from pallas_kernels.quantized_matmul.stream import ROWS


def buffers(plan: Plan, num_rows: int) -> dict[str, Any]:
    """Shared memory of a block: what the others send the first one, and the barrier that counts it."""
    parts = plgpu.SMEM((plan.width, plan.splits - 1, num_rows, TILE), jnp.float32)
    return {"parts": parts, "parts_there": plgpu.SMEM((2,), jnp.int32)}


def open_for_parts(smem: dict[str, Any], warpgroup: Any) -> None:
    """Makes ready for what comes: all threads of all blocks call it."""
    num_bytes = 4 * math.prod(smem["parts"].shape)

    @inlined(REF, SCALAR)
    def emit(_, there, warpgroup):
        is_first = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(scalar(warpgroup), own_thread()), integer(0))
        with mgpu.utils.when(is_first):
            barrier = shared_address(there)
            do("mbarrier.init.shared::cta.b64 [$0], 1;", barrier)
            do("fence.mbarrier_init.release.cluster;")
            do("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", barrier, integer(num_bytes))
        do("barrier.cluster.arrive.relaxed;")

    emit(smem["parts_there"], jnp.int32(warpgroup))


def wait_for_all_open() -> None:
    """Before this nobody may send. All threads call it once."""

    @inlined()
    def emit(_: Any = None):
        do("barrier.cluster.wait.acquire;")

    emit()


def send(smem: dict[str, Any], i: int, split: Any, y: Any) -> None:
    """Sends float32 y [R, 64] as ROWS, block `split`'s part of the i-th tile, to block 0."""
    _, others, num_rows, _ = smem["parts"].shape

    @inlined(REF, REF, SCALAR, ROWS)
    def emit(_, parts, there, split, y):
        barrier, start = _in_first_block(shared_address(there)), shared_address(parts)
        part = arith.addi(integer(i * others - 1), scalar(split))
        # A thread has four outputs of every eighth row.
        first = arith.addi(arith.muli(part, integer(num_rows * TILE)), arith.muli(own_thread(), integer(4)))
        start = arith.addi(start, arith.muli(first, integer(4)))
        for eighth, register in enumerate(y.registers.flat):
            address = _in_first_block(arith.addi(start, integer(eighth * 8 * TILE * 4)))
            values = [element(register, k) for k in range(4)]
            ptx = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [$0], {$1, $2, $3, $4}, [$5];"
            do(ptx, address, *values, barrier)

    emit(smem["parts"], smem["parts_there"], split, y)


def wait_for_all_sent(smem: dict[str, Any]) -> None:
    """In block 0: returns when all others' parts are there, of all tiles."""

    @inlined(REF)
    def emit(_, there):
        nvvm.mbarrier_try_wait_parity(mgpu.utils.memref_ptr(there), integer(0), integer(10_000_000))

    emit(smem["parts_there"])


def add_all(smem: dict[str, Any], i: int, y: Any) -> Any:
    """Block 0's own part of the i-th tile and all others', in the order of the blocks."""
    parts = (plgpu.load(smem["parts"].at[i, j], layout=ROWS, optimized=False) for j in range(smem["parts"].shape[1]))
    return functools.reduce(jnp.add, parts, y)


def _in_first_block(address: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return mgpu.utils.inline_ptx("mapa.shared::cluster.u32 $0, $1, $2;", address, integer(0), result_types=i32)
