"""How blocks of a cluster, which share out the inputs of a tile, bring their sums together in the first of them."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import sending
from pallas_kernels.instructions import REF, SCALAR, element, inlined, integer, own_thread, scalar, shared_address
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.plan import Plan
from pallas_kernels.quantized_matmul.rows import ROWS, load


def buffers(plan: Plan, num_rows: int) -> dict[str, Any]:
    """Shared memory of a block: what the others send the first one, and the barrier that counts it."""
    parts = plgpu.SMEM((plan.width, plan.splits - 1, num_rows, TILE), jnp.float32)
    return {"parts": parts, "parts_there": sending.barrier()}


def expect_all(smem: dict[str, Any], warpgroup: Any) -> None:
    """Makes ready for what comes: all threads of all blocks call it."""
    num_bytes = 4 * math.prod(smem["parts"].shape)

    @inlined(REF, SCALAR)
    def emit(_, there, warpgroup):
        sending.expect(there, scalar(warpgroup), integer(num_bytes))

    emit(smem["parts_there"], jnp.int32(warpgroup))


def send(smem: dict[str, Any], i: int, split: Any, y: Any) -> None:
    """Sends float32 y [R, 64] as ROWS, block `split`'s part of the i-th tile, to block 0."""
    _, others, num_rows, _ = smem["parts"].shape

    @inlined(REF, REF, SCALAR, ROWS)
    def emit(_, parts, there, split, y):
        first_block = integer(0)
        barrier, start = sending.in_block(shared_address(there), first_block), shared_address(parts)
        part = arith.addi(integer(i * others - 1), scalar(split))
        # A thread has four outputs of every eighth row.
        first = arith.addi(arith.muli(part, integer(num_rows * TILE)), arith.muli(own_thread(), integer(4)))
        start = arith.addi(start, arith.muli(first, integer(4)))
        for eighth, register in enumerate(y.registers.flat):
            address = sending.in_block(arith.addi(start, integer(eighth * 8 * TILE * 4)), first_block)
            sending.send(address, [element(register, k) for k in range(4)], barrier)

    emit(smem["parts"], smem["parts_there"], split, y)


def add_all(smem: dict[str, Any], i: int, y: Any) -> Any:
    """Block 0's own part of the i-th tile and all others', in the order of the blocks."""
    parts = (load(smem["parts"].at[i, j]) for j in range(smem["parts"].shape[1]))
    return functools.reduce(jnp.add, parts, y)
