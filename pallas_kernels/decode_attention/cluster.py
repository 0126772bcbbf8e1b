"""What warps and blocks pass each other while they attend: written in the instructions themselves.

Pallas has no way to send numbers to another block of a cluster, and one scratch for reductions between warps, which two
warpgroups of a block cannot use at a time. Hence this part, which interpretation has no use for: it combines results
through device memory.

Sums are an array [H, heads], laid out as the matrix instruction leaves it: each 64 rows by 8 columns of it are four
numbers of every thread (two rows, two columns), here called a piece. Pieces travel as 16 bytes a thread, thread beside
thread, so that what a warp writes or reads is one stretch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels import hopper, sending
from pallas_kernels.instructions import (
    REF,
    SCALAR,
    THREADS,
    device_address,
    do,
    element,
    inlined,
    integer,
    make,
    number,
    own_thread,
    scalar,
    shared_address,
)

MATRIX = plgpu.Layout.WGMMA
PER_HEAD = MATRIX.reduce(0)
_WARPS, _LANES = 4, 32
_PIECE_BYTES = 16  # of a thread


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Sizes of what is passed on.

    Warpgroups of a block first merge their results, piece by piece. A warp's part of a piece is a share: each block of
    the cluster brings some shares to the end, from what all blocks have sent it.
    """

    H: int
    heads: int
    warpgroups: int
    blocks: int

    @property
    def head_groups(self) -> int:
        return self.heads // 8

    @property
    def pieces(self) -> int:
        return self.H // 64 * self.head_groups

    @property
    def shares_of_block(self) -> int:
        """Shares that a block brings to the end, at most."""
        return -(-self.pieces * _WARPS // self.blocks)

    def buffers(self) -> dict[str, Any]:
        """Shared memory: for what warpgroups leave each other, and for what the blocks send this one."""
        floats = _PIECE_BYTES // 4
        buffers = {"sent": plgpu.SMEM((self.shares_of_block, self.blocks, 2, _LANES, floats), jnp.float32)}
        buffers["arrived"] = sending.barrier()
        if self.warpgroups > 1:
            buffers["left"] = plgpu.SMEM((self.warpgroups, self.pieces, THREADS, floats), jnp.float32)
            buffers["left_weights"] = plgpu.SMEM((self.warpgroups, self.heads, 2), jnp.float32)
        return buffers

    def smem_bytes(self) -> int:
        sent = self.shares_of_block * self.blocks * 2 * _LANES * _PIECE_BYTES
        left = self.warpgroups * (self.pieces * THREADS * _PIECE_BYTES + 8 * self.heads)
        return sent + (left if self.warpgroups > 1 else 0)

    def open(self, smem: dict[str, Any], warpgroup: Any, block: Any) -> None:
        """Makes ready for what the blocks send, before they do: all threads of all blocks call it."""

        @inlined(REF, SCALAR, SCALAR)
        def emit(_, arrived, warpgroup, block):
            num_shares = arith.divui(
                arith.subi(integer(self.pieces * _WARPS + self.blocks - 1), scalar(block)), integer(self.blocks)
            )
            num_bytes = arith.muli(num_shares, integer(self.blocks * 2 * _LANES * _PIECE_BYTES))
            sending.expect(arrived, scalar(warpgroup), num_bytes)

        if self.blocks > 1:
            emit(smem["arrived"], jnp.int32(warpgroup), jnp.int32(block))

    def wait_for_all_open(self) -> None:
        """Before this nobody may send."""
        if self.blocks > 1:
            sending.wait_for_all_open()

    def wait_for_all_sent(self, smem: dict[str, Any]) -> None:
        """Among several blocks: returns when all that is meant for this one has come."""
        sending.wait_for_all_sent(smem["arrived"])

    def leave(self, smem: dict[str, Any], warpgroup: Any, sums: Any, maxima: Any, totals: Any) -> None:
        """Leaves a warpgroup's results to the others of its block."""

        @inlined(REF, REF, SCALAR, MATRIX, PER_HEAD, PER_HEAD)
        def emit(_, left, weights, warpgroup, sums, maxima, totals):
            warpgroup, thread = scalar(warpgroup), own_thread()
            first = arith.muli(warpgroup, integer(self.pieces))
            for i, piece in enumerate(self._pieces(sums)):
                at = arith.addi(arith.muli(arith.addi(first, integer(i)), integer(THREADS)), thread)
                _store4(arith.addi(shared_address(left), arith.muli(at, integer(_PIECE_BYTES))), piece)
            is_one_of_four = arith.cmpi(arith.CmpIPredicate.ult, thread, integer(4))
            for group in range(self.head_groups):
                head = arith.addi(arith.muli(warpgroup, integer(self.heads)), integer(8 * group))
                at = arith.addi(arith.muli(head, integer(8)), arith.muli(thread, integer(16)))
                pair = self._weights(maxima, totals, group)
                _store4(arith.addi(shared_address(weights), at), pair, predicate=is_one_of_four)

        emit(smem["left"], smem["left_weights"], jnp.int32(warpgroup), sums, maxima, totals)

    def send_merged(self, smem: dict[str, Any], warpgroup: Any, block: Any) -> None:
        """Merges what the warpgroups have left, pieces shared out, and sends each share to the block that ends it."""

        @inlined(*[REF] * 4, SCALAR, SCALAR)
        def emit(_, left, weights, sent, arrived, warpgroup, block):
            warpgroup, block, thread = scalar(warpgroup), scalar(block), own_thread()
            for turn in range(-(-self.pieces // self.warpgroups)):
                index = arith.addi(warpgroup, integer(turn * self.warpgroups))
                exists = arith.cmpi(arith.CmpIPredicate.ult, index, integer(self.pieces))
                with mgpu.utils.when(exists):
                    group = arith.remui(index, integer(self.head_groups))
                    head = arith.addi(arith.muli(group, integer(8)), hopper.first_column())
                    results = []
                    for w in range(self.warpgroups):
                        at = arith.addi(
                            arith.muli(arith.addi(index, integer(w * self.pieces)), integer(THREADS)), thread
                        )
                        piece = _load4(arith.addi(shared_address(left), arith.muli(at, integer(_PIECE_BYTES))))
                        at = arith.muli(arith.addi(head, integer(w * self.heads)), integer(8))
                        results.append((piece, _load4(arith.addi(shared_address(weights), at))))
                    self._send(sent, arrived, block, index, *_merged(results))

        emit(
            *(smem[name] for name in ("left", "left_weights", "sent", "arrived")),
            jnp.int32(warpgroup),
            jnp.int32(block),
        )

    def send(self, smem: dict[str, Any], block: Any, sums: Any, maxima: Any, totals: Any) -> None:
        """Sends the results of a block's only warpgroup."""

        @inlined(REF, REF, SCALAR, MATRIX, PER_HEAD, PER_HEAD)
        def emit(_, sent, arrived, block, sums, maxima, totals):
            for i, piece in enumerate(self._pieces(sums)):
                weights = self._weights(maxima, totals, i % self.head_groups)
                self._send(sent, arrived, scalar(block), integer(i), piece, weights)

        emit(smem["sent"], smem["arrived"], jnp.int32(block), sums, maxima, totals)

    def finish(
        self, smem: dict[str, Any], out: Any, warpgroup: Any, block: Any, first_row: Any, num_heads: Any
    ) -> None:
        """Merges what the blocks have sent, in their order, and writes the result.

        out: device memory [..., H] in rows of H; first_row: the row of the first head. num_heads: how many exist.
        """

        @inlined(REF, REF, SCALAR, SCALAR, SCALAR, SCALAR)
        def emit(_, sent, out, warpgroup, block, first_row, num_heads):
            block, first_row, num_heads = scalar(block), scalar(first_row), scalar(num_heads)
            thread = own_thread()
            warp, lane = arith.divui(thread, integer(_LANES)), arith.remui(thread, integer(_LANES))
            worker = arith.addi(arith.muli(scalar(warpgroup), integer(_WARPS)), warp)
            workers = self.warpgroups * _WARPS
            for turn in range(-(-self.shares_of_block // workers)):
                slot = arith.addi(worker, integer(turn * workers))
                share = arith.addi(arith.muli(slot, integer(self.blocks)), block)
                exists = arith.cmpi(arith.CmpIPredicate.ult, share, integer(self.pieces * _WARPS))
                with mgpu.utils.when(exists):
                    self._finish(sent, out, share, slot, lane, first_row, num_heads)

        emit(smem["sent"], out, *map(jnp.int32, (warpgroup, block, first_row, num_heads)))

    def _pieces(self, sums: Any) -> list[Sequence[ir.Value]]:
        registers = sums.registers.reshape(self.pieces, 2)
        return [[element(register, i) for register in pair for i in range(2)] for pair in registers]

    def _weights(self, maxima: Any, totals: Any, group: int) -> Sequence[ir.Value]:
        """Maximum and total of a thread's first head of a group, and of its second."""
        pairs = [x.registers.reshape(self.head_groups)[group] for x in (maxima, totals)]
        return [element(pair, i) for i in range(2) for pair in pairs]

    def _slot(self, slot: ir.Value, source: ir.Value, which: int, lane: ir.Value) -> ir.Value:
        """Place of a lane in `sent`, counted in 16 bytes."""
        at = arith.addi(arith.muli(slot, integer(self.blocks)), source)
        return arith.addi(arith.muli(at, integer(2 * _LANES)), arith.addi(integer(which * _LANES), lane))

    def _send(self, sent: Any, arrived: Any, block: Any, index: Any, piece: Any, weights: Any) -> None:
        """Sends a piece, or this block's part of it, to the blocks that end its four shares."""
        thread = own_thread()
        warp, lane = arith.divui(thread, integer(_LANES)), arith.remui(thread, integer(_LANES))
        share = arith.addi(arith.muli(index, integer(_WARPS)), warp)
        target, slot = arith.remui(share, integer(self.blocks)), arith.divui(share, integer(self.blocks))
        weights_offset = integer(_LANES * _PIECE_BYTES)
        here = arith.addi(shared_address(sent), arith.muli(self._slot(slot, block, 0, lane), integer(_PIECE_BYTES)))
        if self.blocks == 1:
            _store4(here, piece)
            _store4(arith.addi(here, weights_offset), weights)
            return
        there, barrier = sending.in_block(here, target), sending.in_block(shared_address(arrived), target)
        sending.send(there, piece, barrier)
        sending.send(arith.addi(there, weights_offset), weights, barrier)

    def _finish(self, sent: Any, out: Any, share: Any, slot: Any, lane: Any, first_row: Any, num_heads: Any) -> None:
        results = []
        for source in range(self.blocks):
            at = arith.muli(self._slot(slot, integer(source), 0, lane), integer(_PIECE_BYTES))
            at = arith.addi(shared_address(sent), at)
            results.append((_load4(at), _load4(arith.addi(at, integer(_LANES * _PIECE_BYTES)))))
        piece, (_, total_a, _, total_b) = _merged(results)
        index = arith.divui(share, integer(_WARPS))
        head = arith.muli(arith.remui(index, integer(self.head_groups)), integer(8))
        head = arith.addi(head, hopper.first_column())
        row = arith.muli(arith.divui(index, integer(self.head_groups)), integer(64))
        row = arith.addi(row, arith.muli(arith.remui(share, integer(_WARPS)), integer(16)))
        row = arith.addi(row, arith.divui(lane, integer(4)))
        for column, total in enumerate((total_a, total_b)):
            this_head = arith.addi(head, integer(column))
            is_head = arith.cmpi(arith.CmpIPredicate.ult, this_head, num_heads)
            is_some = arith.cmpf(arith.CmpFPredicate.OGT, total, number(0.0))
            inverse = mgpu.utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", total, result_types=ir.F32Type.get())
            factor = arith.select(is_some, inverse, number(0.0))
            for half in range(2):
                at = arith.muli(arith.addi(first_row, this_head), integer(self.H))
                at = arith.addi(at, arith.addi(row, integer(8 * half)))
                _store_element(out, at, arith.mulf(piece[2 * half + column], factor), is_head)


def over_keys(operation: str, x: jax.Array, scratch: Any, parity: Any) -> jax.Array:
    """Of [keys, heads] over the keys, laid out as PER_HEAD; all warps of the warpgroup meet in it.

    operation: "max" or "add". scratch: shared memory of this warpgroup, float32 [2, heads, 4]. parity: 0 or 1, another
    than in the call before.
    """
    heads = x.shape[1]

    @inlined(REF, SCALAR, MATRIX, return_type=plgpu.ShapeDtypeStruct((heads,), jnp.float32, layout=PER_HEAD))
    def emit(_, scratch, parity, x):
        combine = {"max": arith.maximumf, "add": arith.addf}[operation]
        registers = x.registers.reshape(x.shape[0] // 64, heads // 8, 2)
        thread = own_thread()
        warp, lane = arith.divui(thread, integer(_LANES)), arith.remui(thread, integer(_LANES))
        start = arith.addi(shared_address(scratch), arith.muli(scalar(parity), integer(4 * heads * _WARPS)))
        mine = arith.muli(hopper.first_column(), integer(4 * _WARPS))
        writes = arith.cmpi(arith.CmpIPredicate.ult, lane, integer(4))
        for group in range(heads // 8):
            column = list(registers[:, group].reshape(-1))
            pair = column[0]
            for other in column[1:]:
                pair = combine(pair, other)
            for i in range(2):
                value = element(pair, i)
                for distance in (4, 8, 16):
                    value = combine(value, mgpu.utils.shfl_bfly(value, distance))
                at = arith.addi(arith.addi(start, mine), integer(4 * _WARPS * (8 * group + i)))
                at = arith.addi(at, arith.muli(warp, integer(4)))
                do("st.shared.f32 [$0], $1;", at, value, predicate=writes)
        mgpu.warpgroup_barrier()
        layout = PER_HEAD.to_mgpu()
        result = np.empty(layout.registers_shape((heads,)), dtype=object)
        flat = result.reshape(-1)
        for group in range(heads // 8):
            pair = []
            for i in range(2):
                at = arith.addi(arith.addi(start, mine), integer(4 * _WARPS * (8 * group + i)))
                a, b, c, d = _load4(at)
                pair.append(combine(combine(a, b), combine(c, d)))
            flat[group] = vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), pair)
        return mgpu.FragmentedArray(_registers=result, _layout=layout, _is_signed=None)

    return emit(scratch, jnp.int32(parity), x)


def _merged(results: Sequence[tuple[Any, Any]]) -> tuple[list[ir.Value], list[ir.Value]]:
    """Pieces, each with (maximum, total) of its two heads, in one; exponents are base 2."""
    tops = []
    for i in (0, 2):
        top = results[0][1][i]
        for _, weights in results[1:]:
            top = arith.maximumf(top, weights[i])
        tops.append(top)
    piece, totals = [number(0.0)] * 4, [number(0.0)] * 2
    for part, (max_a, total_a, max_b, total_b) in results:
        factors = [_exp2(arith.subf(maximum, top)) for maximum, top in zip((max_a, max_b), tops)]
        piece = [_fma(x, factors[i % 2], so_far) for i, (x, so_far) in enumerate(zip(part, piece))]
        totals = [_fma(x, factor, so_far) for x, factor, so_far in zip((total_a, total_b), factors, totals)]
    return piece, [tops[0], totals[0], tops[1], totals[1]]


def _fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return mlir_math.fma(a, b, c)


def _exp2(x: ir.Value) -> ir.Value:
    return mgpu.utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=ir.F32Type.get())


def _load4(address: ir.Value) -> Sequence[ir.Value]:
    return make("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", address, num_results=4)


def _store4(address: ir.Value, values: Sequence[ir.Value], predicate: ir.Value | None = None) -> None:
    do("st.shared.v4.f32 [$0], {$1, $2, $3, $4};", address, *values, predicate=predicate)


def _store_element(out: ir.Value, index: ir.Value, x: ir.Value, predicate: ir.Value) -> None:
    x = mgpu.utils.bitcast(arith.truncf(ir.MemRefType(out.type).element_type, x), ir.IntegerType.get_signless(16))
    do("st.global.b16 [$0], $1;", device_address(out, index, 2), x, predicate=predicate)
