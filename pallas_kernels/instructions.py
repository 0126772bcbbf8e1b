"""What kernels say in the GPU's own instructions, where Pallas has no words for it: PTX, and the numbers it works on.

All but `inlined` is for functions that it decorates: they emit code, and what they are given and handle are values of
the compiler.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

REF, SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT
THREADS = 128  # of a warpgroup


def inlined(*arg_types: Any, return_type: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`plgpu.inline_mgpu`, whose own type leaves out that it gives the first argument itself."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)


def integer(value: int) -> ir.Value:
    """int32."""
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def number(value: float) -> ir.Value:
    """float32."""
    return mgpu.c(value, ir.F32Type.get())


def add(x: ir.Value, *others: ir.Value | int) -> ir.Value:
    for other in others:
        x = arith.addi(x, integer(other) if isinstance(other, int) else other)
    return x


def multiply(x: ir.Value, factor: ir.Value | int) -> ir.Value:
    return arith.muli(x, integer(factor) if isinstance(factor, int) else factor)


def scalar(x: Any) -> ir.Value:
    """Of what came in as SCALAR."""
    return x.registers.item()


def element(register: ir.Value, i: int) -> ir.Value:
    """The i-th of a register of several."""
    return vector.extract(register, [], [i])


def own_thread() -> ir.Value:
    """Which one of its warpgroup's."""
    return arith.remui(mgpu.thread_idx(), integer(THREADS))


def is_first_thread() -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, own_thread(), integer(0))


def shared_address(ref: ir.Value) -> ir.Value:
    """int32, in this block's shared memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def device_address(ref: ir.Value, index: ir.Value, item_bytes: int) -> ir.Value:
    """int64, of an element of an array in device memory, which is taken as flat. index: int32, not negative."""
    return at(memory_address(ref), index, item_bytes)


def memory_address(ref: ir.Value) -> ir.Value:
    """int64, of an array in device memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))


def at(address: ir.Value, index: ir.Value, item_bytes: int, offset: int = 0) -> ir.Value:
    """address + index x item_bytes + offset: int64. index: int32, not negative."""
    i64 = ir.IntegerType.get_signless(64)
    address = arith.addi(address, arith.muli(arith.extui(i64, index), mgpu.c(item_bytes, i64)))
    return arith.addi(address, mgpu.c(offset, i64)) if offset else address


def do(ptx: str, *operands: ir.Value, predicate: ir.Value | None = None) -> None:
    """Instructions without a result."""
    mgpu.utils.inline_ptx(ptx, *operands, predicate=predicate, has_side_effects=True)


def make(ptx: str, *operands: ir.Value, num_results: int) -> Sequence[ir.Value]:
    """What instructions make in float32, read from memory: neither left out nor moved."""
    types = [ir.F32Type.get()] * num_results
    return mgpu.utils.inline_ptx(ptx, *operands, result_types=types, has_side_effects=True)
