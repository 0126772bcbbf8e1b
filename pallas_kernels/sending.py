"""How blocks of a cluster send one another numbers: into the other's shared memory, where a barrier counts the bytes.

So nobody needs a fence for what it has written (one takes over a microsecond), nor has to wait before it ends. Whoever
is sent something makes its barrier ready first (`expect`); nobody sends before all have (`wait_for_all_open`), and what
has come is read after `wait_for_all_sent`. Interpretation has no use for any of it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from pallas_kernels.instructions import REF, do, inlined, integer, own_thread, shared_address


def barrier() -> Any:
    """Shared memory of a barrier that counts the bytes which come."""
    return plgpu.SMEM((2,), jnp.int32)


def barriers(count: int) -> Any:
    """Of several, of which each is a row."""
    return plgpu.SMEM((count, 2), jnp.int32)


def expect(barrier: ir.Value, warpgroup: ir.Value, num_bytes: ir.Value) -> None:
    """In emitted code: makes this block's barrier ready for so many bytes. All threads of all blocks come here once."""
    make_ready(barrier, warpgroup, num_bytes)
    do("barrier.cluster.arrive.relaxed;")


def make_ready(barrier: ir.Value, warpgroup: ir.Value, num_bytes: ir.Value) -> None:
    """`expect` of one more barrier, before the last one's."""
    is_first = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(warpgroup, own_thread()), integer(0))
    with mgpu.utils.when(is_first):
        at = shared_address(barrier)
        do("mbarrier.init.shared::cta.b64 [$0], 1;", at)
        do("fence.mbarrier_init.release.cluster;")
        do("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", at, num_bytes)


def wait_for_all_open() -> None:
    """Before this nobody may send. All threads call it once."""

    @inlined()
    def emit(_: Any = None):
        do("barrier.cluster.wait.acquire;")

    emit()


def wait_for_all_sent(barrier: Any) -> None:
    """Returns when all that this block expects has come."""

    @inlined(REF)
    def emit(_, barrier):
        nvvm.mbarrier_try_wait_parity(mgpu.utils.memref_ptr(barrier), integer(0), integer(10_000_000))

    emit(barrier)


def send(
    address: ir.Value, values: Sequence[ir.Value], barrier: ir.Value, *, predicate: ir.Value | None = None
) -> None:
    """In emitted code: one, two or four float32 on their way; address and barrier as `in_block` gives them."""
    several = "" if len(values) == 1 else f".v{len(values)}"
    places = ", ".join(f"${i + 1}" for i in range(len(values)))
    ptx = f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{several}.f32 [$0], "
    ptx += (places if len(values) == 1 else f"{{{places}}}") + f", [${len(values) + 1}];"
    do(ptx, address, *values, barrier, predicate=predicate)


def in_block(address: ir.Value, block: ir.Value) -> ir.Value:
    """In emitted code: the same address in another block's shared memory."""
    i32 = ir.IntegerType.get_signless(32)
    return mgpu.utils.inline_ptx("mapa.shared::cluster.u32 $0, $1, $2;", address, block, result_types=i32)
