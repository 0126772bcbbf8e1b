"""Many rows times weights, at the speed of the tensor cores: what the warpgroups of such a kernel do.

A block makes one tile after another. Two warpgroups multiply, a third copies chunks of x and of weights into a ring in
shared memory, ahead of them and across tiles. As for a few rows (stream.py), weights are the left operand of the matrix
instruction and rows of x the right one:

    tile [outputs, rows] = weights [outputs, inputs] @ x^T [inputs, rows]

Weights of 16 bits are multiplied out of shared memory. Those of 8 and 4 bits are made bfloat16 in registers while the
product before is under way: codes times scale, rounded, as XLA does for prompts. Only where a tile is a single product
of 8 bits are they the bare codes, and the tile is multiplied by its scales at the end.

Two blocks of a cluster have the same rows and neighbouring outputs. Each copies half of every chunk of x, into the
shared memory of both.

All tiles of some rows (`WidePlan.group` tiles) come before the next rows: blocks that run at the same time then read
few different weights and few different rows, and the GPU's cache gives each of them to several.

Letters: I inputs, O outputs, R rows of x, a multiple of 8.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import nvvm

from pallas_kernels.hopper import tiled
from pallas_kernels.instructions import REF, inlined
from pallas_kernels.quantized_matmul import fragments
from pallas_kernels.quantized_matmul.formats import GROUP, storage, unpack
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.fragments import DEPTH
from pallas_kernels.quantized_matmul.wide_plan import CONSUMERS, WideLaunch

MATRIX = plgpu.Layout.WGMMA
PER_OUTPUT = MATRIX.reduce(1)


def scratch(launch: WideLaunch, *, interpretable: bool) -> dict[str, Any]:
    """Shared memory and barriers of a block."""
    form, plan = launch.form, launch.plan
    num_copies = plan.row_parts + (plan.weight_parts if form == "native" else 2)
    buffers = {
        "x": tiled(plan.stages, plan.row_parts, plan.rows_each, plan.chunk, dtype=jnp.bfloat16),
        "full": plgpu.Barrier(num_arrivals=num_copies, num_barriers=plan.stages),
        "out": tiled(CONSUMERS, 2, plan.rows_out, TILE, dtype=jnp.bfloat16),
    }
    if plan.cluster == 1:
        buffers["empty"] = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages)
    else:
        buffers["empty"] = plgpu.ClusterBarrier(
            collective_axes=("rank",), num_arrivals=CONSUMERS, num_barriers=plan.stages
        )
    if form == "native":
        return buffers | {"weights": tiled(plan.stages, plan.weight_parts, plan.chunk, TILE, dtype=jnp.bfloat16)}
    num_words = storage(form, GROUP, TILE).values.shape[-1] * DEPTH // GROUP
    buffers["weights"] = plgpu.SMEM((plan.stages, plan.weight_parts, num_words // 128, 128), jnp.int32)
    scale_type = jnp.float32 if form == "int8" else jnp.bfloat16
    buffers["scales"] = plgpu.SMEM((plan.stages, plan.weight_parts, TILE), scale_type)
    if interpretable:  # which takes both operands from shared memory
        buffers["codes"] = tiled(CONSUMERS, TILE, DEPTH, dtype=jnp.bfloat16)
    return buffers


class Tile(NamedTuple):
    """Which one: int32 scalars. unit: counted over all products; first_row: of x."""

    unit: Any
    first_row: Any


class Tiles:
    """The tiles of a block.

    Args:
      xs, weights: of each product or term, x [R, I] and the weight's arrays (`arrays_of`) in device memory.
      smem: as `scratch` says.
      rank: of this block in its cluster.
    """

    def __init__(
        self,
        launch: WideLaunch,
        xs: Sequence[Any],
        weights: Sequence[Sequence[Any]],
        smem: dict[str, Any],
        *,
        rank: Any,
        interpretable: bool,
    ):
        self.launch, self.plan, self.form = launch, launch.plan, launch.form
        self.xs, self.weights, self.smem, self.interpretable = xs, weights, smem, interpretable
        self.rank, self.cluster = rank, lax.axis_index("block")
        self.is_sum = len(launch.num_outputs) == 1
        self.counts = launch.num_chunks if self.is_sum else launch.num_chunks[:1]
        # Scales of 8 bits, one an output, can wait for the tile's end, but those of several terms differ.
        self.scales_last = self.form == "int8" and len(self.counts) == 1
        self.first_units = [0, *np.cumsum(launch.units).tolist()]
        waiting = jnp.int32(launch.num_positions - 1 + launch.num_clusters) - self.cluster
        self.num_turns = lax.div(waiting, jnp.int32(launch.num_clusters))

    def tile(self, turn: Any) -> Tile:
        position = self.cluster + turn * self.launch.num_clusters
        row_tiles, group, num_units = self.launch.row_tiles, self.plan.group, self.first_units[-1]
        if row_tiles <= group:
            return Tile(
                lax.div(position, jnp.int32(row_tiles)), lax.rem(position, jnp.int32(row_tiles)) * self.plan.rows
            )
        before = lax.div(position, jnp.int32(group * num_units))
        within, first = position - before * (group * num_units), before * group
        size = jnp.minimum(row_tiles - first, group)
        return Tile(lax.div(within, size), (first + lax.rem(within, size)) * self.plan.rows)

    def is_of(self, tile: Tile, k: int) -> Any:
        """Whether product k's."""
        return (tile.unit >= self.first_units[k]) & (tile.unit < self.first_units[k + 1])

    def first_output(self, tile: Tile, k: int) -> Any:
        """Of this block's tile, where it is product k's."""
        return ((tile.unit - self.first_units[k]) * self.plan.cluster + self.rank) * self.plan.outputs

    def own_output(self, tile: Tile, k: int, warpgroup: Any) -> Any:
        """The first of a warpgroup's 64."""
        return self.first_output(tile, k) + (warpgroup * TILE if self.plan.weight_parts > 1 else 0)

    def own_row(self, tile: Tile, warpgroup: Any) -> Any:
        """The first of a warpgroup's rows."""
        return tile.first_row + (warpgroup * self.plan.rows_each if self.plan.row_parts > 1 else 0)

    def _following(self, slot: Any) -> Any:
        return lax.select(slot == self.plan.stages - 1, jnp.int32(0), slot + 1)

    def _preceding(self, slot: Any) -> Any:
        return lax.select(slot == 0, jnp.int32(self.plan.stages - 1), slot - 1)

    def produce(self) -> None:
        """All copies, as the ring gets free: what one warp does."""
        stages, empty = self.plan.stages, self.smem["empty"]

        def fill(tile: Tile, term: int, chunk: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            slot, count = carry
            pl.when(count >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            if self.is_sum:
                self._copy(tile, 0, term, chunk, slot)
            else:
                for k in range(len(self.launch.num_outputs)):
                    pl.when(self.is_of(tile, k))(functools.partial(self._copy, tile, k, k, chunk, slot))
            return self._following(slot), count + 1

        def take_turn(turn: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            tile = self.tile(turn)
            for term, num_chunks in enumerate(self.counts):
                carry = lax.fori_loop(0, num_chunks, functools.partial(fill, tile, term), carry)
            return carry

        slot, count = lax.fori_loop(0, self.num_turns, take_turn, (jnp.int32(0), jnp.int32(0)))

        # Barriers want every phase seen, and a block of a cluster must not end while the other writes to it.
        def see_out(_: Any, slot: Any) -> Any:
            plgpu.barrier_wait(empty.at[slot])
            return self._following(slot)

        lax.fori_loop(0, jnp.minimum(count, stages), see_out, lax.select(count >= stages, slot, jnp.int32(0)))

    def _copy(self, tile: Tile, k: int, term: int, chunk: Any, slot: Any) -> None:
        """k: whose outputs; term: whose x and weight."""
        plan, full = self.plan, self.smem["full"].at[slot]
        inputs = pl.ds(chunk * plan.chunk, plan.chunk)
        shared = None if plan.cluster == 1 else "rank"
        for part in range(plan.row_parts):
            rows = pl.ds(tile.first_row + part * plan.rows_each, plan.rows_each)
            source, target = self.xs[term].at[rows, inputs], self.smem["x"].at[slot, part]
            plgpu.copy_gmem_to_smem(source, target, full, collective_axes=shared)
        output, target = self.first_output(tile, k), self.smem["weights"].at[slot]
        if self.form == "native":
            for part in range(plan.weight_parts):
                outputs = pl.ds(output + part * TILE, TILE)
                plgpu.copy_gmem_to_smem(self.weights[term][0].at[inputs, outputs], target.at[part], full)
            return
        words, scales = self.weights[term]
        tiles = pl.ds(lax.div(output, jnp.int32(TILE)), plan.weight_parts)
        group, half = lax.div(chunk, jnp.int32(GROUP // DEPTH)), lax.rem(chunk, jnp.int32(GROUP // DEPTH))
        lines = target.shape[1]  # of 128 words
        plgpu.copy_gmem_to_smem(words.at[tiles, group, pl.ds(half * lines, lines)], target, full)
        of_group = 0 if self.form == "int8" else group
        plgpu.copy_gmem_to_smem(scales.at[tiles, of_group], self.smem["scales"].at[slot], full)

    def accumulate(self, warpgroup: Any, slot: Any) -> tuple[Any, Any]:
        """A warpgroup's part of a tile, float32 [64 outputs, rows].

        Args:
          slot: of its first chunk.

        Returns:
          The part, and the slot of the next tile's first chunk.
        """
        # Chunks of a turn of the loop. The next chunk's weights are written to registers while this one's are still
        # read, so that neighbours need registers of their own, which only different lines of a program have.
        at_once = 1 if self.form == "native" else 2

        def add_chunks(accumulator: Any, slot: Any, *, are_first: bool) -> Any:
            for i in range(at_once):
                is_first = are_first and i == 0
                if not is_first:
                    self._await(slot)
                self._add_chunk(accumulator, warpgroup, slot)
                if not is_first:
                    if not self.interpretable:
                        plgpu.wgmma_wait(1)
                    self._release(self._preceding(slot))
                slot = self._following(slot)
            return slot

        def multiply(accumulator: Any) -> tuple[Any, ...]:
            self._await(slot)
            scale = [self._scale(warpgroup, slot)] if self.scales_last else []
            after = add_chunks(accumulator, slot, are_first=True)
            num_turns = sum(self.counts) // at_once
            after = lax.fori_loop(1, num_turns, lambda _, slot: add_chunks(accumulator, slot, are_first=False), after)
            return accumulator[...], after, *scale

        accumulator = plgpu.WGMMAAccumulatorRef((TILE, self.plan.rows_each), jnp.float32)
        y, slot, *scale = pl.run_scoped(multiply, accumulator)
        self._release(self._preceding(slot))
        if self.scales_last:
            y = y * lax.broadcast_in_dim(scale[0], y.shape, [0])
        return y, slot

    def _await(self, slot: Any) -> None:
        plgpu.barrier_wait(self.smem["full"].at[slot])

    def _release(self, slot: Any) -> None:
        if self.interpretable:  # which orders what instructions read before copies by this alone
            plgpu.commit_smem()
        elif self.plan.cluster > 1:  # at whose barriers one thread arrives for all, at plain ones each
            _meet_in_warpgroup()
        plgpu.barrier_arrive(self.smem["empty"].at[slot])

    def _add_chunk(self, accumulator: Any, warpgroup: Any, slot: Any) -> None:
        weight_part = warpgroup if self.plan.weight_parts > 1 else 0
        row_part = warpgroup if self.plan.row_parts > 1 else 0
        weights, x = self.smem["weights"].at[slot, weight_part], self.smem["x"].at[slot, row_part]
        if self.form == "native":
            left = weights.transpose((1, 0))
            if not self.interpretable:  # with an operand in registers Pallas does it itself
                _fence_products()
        else:
            left = half_group(weights, self.form, interpretable=self.interpretable)
            if not self.scales_last:
                scale = lax.broadcast_in_dim(self._scale(warpgroup, slot), left.shape, [0])
                left = (left.astype(scale.dtype) * scale).astype(left.dtype)
            if self.interpretable:
                codes = self.smem["codes"].at[warpgroup]
                codes[...] = left
                plgpu.commit_smem()
                left = codes
        plgpu.wgmma(accumulator, left, x.transpose((1, 0)))
        if self.interpretable:
            plgpu.wgmma_wait(0)

    def _scale(self, warpgroup: Any, slot: Any) -> Any:
        scales = self.smem["scales"].at[slot, warpgroup if self.plan.weight_parts > 1 else 0]
        return plgpu.load(scales, layout=PER_OUTPUT, optimized=False)

    def send(
        self,
        warpgroup: Any,
        y: Any,
        make: Callable[[int, Any, Any], None],
        copy: Callable[[int, Any], None],
        *,
        prepare: Callable[[int, Any], None] | None = None,
    ) -> None:
        """Brings a warpgroup's part of a tile to device memory, some rows at a time.

        Args:
          y: [64 outputs, rows].
          make: writes what becomes of y [64 outputs, rows_out], its second argument, to its third, shared memory of
            that shape. The first tells which rows they are.
          copy: starts the copy of [rows_out, 64 outputs].
          prepare: called for memory that has got free, and by then for the rows that it will hold.
        """
        rows = self.plan.rows_out
        for part in range(self.plan.rows_each // rows):
            buffer = self.smem["out"].at[warpgroup, part % 2]
            # Of the tile before any may be under way, of this one's rows only those of the other buffer.
            plgpu.wait_smem_to_gmem(min(part, 1), wait_read_only=True)
            plgpu.commit_smem()
            if prepare is not None:
                prepare(part, buffer)
            make(part, y[:, part * rows : (part + 1) * rows], buffer.transpose((1, 0)))
            plgpu.commit_smem()
            copy(part, buffer)


def half_group(words: Any, form: str, *, interpretable: bool) -> Any:
    """Codes of half a group as bfloat16 [64 outputs, 64 inputs], in registers as the matrix instruction takes them.

    words: a reference to shared memory, int32 [words / 128, 128]: a half's words lie together (formats.py).
    """
    if interpretable:
        half = words[...].reshape(1, 1, -1)
        return unpack(jnp.concatenate([half, half], axis=2))[:, :DEPTH].astype(jnp.bfloat16)

    shape = plgpu.ShapeDtypeStruct((TILE, DEPTH), jnp.bfloat16, layout=MATRIX)

    @inlined(REF, return_type=shape)
    def emit(_, words):
        return fragments.operand(words, form, 0)

    return emit(words)


def _meet_in_warpgroup() -> None:
    @inlined()
    def emit(_: Any = None):
        mgpu.warpgroup_barrier()

    emit()


def _fence_products() -> None:
    """Orders registers before the matrix instructions that come now, as they ask for at the head of a loop."""

    @inlined()
    def emit(_: Any = None):
        nvvm.wgmma_fence_aligned()

    emit()


def run(tiles: Callable[[], Tiles], consume: Callable[[Any], None]) -> None:
    """Splits a block's warpgroups into those that multiply, `consume(warpgroup)`, and the one that copies."""
    warpgroup = lax.axis_index("warpgroup")

    # Registers of a thread: 504 to share out among three warpgroups.
    @pl.when(warpgroup == CONSUMERS)
    def _produce() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @plgpu.warp_map
        def _in_a_warp(warp: Any) -> None:
            pl.when(warp == 0)(lambda: tiles().produce())

    @pl.when(warpgroup < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(232, action="increase")
        consume(warpgroup)
