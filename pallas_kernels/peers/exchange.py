"""How kernels of several devices exchange tiles of 64 columns, in the memory that memory.py describes.

Each block sends what its device made of a tile to all devices, its own included, and then waits for what all have sent.
What adds up is added in the order of the devices, so that all come to the same bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import words
from pallas_kernels.instructions import (
    REF,
    SCALAR,
    add,
    at,
    do,
    element,
    inlined,
    integer,
    is_first_thread,
    memory_address,
    multiply,
    scalar,
)
from pallas_kernels.peers.memory import Addresses, words_begin
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.product import ROWS_AT_ONCE
from pallas_kernels.quantized_matmul.rows import ROWS, of_registers, own_place

_AT_ONCE = 4  # devices whose tiles a thread waits for at the same time


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a kernel is compiled for.

    num_rows: rows that mean something, the first ones, which alone are sent.
    capacity, width: the mailboxes' rows and columns.
    """

    count: int
    num_rows: int
    capacity: int
    width: int

    @classmethod
    def of(cls, addresses: Addresses, num_rows: int) -> "Exchange":
        return cls(addresses.count, num_rows, addresses.num_rows, addresses.width)


def launch_of(exchange: Exchange, table: Any, tile: Any, eighth: Any = 0) -> Any:
    """The number of this launch for a tile, and 8 rows of it or all: to be read before they are exchanged."""
    number = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)

    @inlined(REF, SCALAR, SCALAR, return_type=number)
    def emit(_, table, tile, eighth):
        i32 = ir.IntegerType.get_signless(32)
        address = _count_address(exchange, _own_mailbox(table), scalar(tile), scalar(eighth))
        # Not from the cache of a multiprocessor, which may hold what the launch before has read.
        count = mgpu.utils.inline_ptx(
            "ld.relaxed.gpu.global.b32 $0, [$1];", address, result_types=i32, has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(add(count, 1), (), is_signed=True)

    return emit(table, jnp.int32(tile), jnp.int32(eighth))


def add_up(exchange: Exchange, table: Any, y: Any, *, tile: Any, launch: Any) -> Any:
    """float32 [R, 64], as ROWS: all devices' y added up; zeros in rows that mean nothing.

    A warpgroup calls it once for a tile, with what `launch_of` said of it.
    """
    out = plgpu.ShapeDtypeStruct(y.shape, jnp.float32, layout=ROWS)

    @inlined(REF, ROWS, SCALAR, SCALAR, return_type=out)
    def emit(_, table, y, tile, launch):
        sums = _swap(exchange, table, y, scalar(tile), scalar(launch), integer(0), _sum)
        return _array(y, sums)

    return emit(table, y, jnp.int32(tile), launch)


def swap(exchange: Exchange, table: Any, y: Any, *, tile: Any, launch: Any, eighth: Any) -> list[Any]:
    """float32 [8, 64], as ROWS, of each device: its y of these 8 rows; zeros in rows that mean nothing.

    A warpgroup calls it once for 8 rows of a tile, with what `launch_of` said of them.
    """
    out = plgpu.ShapeDtypeStruct(y.shape, jnp.float32, layout=ROWS)

    @inlined(REF, ROWS, SCALAR, SCALAR, SCALAR, return_type=[out] * exchange.count)
    def emit(_, table, y, tile, launch, eighth):
        (of_all,) = _swap(exchange, table, y, scalar(tile), scalar(launch), scalar(eighth), list)
        return [_array(y, [numbers]) for numbers in of_all]

    return emit(table, y, jnp.int32(tile), launch, jnp.int32(eighth))


def _sum(of_all: Sequence[Sequence[ir.Value]]) -> list[ir.Value]:
    return [functools.reduce(arith.addf, numbers) for numbers in zip(*of_all, strict=True)]


def _swap(
    exchange: Exchange,
    table: ir.Value,
    y: Any,
    tile: ir.Value,
    launch: ir.Value,
    eighth: ir.Value,
    combine: Callable[[Sequence[Sequence[ir.Value]]], list[Any]],
) -> list[list[Any]]:
    """For each 8 rows of y, of which the first are `eighth`, what `combine` makes of a thread's four numbers of each
    device, before it waits for those of the next 8 rows."""
    own_row, fours = own_place()
    first_column = add(multiply(tile, TILE), multiply(fours, 4))
    half = multiply(arith.andi(launch, integer(1)), exchange.count)
    rank, own_mailbox = _rank(table), _own_mailbox(table)
    mailboxes = [_mailbox(table, integer(i)) for i in range(exchange.count)]

    def place(mailbox: ir.Value, device: ir.Value | int, row: ir.Value) -> ir.Value:
        rows = add(multiply(add(half, device), exchange.capacity), row)
        index = add(multiply(rows, exchange.width), first_column)
        return at(mailbox, index, words.WORD_BYTES, words_begin(exchange.capacity, exchange.width))

    registers = list(y.registers.flat)
    rows = [add(own_row, multiply(add(eighth, i), ROWS_AT_ONCE)) for i in range(len(registers))]
    end = integer(exchange.num_rows)
    for row, register in zip(rows, registers, strict=True):
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.slt, row, end)):
            numbers = [element(register, k) for k in range(4)]
            for mailbox in mailboxes:
                words.put(place(mailbox, rank, row), numbers, launch, scope="sys")
    made = []
    for row in rows:
        left = None if exchange.num_rows % ROWS_AT_ONCE == 0 else arith.subi(end, row)
        of_all: list[Sequence[ir.Value]] = []
        for first in range(0, exchange.count, _AT_ONCE):
            devices = range(first, min(first + _AT_ONCE, exchange.count))
            places = [(place(own_mailbox, j, row), at) for j in devices for at in (0, 2 * words.WORD_BYTES)]
            numbers = words.take(places, [left] * len(places), launch, scope="sys")
            of_all += [numbers[j : j + 4] for j in range(0, len(numbers), 4)]
        made.append(combine(of_all))
    # All threads have read the count by now, and sent what it says.
    mgpu.utils.warpgroup_barrier()
    with mgpu.utils.when(is_first_thread()):
        do("st.relaxed.gpu.global.b32 [$0], $1;", _count_address(exchange, own_mailbox, tile, eighth), launch)
    return made


def _array(y: Any, numbers: Sequence[Sequence[ir.Value]]) -> Any:
    """As large as y, from a thread's four numbers of every eighth row."""
    fours = y.registers.flat[0].type
    return of_registers([vector.from_elements(fours, list(some)) for some in numbers], y.shape)


def _rank(table: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return mgpu.utils.inline_ptx("ld.global.nc.b32 $0, [$1];", memory_address(table), result_types=i32)


def _mailbox(table: ir.Value, device: ir.Value) -> ir.Value:
    """int64: its address."""
    i64 = ir.IntegerType.get_signless(64)
    return mgpu.utils.inline_ptx(
        "ld.global.nc.b64 $0, [$1];", at(memory_address(table), device, 8, 8), result_types=i64
    )


def _own_mailbox(table: ir.Value) -> ir.Value:
    return _mailbox(table, _rank(table))


def _count_address(exchange: Exchange, mailbox: ir.Value, tile: ir.Value, eighth: ir.Value) -> ir.Value:
    return at(mailbox, add(multiply(eighth, exchange.width // TILE), tile), 4, 0)
