"""A few rows times weights, at the speed at which weights come out of memory: what a warpgroup of such a kernel does.

A block makes tiles of 64 outputs. Its warpgroups share out the inputs of a tile in chunks, one each and then from the
first again, and each keeps its next chunks on their way into shared memory, across tiles too. Weights are the left
operand of the matrix instruction (64 outputs by 16 inputs) and rows of x the right one, in eights: one row costs as
much as eight, and 64 eight times that.

    partial sums [64 outputs, rows] = weights [64 outputs, inputs] @ x^T [inputs, rows]

Weights of 16 bits are multiplied out of shared memory. Those of 8 and 4 bits are made bfloat16 in registers, and what
a chunk's group comes to is multiplied by its scale in float32. Where x comes as integers (integers.py), they are
multiplied as such, and what 64 inputs come to by both scales.

A launch has several weights. Either each has its own tiles, side by side (the input stage), or all have the same tiles
and are added up (the output stage). What differs is `Operand.first_tile`.

Letters: I inputs, O outputs, R rows of x, a multiple of 8; the last may be anything, rows do not mix.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.hopper import filled, store, tiled
from pallas_kernels.quantized_matmul.formats import GROUP, QuantizedWeight, storage
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.fragments import DEPTH, fragments, integer_fragments
from pallas_kernels.quantized_matmul.integer_sums import BY_ROWS, sum_of_blocks
from pallas_kernels.quantized_matmul.integers import BLOCK, NUM_AFFINE, IntegerRows
from pallas_kernels.quantized_matmul.plan import Launch, Plan
from pallas_kernels.quantized_matmul.rows import HALF_ROWS, ROWS, load

MATRIX = plgpu.Layout.WGMMA
PARITIES = 2  # of tiles whose sums are kept: one is read while the next one's are left


def arrays_of(weight: Any) -> list[jax.Array]:
    """A weight as a kernel takes it: the arrays that `Stream` reads, in order."""
    if not isinstance(weight, QuantizedWeight):
        return [weight]
    words = weight.values
    scales = weight.scales
    # Copies have at most 256 elements a side. Scales of 8 bits are one "group".
    words = words.reshape(*words.shape[:2], -1, 128)
    return [words, scales.reshape(scales.shape[0], -1, TILE)]


def x_of(x: Any, num_read: int) -> Any:
    """x [8, I] as `Stream` takes it where its first `num_read` rows mean something: [8 / num_read, num_read, I].

    A copy of eight rows of the first part finds the others past its end, which are zeros that nobody reads: every block
    reads all of x, in int4 half as many bytes as of weights.
    """
    if isinstance(x, IntegerRows) or num_read == x.shape[0]:
        return x
    return x.reshape(-1, num_read, x.shape[1])


def scratch(
    launch: Launch, num_rows: int, *, integers: IntegerRows | None = None, leaves: bool = True
) -> dict[str, Any]:
    """Shared memory and barriers of the streams of a block. integers: x, if it comes as such. leaves: whether
    warpgroups `leave` their sums."""
    form, plan = launch.form, launch.plan
    W, stages, width, groups = plan.warpgroups, plan.stages, plan.width, plan.groups
    num_copies = 1 + (integers is not None) + (width if form == "native" else 2 * width)
    if integers is None:
        buffers: dict[str, Any] = {"x": tiled(W, stages, num_rows, groups * GROUP, dtype=jnp.bfloat16)}
    else:
        buffers = {"x": integer_rows(W, stages, 2 * integers.num_held, groups * GROUP)}
        blocks = W, stages, groups * (GROUP // BLOCK), 2 * integers.num_held
        buffers["x_blocks"] = plgpu.SMEM(blocks, jnp.int32)
    buffers["full"] = plgpu.Barrier(num_arrivals=num_copies, num_barriers=W * stages)
    if leaves:
        buffers["sums"] = plgpu.SMEM((PARITIES, W, num_rows, TILE), jnp.float32)
        buffers["left"] = plgpu.Barrier(num_arrivals=W, num_barriers=max(W, PARITIES))
        buffers["read"] = plgpu.Barrier(num_arrivals=1, num_barriers=PARITIES)
    if plan.producer:
        buffers["empty"] = plgpu.Barrier(num_arrivals=1, num_barriers=W * stages)
    if form == "native":
        return buffers | {"weights": tiled(W, stages, width, groups * GROUP, TILE, dtype=jnp.bfloat16)}
    dtype, count = (jnp.float32, 1) if form == "int8" else (jnp.bfloat16, groups)
    num_words = storage(form, GROUP, TILE).values.shape[-1]
    buffers["weights"] = plgpu.SMEM((W, stages, width, groups, num_words // 128, 128), jnp.int32)
    buffers["scales"] = plgpu.SMEM((W, stages, width, count, TILE), dtype)
    if compat.interpreting():  # which takes both operands from shared memory
        buffers["codes"] = (
            tiled(W, TILE, DEPTH, dtype=jnp.bfloat16) if integers is None else integer_rows(W, TILE, DEPTH)
        )
    return buffers


def integer_rows(*shape: int) -> Any:
    """Shared memory of int8 as the tensor cores read it by 64 inputs."""
    transforms = plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, jnp.int8, transforms=transforms)


class Stream:
    """A warpgroup's share of its block's tiles.

    A block makes `plan.width` tiles at a time, one after the other in the launch, in one or several turns.

    Args:
      weights: each operand's arrays in device memory.
      block, split, warpgroup: whose it is.
      xs: each operand's x [R, I] in device memory, or what `x_of` makes of it, or it as IntegerRows.
      smem: as `scratch` says.
      in_turn: whether the block's warpgroups finish its tiles in turn, or the first one all.
    """

    def __init__(
        self,
        launch: Launch,
        weights: Sequence[Sequence[Any]],
        *,
        block: Any,
        split: Any,
        warpgroup: Any,
        xs: Sequence[Any],
        smem: dict[str, Any],
        in_turn: bool,
        interpretable: bool,
    ):
        self.launch, self.operands, self.plan, self.form = launch, launch.operands, launch.plan, launch.form
        self.weights, self.xs, self.smem, self.interpretable = weights, xs, smem, interpretable
        self.integers = isinstance(xs[0], IntegerRows)
        # Rows of x, and those of which there are products: of the sums that warpgroups leave the first ones.
        self.num_rows = math.prod(xs[0].shape[:-1])
        self.num_held = xs[0].num_held if self.integers else self.num_rows
        plan, self.is_sum = self.plan, launch.is_sum
        self.block, self.warpgroup, self.in_turn = block, warpgroup, in_turn
        # This one's index among those that share out a tile's inputs.
        self.index, self.num_shares = split * plan.warpgroups + warpgroup, plan.splits * plan.warpgroups
        if not self.is_sum and plan.width != 1:
            raise ValueError(f"tiles of several weights are made one at a time, not {plan.width} as in {plan}")
        terms = self.operands if self.is_sum else self.operands[:1]
        self.counts = [
            lax.div(jnp.int32(term.num_chunks(plan) - 1 + self.num_shares) - self.index, jnp.int32(self.num_shares))
            for term in terms
        ]
        self.per_turn = sum(self.counts[1:], self.counts[0])
        num_sets, num_blocks = -(-launch.num_tiles // plan.width), launch.num_blocks
        self.has_one_turn = num_sets <= num_blocks
        self.num_turns = lax.div(jnp.int32(num_sets - 1 + num_blocks) - block, jnp.int32(num_blocks))
        self.total = self.per_turn * self.num_turns

    def begin(self) -> None:
        """Starts the first copies, where the plan has no producer for them."""
        if not self.plan.producer:
            self._start_first(self._start)

    def produce(self) -> None:
        """Starts all copies, as `warpgroup` empties its stages: what a warp of the producer does."""
        self._start_first(self._copy)

        def start(n: Any, carry: None) -> None:
            slot = lax.rem(n, jnp.int32(self.plan.stages))
            plgpu.barrier_wait(self.smem["empty"].at[self.warpgroup * self.plan.stages + slot])
            self._copy(n)
            return carry

        # It stays until all is consumed: barriers want every phase seen.
        lax.fori_loop(self.plan.stages, self.total + self.plan.stages, start, None)

    def _start_first(self, start: Callable[..., None]) -> None:
        """Starts the copies of as many chunks as there are stages."""
        for n in range(self.plan.stages):
            start(jnp.int32(n))

    def _start(self, n: Any) -> None:
        """`_copy` by one warp, while the others go on."""

        @plgpu.warp_map
        def _in_a_warp(warp: Any) -> None:
            pl.when(warp == 0)(lambda: self._copy(n))

    def tile(self, turn: Any, i: int) -> Any:
        """The i-th tile of a turn, counted in the launch. The last ones may not exist."""
        return (self.block + turn * self.launch.num_blocks) * self.plan.width + i

    def sums(self, turn: Any) -> list[Any]:
        """Partial sums float32 [64 outputs, R] of a turn's tiles."""
        layout = BY_ROWS if self.integers else MATRIX
        totals = [filled((TILE, self.num_held), 0.0, layout) for _ in range(self.plan.width)]
        start = 0 if self.has_one_turn else turn * self.per_turn
        for count in self.counts:
            totals = lax.fori_loop(0, count, functools.partial(self._add_chunk, start), totals)
            start += count
        return totals

    def _copy(self, n: Any) -> None:
        """Starts the copies of this warpgroup's n-th chunk, if there is one."""
        pl.when(n < self.total)(lambda: self._copy_chunk(n))

    def _copy_chunk(self, n: Any) -> None:
        turn, within = jnp.int32(0), n
        if not self.has_one_turn:
            per_turn = jnp.maximum(self.per_turn, 1)
            turn, within = lax.div(n, per_turn), lax.rem(n, per_turn)
        slot = lax.rem(n, jnp.int32(self.plan.stages))
        if not self.is_sum:
            tile = self.tile(turn, 0)
            for k, operand in enumerate(self.operands):
                own = tile - operand.first_tile
                is_own = (own >= 0) & (own < operand.num_tiles)
                pl.when(is_own)(functools.partial(self._copy_term, k, slot, within, [own]))
            return
        # A tile that does not exist is the last one once more.
        tiles = [jnp.minimum(self.tile(turn, i), self.launch.num_tiles - 1) for i in range(self.plan.width)]
        for k, count in enumerate(self.counts):
            copy = functools.partial(self._copy_term, k, slot, within, tiles)
            pl.when((within >= 0) & (within < count))(copy)
            within = within - count

    def _copy_term(self, k: int, slot: Any, within: Any, tiles: list[Any]) -> None:
        for i, tile in enumerate(tiles):
            self._copy_tile(k, slot, within, i, tile)
        self._copy_x(k, slot, within)

    def _group(self, within: Any) -> Any:
        """The first group of this warpgroup's chunk of that number."""
        return (self.index + within * self.num_shares) * self.plan.groups

    def _full(self, slot: Any) -> Any:
        return self.smem["full"].at[self.warpgroup * self.plan.stages + slot]

    def _copy_x(self, k: int, slot: Any, within: Any) -> None:
        inputs, x, at = pl.ds(self._group(within) * GROUP, self.plan.groups * GROUP), self.xs[k], (self.warpgroup, slot)
        if self.integers:
            blocks = pl.ds(self._group(within) * (GROUP // BLOCK), self.plan.groups * (GROUP // BLOCK))
            plgpu.copy_gmem_to_smem(x.blocks.at[blocks], self.smem["x_blocks"].at[at], self._full(slot))
            x = x.values
        # A start that Pallas does not know: it refuses what it knows to go past the end.
        rows = x.at[:, inputs] if len(x.shape) == 2 else x.at[0, pl.ds(slot * 0, self.num_rows), inputs]
        plgpu.copy_gmem_to_smem(rows, self.smem["x"].at[at], self._full(slot))

    def _copy_tile(self, k: int, slot: Any, within: Any, i: int, tile: Any) -> None:
        """tile: of the operand's."""
        operand, groups, group = self.operands[k], self.plan.groups, self._group(within)
        at = (self.warpgroup, slot, i)
        if self.form == "native":
            source = self.weights[k][0].at[pl.ds(group * GROUP, groups * GROUP), pl.ds(tile * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, self.smem["weights"].at[at], self._full(slot))
            return
        words, scales = self.weights[k]
        mode = plgpu.OOBFillMode.ZEROS if operand.num_groups % groups else plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=mode)
        copy(words.at[tile, pl.ds(group, groups)], self.smem["weights"].at[at], self._full(slot))
        of_scales = pl.ds(0, 1) if self.form == "int8" else pl.ds(group, groups)
        copy(scales.at[tile, of_scales], self.smem["scales"].at[at], self._full(slot))

    def _add_chunk(self, start: Any, i: Any, totals: list[Any]) -> list[Any]:
        n = start + i
        slot = lax.rem(n, jnp.int32(self.plan.stages))
        plgpu.barrier_wait(self._full(slot))
        add = self._add_native if self.form == "native" else self._add_quantized
        totals = add(slot, totals)
        plgpu.commit_smem()  # all warps have read what the next copies replace
        if self.plan.producer:
            plgpu.barrier_arrive(self.smem["empty"].at[self.warpgroup * self.plan.stages + slot])
        else:
            self._start(n + self.plan.stages)
        return totals

    def _add_native(self, slot: Any, totals: list[Any]) -> list[Any]:
        x, weights = (self.smem[name].at[self.warpgroup, slot] for name in ("x", "weights"))

        def products(*accumulators: Any) -> list[Any]:
            for start in range(0, self.plan.groups * GROUP, DEPTH):
                inputs = pl.ds(start, DEPTH)
                for i, accumulator in enumerate(accumulators):
                    left, right = weights.at[i, inputs].transpose((1, 0)), x.at[:, inputs].transpose((1, 0))
                    plgpu.wgmma(accumulator, left, right)
                    if self.interpretable:
                        plgpu.wgmma_wait(0)
            return [accumulator[...] for accumulator in accumulators]

        made = pl.run_scoped(products, *[self._accumulator()] * self.plan.width)
        return [total + product for total, product in zip(totals, made, strict=True)]

    def _add_quantized(self, slot: Any, totals: list[Any]) -> list[Any]:
        at_slot = (self.warpgroup, slot)
        x, weights = (self.smem[name].at[at_slot] for name in ("x", "weights"))
        units = [(group, i) for group in range(self.plan.groups) for i in range(self.plan.width)]
        cut, layout = (integer_fragments, BY_ROWS) if self.integers else (fragments, MATRIX)

        def operands(number: int) -> list[Any]:
            if number == len(units):
                return []
            group, i = units[number]
            return cut(weights.at[i, group], self.form, interpretable=self.interpretable)

        totals, parts = list(totals), operands(0)
        for number, (group, i) in enumerate(units):

            def products(*accumulators: Any, parts: list[Any] = parts, group: int = group, number: int = number) -> Any:
                for part, codes in enumerate(parts):
                    inputs = pl.ds(group * GROUP + part * DEPTH, DEPTH)
                    accumulator = accumulators[part % len(accumulators)]
                    plgpu.wgmma(accumulator, self._left(codes), x.at[:, inputs].transpose((1, 0)))
                    if self.interpretable:
                        plgpu.wgmma_wait(0)
                following = operands(number + 1)  # while the products are under way
                return [accumulator[...] for accumulator in accumulators], following

            # Integers of 64 inputs have a scale of their own.
            num_sums = len(parts) if self.integers else 1
            made, parts = pl.run_scoped(products, *[self._accumulator()] * num_sums)
            if self.integers:
                blocks = [self.smem["x_blocks"].at[(*at_slot, group * num_sums + part)] for part in range(num_sums)]
                y = sum_of_blocks(made, blocks, self.form, interpretable=self.interpretable)
            else:
                (y,) = made
            at = (*at_slot, i, 0 if self.form == "int8" else group)
            scale = plgpu.load(self.smem["scales"].at[at], layout=layout.reduce(1), optimized=False)
            totals[i] += y * lax.broadcast_in_dim(scale.astype(jnp.float32), y.shape, [0])
        return totals

    def _accumulator(self) -> Any:
        if self.integers:
            return plgpu.WGMMAAccumulatorRef((TILE, 2 * self.num_held), jnp.int32)
        return plgpu.WGMMAAccumulatorRef((TILE, self.num_rows), jnp.float32)

    def _left(self, codes: Any) -> Any:
        """The left operand: in registers, but for the interpreter in shared memory."""
        if not self.interpretable:
            return codes
        ref = self.smem["codes"].at[self.warpgroup]
        ref[...] = codes
        plgpu.commit_smem()
        return ref

    def is_finisher(self, number: Any) -> Any:
        """Whether this warpgroup finishes the block's tile of that number."""
        return self.warpgroup == (lax.rem(jnp.int32(number), jnp.int32(self.plan.warpgroups)) if self.in_turn else 0)

    def _left_barrier(self, number: Any) -> Any:
        """On which a tile's sums are counted: no two tiles that follow one another have the same, or who is early would
        count for who is late. And one warpgroup waits for it each time."""
        period = self.plan.warpgroups if self.in_turn else PARITIES
        return self.smem["left"].at[lax.rem(jnp.int32(number), jnp.int32(period))]

    def leave(self, number: Any, partial: Any) -> None:
        """Leaves this warpgroup's sums of a tile for the one that finishes it, and goes on.

        number: counts the tiles of the block.
        """
        parity = _parity(number)
        pl.when(jnp.int32(number) >= PARITIES)(lambda: plgpu.barrier_wait(self.smem["read"].at[parity]))
        if self.integers:
            store(self.smem["sums"].at[parity, self.warpgroup, pl.ds(0, self.num_held)].transpose((1, 0)), partial)
        else:
            target = self.smem["sums"].at[parity, self.warpgroup].transpose((1, 0))
            target[...] = plgpu.layout_cast(partial, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self._left_barrier(number))

    def wait_for_all(self, number: Any) -> None:
        """Of a tile's finisher: returns when all warpgroups of the block have left their sums."""
        plgpu.barrier_wait(self._left_barrier(number))

    def let_go(self, number: Any) -> None:
        """Of a tile's finisher: what it has `gathered` may be replaced, if there is a tile left to do so."""
        is_replaced = number + PARITIES < self.num_turns * self.plan.width
        pl.when(is_replaced)(lambda: plgpu.barrier_arrive(self.smem["read"].at[_parity(number)]))

    @property
    def affine_rows(self) -> tuple[int, int]:
        """Where the sums have the products of a deferred norm's scale and shift: the last two."""
        first = self.num_held - NUM_AFFINE
        return first, first + 1

    def gathered(self, number: Any, half: int | None = None, row: int | None = None) -> Any:
        """What all warpgroups have left of a tile, added up in their order: float32 [R, 64 outputs], as ROWS.

        half: 0 or 1 for half the outputs, as HALF_ROWS. row: for one row alone, in the layout of their outputs.
        """
        parity = _parity(number)
        outputs, layout = pl.ds(0, TILE), ROWS
        if half is not None:
            outputs, layout = pl.ds(half * (TILE // 2), TILE // 2), HALF_ROWS
        rows, layout = (slice(None), layout) if row is None else (row, layout.reduce(0))
        parts = [load(self.smem["sums"].at[parity, w, rows, outputs], layout) for w in range(self.plan.warpgroups)]
        return sum(parts[1:], parts[0])


def _parity(number: Any) -> Any:
    return lax.rem(jnp.int32(number), jnp.int32(PARITIES))


def run(plan: Plan, warpgroup: Any, make: Callable[[Any], Stream], consume: Callable[[Stream], None]) -> None:
    """Splits a block's warpgroups into those that consume their stream and, where the plan has one, the producer.

    make: the stream of a warpgroup that consumes.
    """
    if not plan.producer:
        consume(make(warpgroup))
        return
    pl.when(warpgroup < plan.warpgroups)(lambda: consume(make(warpgroup)))

    @pl.when(warpgroup == plan.warpgroups)
    def _produce() -> None:
        @plgpu.warp_map
        def _warps(warp: Any) -> None:
            pl.when(warp < plan.warpgroups)(lambda: make(warp).produce())
