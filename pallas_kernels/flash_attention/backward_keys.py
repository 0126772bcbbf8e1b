"""dK, dV and dQ in one pass: a block of keys stays, tiles of queries go by.

Scores are recomputed transposed, keys along rows, so that P^T and dS^T leave the softmax in the registers from which
the tensor cores take them for dV += P^T dO and dK += dS^T Q. dS also goes through shared memory, for dQ = dS K: five
products a tile. A block's dK and dV do not leave registers before its last query head is done.

Of a tile of dQ each block has but its own part. The parts meet in float32 in device memory, where the copy engine adds
them, one block after the other in a fixed order (`KeyOrder`): the result does not depend on which block was faster.

What is constant along a row or column of the scores costs nothing: accumulators start from it. Those of the scores
start from ALiBi minus the log-sum-exp (and from a large negative number where a key is hidden), those of dO V^T from
minus delta.

Where documents lie back to back, a block of keys meets the tiles of queries up to the end of its last document, and a
tile of dQ gets its parts from the blocks since the beginning of its first.

Two warpgroups compute, 64 keys each; the warps of a third copy. dQ lags a step behind: a warpgroup takes the other's
half of dS when it has long been there, so the two may drift apart, and one's softmax meets the other's products.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.backward_order import KEYS, KeyOrder, Problem
from pallas_kernels.flash_attention.reference import MASKED, hf_bf16_bias
from pallas_kernels.flash_attention.starts import hide_unseen
from pallas_kernels.hopper import LOG2E, Accumulator, hide_columns, rounded, tiled

WARPGROUPS = 2  # that compute
ROWS = KEYS // WARPGROUPS
STAGES = 2  # tiles of Q and dO that shared memory holds
# Warps that add up dQ, by turns: each waits until its part has arrived before it lets the next block add its own.
STORERS = 2
PER_KEY, PER_QUERY = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when the kernel is compiled.

    heads: of those that share K and V, how many a block works through.
    """

    problem: Problem
    heads: int
    alibi: str | None
    scale: float
    interpretable: bool

    @property
    def chunks(self) -> int:
        return -(-self.problem.group // self.heads)


def gradients(inputs: dict[str, Any], settings: Settings, num_sms: int) -> dict[str, jax.Array]:
    """Runs the kernel.

    Args:
      inputs: "q", "dout" [B, T, N, H], "k", "v" [B, S, K, H] and "stats", float32 [B, N, 2, Tp]: what a query's scores
        start from, in units of q . k, and minus delta. Where they are not trivial also "offsets" and "lengths" [B],
        "slopes" [N], and "starts", filled up to whole tiles, with what `Problem.tile_ends` makes of them.

    Returns:
      "dk" and "dv" [chunks, B, S, K, H], to be summed over chunks: in the dtype of k if there is one chunk, otherwise
      in float32, with S rounded up to 128. "dq", float32 [B, T, N, H], still to be multiplied by the scale.
      Interpreted, where nothing adds in place, [blocks of keys, B, T, N, H]; a block writes the tiles it concerns.
    """
    p, dtype = settings.problem, inputs["k"].dtype
    table = KeyOrder(p.B, p.K, settings.chunks, p.num_key_blocks, num_sms).table()
    inputs = {**inputs, "table": table}
    if settings.chunks == 1:
        dkv = jax.ShapeDtypeStruct((1, p.B, p.S, p.K, p.H), dtype)
    else:
        dkv = jax.ShapeDtypeStruct((settings.chunks, p.B, p.num_key_blocks * KEYS, p.K, p.H), jnp.float32)
    out_type = {"dk": dkv, "dv": dkv}
    parts = (p.num_key_blocks,) if settings.interpretable else ()
    out_type["dq"] = jax.ShapeDtypeStruct((*parts, p.B, p.T, p.N, p.H), jnp.float32)

    def body(*arrays: Any, **smem: Any) -> None:
        _Block(settings, dict(zip([*inputs, *out_type], arrays)), smem).run()

    outputs = plgpu.kernel(
        body,
        out_type=tuple(out_type.values()),
        scratch_types=_scratch(settings, dtype),
        grid=(len(table),),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not settings.interpretable),
    )(*inputs.values())
    return dict(zip(out_type, outputs))


def _scratch(settings: Settings, dtype: Any) -> dict[str, Any]:
    queries, H = settings.problem.queries, settings.problem.H
    scratch = {
        "q_smem": tiled(STAGES, queries, H, dtype=dtype),
        "dout_smem": tiled(STAGES, queries, H, dtype=dtype),
        "stats_smem": plgpu.SMEM((STAGES, 2, queries), jnp.float32),
        "k_smem": tiled(KEYS, H, dtype=dtype),
        "v_smem": tiled(KEYS, H, dtype=dtype),
        "kv_full": plgpu.Barrier(num_arrivals=2),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        "ds_smem": tiled(2, KEYS, queries, dtype=dtype),
        "ds_full": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "dq_smem": tiled(STORERS, queries, H, dtype=jnp.float32),
        "dq_full": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STORERS),
        "dq_free": plgpu.Barrier(num_barriers=STORERS),
    }
    if settings.interpretable:
        scratch["p_smem"] = tiled(KEYS, queries, dtype=dtype)
    return scratch


class _Step(NamedTuple):
    """One tile of queries of one head. count: of the block's steps so far. slope: None without ALiBi."""

    count: Any
    head: Any
    tile: Any
    slope: Any


class _Work(NamedTuple):
    """A block of keys of one row and KV head, and the tiles of queries that it meets; all int32 scalars.

    first_hidden_tile: the first in which a query's document begins past the block's first key; None without documents.
    """

    row: Any
    kv_head: Any
    chunk: Any
    key_block: Any
    forwards: Any  # 1 or 0
    offset: Any
    length: Any
    first_head: Any
    num_heads: Any
    first_tile: Any
    num_tiles: Any
    first_hidden_tile: Any

    @property
    def first_key(self) -> Any:
        return self.key_block * KEYS

    @property
    def num_steps(self) -> Any:
        return self.num_heads * self.num_tiles

    def for_each_step(self, body: Callable[[_Step, Any], Any], carry: Any, slopes: Any = None) -> Any:
        """Runs body(step, carry) for every query head and tile of queries."""
        start = jnp.where(self.forwards == 1, self.first_tile, self.first_tile + self.num_tiles - 1)
        stride = 2 * self.forwards - 1

        def per_head(index, carry):
            head, count = self.first_head + index, index * self.num_tiles
            slope = None if slopes is None else slopes[head]

            def per_tile(index, carry):
                return body(_Step(count + index, head, start + stride * index, slope), carry)

            return lax.fori_loop(0, self.num_tiles, per_tile, carry)

        return lax.fori_loop(0, self.num_heads, per_head, carry)


class _Block:
    """What one block does. `arrays` in device memory and `smem` by name, barriers among the latter."""

    def __init__(self, settings: Settings, arrays: dict[str, Any], smem: dict[str, Any]):
        self.settings = settings
        self.problem = settings.problem
        self.arrays = arrays
        self.smem = smem

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def _copy():
            # Registers of a thread: 504 to share out among three warpgroups.
            plgpu.set_max_registers(24, action="decrease")
            turns = None
            if not self.settings.interpretable:
                p = self.problem
                turns = pl.get_global(plgpu.SemaphoreType.REGULAR((p.B, p.N, p.num_query_tiles)))

            @plgpu.warp_map
            def _each_warp(warp):
                pl.when(warp == 0)(self.load)
                pl.when((warp >= 1) & (warp <= STORERS))(lambda: self.store_dq(warp - 1, turns))

        @pl.when(warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            _Warpgroup(self, warpgroup).run()

    def work(self) -> _Work:
        """Each role reads this for itself: numbers kept from one to another would cost registers in both."""
        row, kv_head, chunk, key_block, forwards = (self.arrays["table"][lax.axis_index("block"), i] for i in range(5))
        p, heads = self.problem, self.settings.heads
        offset, length = jnp.int32(0), jnp.int32(p.S)
        if "offsets" in self.arrays:
            offset = self.arrays["offsets"][row]
        if "lengths" in self.arrays:
            length = self.arrays["lengths"][row]
        first_tile = p.first_query_tile(key_block, offset, length)
        end_tile, first_hidden_tile = p.num_query_tiles, None
        if "starts" in self.arrays:
            end_tile, first_hidden_tile = (self.arrays["tile_ends"][row, i, key_block] for i in range(2))
            end_tile = jnp.maximum(end_tile, first_tile)
        return _Work(
            row=row,
            kv_head=kv_head,
            chunk=chunk,
            key_block=key_block,
            forwards=forwards,
            offset=offset,
            length=length,
            first_head=kv_head * p.group + chunk * heads,
            num_heads=jnp.minimum(heads, p.group - chunk * heads),
            first_tile=first_tile,
            num_tiles=end_tile - first_tile,
            first_hidden_tile=first_hidden_tile,
        )

    def load(self) -> None:
        """The loading warp: K and V once, then Q, dO and their statistics as shared memory gets free."""
        smem, arrays, queries = self.smem, self.arrays, self.problem.queries
        work = self.work()
        for name in "kv":
            source = arrays[name].at[work.row, pl.ds(work.first_key, KEYS), work.kv_head]
            plgpu.copy_gmem_to_smem(source, smem[f"{name}_smem"], smem["kv_full"])

        def load_tile(step, slot):
            pl.when(step.count >= STAGES)(lambda: plgpu.barrier_wait(smem["free"].at[slot]))
            rows = pl.ds(step.tile * queries, queries)
            full = smem["full"].at[slot]
            for name in ("q", "dout"):
                plgpu.copy_gmem_to_smem(arrays[name].at[work.row, rows, step.head], smem[f"{name}_smem"].at[slot], full)
            plgpu.copy_gmem_to_smem(arrays["stats"].at[work.row, step.head, :, rows], smem["stats_smem"].at[slot], full)
            return _next_slot(slot)

        work.for_each_step(load_tile, jnp.int32(0))

    def store_dq(self, storer: Any, turns: Any) -> None:
        """A storing warp: adds this block's part of every second tile of dQ, each when its turn has come.

        turns: how many blocks have added to each tile, [B, N, num_query_tiles]; None where they write side by side.
        """
        p, smem = self.problem, self.smem
        work = self.work()
        part, full, free = (smem[name].at[storer] for name in ("dq_smem", "dq_full", "dq_free"))

        def store(step):
            at = (work.row, pl.ds(step.tile * p.queries, p.queries), step.head)
            if turns is None:
                plgpu.barrier_wait(full)
                plgpu.copy_smem_to_gmem(part, self.arrays["dq"].at[(work.key_block, *at)])
            else:
                first, last = 0, p.num_key_blocks_of(step.tile, work.offset, work.length) - 1
                if "starts" in self.arrays:
                    first = p.first_key_block_of(self.arrays["starts"][work.row, step.tile * p.queries], last + 1)
                mine = jnp.where(work.forwards == 1, last - work.key_block, work.key_block - first)
                turn, target = turns.at[work.row, step.head, step.tile], self.arrays["dq"].at[at]
                plgpu.semaphore_wait(turn, mine, decrement=False, memory_scope="gpu")
                plgpu.barrier_wait(full)
                pl.when(mine == 0)(lambda: plgpu.copy_smem_to_gmem(part, target))
                pl.when(mine > 0)(lambda: plgpu.copy_smem_to_gmem(part, target, reduction_op="add"))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(free, predicate=step.count + STORERS < work.num_steps)
            plgpu.wait_smem_to_gmem(0)
            if turns is not None:
                plgpu.semaphore_signal(turn, memory_scope="gpu")

        def store_tile(step, _):
            pl.when(lax.rem(step.count, jnp.int32(STORERS)) == storer)(lambda: store(step))

        work.for_each_step(store_tile, None)


class _Warpgroup:
    """A computing warpgroup of a block, on its own 64 keys."""

    def __init__(self, block: _Block, index: Any):
        self.block = block
        self.settings = block.settings
        self.smem = block.smem
        self.index = index
        self.H, self.queries = block.problem.H, block.problem.queries
        self.dtype = block.smem["k_smem"].dtype

    def run(self) -> None:
        work, smem = self.block.work(), self.smem
        plgpu.barrier_wait(smem["kv_full"])

        def accumulate(dk_acc, dv_acc):
            def add(step, slot):
                return self.step(work, step, slot, dk_acc, dv_acc)

            work.for_each_step(add, jnp.int32(0), self.block.arrays.get("slopes"))
            return dk_acc[...], dv_acc[...]

        dk, dv = pl.run_scoped(accumulate, *[Accumulator((ROWS, self.H), jnp.float32)] * 2)

        @pl.when(work.num_steps > 0)
        def _last():
            plgpu.barrier_wait(smem["ds_full"])
            self.hand_over_dq(self.multiply_dq(work.num_steps - 1), work.num_steps - 1)

        # Now the other warpgroup, too, has read all of K, and dK may take its place.
        plgpu.barrier_arrive(smem["ds_full"])
        plgpu.barrier_wait(smem["ds_full"])
        self.store(dk * self.settings.scale, dv)

    def step(self, work: _Work, step: _Step, slot: Any, dk_acc: Any, dv_acc: Any) -> Any:
        """Adds a tile of queries to dK and dV, and multiplies out dQ of the tile before."""
        smem, interpretable = self.smem, self.settings.interpretable
        mine = pl.ds(self.index * ROWS, ROWS)
        parity = lax.rem(step.count, jnp.int32(2))
        p, ds = self.softmax(work, step, slot)
        p_operand, ds_operand = p, ds
        if interpretable:  # which takes no operands in registers
            smem["p_smem"][mine] = p
            plgpu.commit_smem()
            p_operand, ds_operand = smem["p_smem"].at[mine], smem["ds_smem"].at[parity, mine]
        plgpu.wgmma(dv_acc, p_operand, smem["dout_smem"].at[slot])
        # The other warpgroup has written its half of the dS before, and no longer reads the one before that.
        pl.when(step.count > 0)(lambda: plgpu.barrier_wait(smem["ds_full"]))
        smem["ds_smem"][parity, mine] = ds
        plgpu.commit_smem()

        def multiply_dk():
            plgpu.wgmma(dk_acc, ds_operand, smem["q_smem"].at[slot])

        # In the first step there is none before: what comes out then goes nowhere.
        dq = self.multiply_dq(step.count - 1, meanwhile=multiply_dk)
        pl.when(step.count > 0)(lambda: self.hand_over_dq(dq, step.count - 1))
        plgpu.barrier_arrive(smem["ds_full"])
        # Also because accumulators may be set only while no product is in flight.
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem["free"].at[slot], predicate=step.count + STAGES < work.num_steps)
        return _next_slot(slot)

    def softmax(self, work: _Work, step: _Step, slot: Any) -> tuple[jax.Array, jax.Array]:
        """P^T and dS^T [ROWS, queries] in the inputs' dtype, from K Q^T and V dO^T."""
        smem, shape = self.smem, (ROWS, self.queries)
        here = _opaque(self.index)
        mine = pl.ds(here * ROWS, ROWS)
        plgpu.barrier_wait(smem["full"].at[slot])
        s_start = self.start_of_scores(work, step, slot, work.first_key + here * ROWS)
        dp_start = _along_rows(plgpu.load(smem["stats_smem"].at[slot, 1], layout=PER_QUERY))

        def multiply(s_acc, dp_acc):
            plgpu.wgmma(s_acc, smem["k_smem"].at[mine], smem["q_smem"].at[slot].transpose((1, 0)))
            plgpu.wgmma(dp_acc, smem["v_smem"].at[mine], smem["dout_smem"].at[slot].transpose((1, 0)))

        def weights(s, dp):
            p = jnp.exp2(s * (self.settings.scale * LOG2E))
            ds = p * dp()
            return p.astype(self.dtype), ds.astype(self.dtype)

        def products(refs):
            s_acc, dp_acc, p_ref, ds_ref = refs
            multiply(s_acc, dp_acc)
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            p_ref[...], ds_ref[...] = weights(s, lambda: plgpu.wgmma_accumulator_load(dp_acc, wait_n=0))

        def products_interpreted(s_acc, dp_acc):
            multiply(s_acc, dp_acc)
            return weights(s_acc[...] + s_start, lambda: dp_acc[...] + dp_start)

        if self.settings.interpretable:  # which takes no accumulators that are set
            return pl.run_scoped(products_interpreted, *[Accumulator(shape, jnp.float32)] * 2)
        nothing = plgpu.layout_cast(jnp.zeros(shape, self.dtype), plgpu.Layout.WGMMA)
        starts = Accumulator.init(s_start), Accumulator.init(dp_start)
        _, _, p, ds = pl.run_state(products)((*starts, nothing, nothing))
        return p, ds

    def start_of_scores(self, work: _Work, step: _Step, slot: Any, first_key: Any) -> jax.Array:
        """What K Q^T starts from, [ROWS, queries]: ALiBi minus the log-sum-exp, in units of q . k."""
        settings, queries = self.settings, self.queries
        start = _along_rows(plgpu.load(self.smem["stats_smem"].at[slot, 0], layout=PER_QUERY))
        key = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_KEY) + first_key
        first_query = work.offset + step.tile * queries
        if settings.alibi is not None:
            bias = _key_bias(key, step.slope, first_query, settings.alibi, settings.scale, self.dtype)
            start += lax.broadcast_in_dim(bias, start.shape, [0])

        def hide(start):
            first_seen = jnp.where(key < work.length, key - first_query, queries)
            if "starts" not in self.block.arrays:
                return hide_columns(start, first_seen, MASKED, interpretable=settings.interpretable)
            starts = self.block.arrays["starts"].at[work.row, pl.ds(step.tile * queries, queries)]
            starts = plgpu.load(starts, layout=PER_QUERY, optimized=False)
            return hide_unseen(start, first_seen, key, starts, interpretable=settings.interpretable)

        # Whether some of these queries do not see some of the block's keys.
        last_key = work.first_key + KEYS - 1
        first_full_tile = lax.div(jnp.maximum(last_key - work.offset, 0) + queries - 1, jnp.int32(queries))
        first_full_tile = jnp.where(last_key < work.length, first_full_tile, self.block.problem.num_query_tiles)
        cut = step.tile < first_full_tile
        if work.first_hidden_tile is not None:
            cut |= step.tile >= work.first_hidden_tile
        return lax.cond(cut, hide, lambda start: start, start)

    def multiply_dq(self, count: Any, meanwhile: Callable[[], None] | None = None) -> jax.Array:
        """This warpgroup's half of the dQ tile of a step, 64 x 64: columns where H is 128, rows where it is 64.

        meanwhile: issues a product that may still run when this one has ended.
        """
        ds, k = self.smem["ds_smem"].at[count & 1], self.smem["k_smem"]

        def product(dq_acc):
            half = pl.ds(_opaque(self.index) * ROWS, ROWS)
            if self.H == 128:
                plgpu.wgmma(dq_acc, ds.transpose((1, 0)), k.at[:, half])
            else:
                plgpu.wgmma(dq_acc, ds.at[:, half].transpose((1, 0)), k.at[pl.ds(_opaque(jnp.int32(0)) * 8, KEYS)])
            if meanwhile is not None:
                meanwhile()
            return plgpu.wgmma_accumulator_load(dq_acc, wait_n=0 if meanwhile is None else 1)

        return pl.run_scoped(product, Accumulator((64, 64), jnp.float32))

    def hand_over_dq(self, dq: jax.Array, count: Any) -> None:
        """Gives this warpgroup's half of a tile to the warp that stores it."""
        smem, storer = self.smem, lax.rem(count, jnp.int32(STORERS))
        half = pl.ds(self.index * 64, 64)
        pl.when(count >= STORERS)(lambda: plgpu.barrier_wait(smem["dq_free"].at[storer]))
        if self.H == 128:
            smem["dq_smem"][storer, :, half] = dq
        else:
            smem["dq_smem"][storer, half] = dq
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem["dq_full"].at[storer])

    def store(self, dk: jax.Array, dv: jax.Array) -> None:
        """One chunk's dK and dV go through the place of K and V, since copies stop at the end of an array."""
        work = self.block.work()
        at = (work.chunk, work.row, pl.ds(work.first_key + self.index * ROWS, ROWS), work.kv_head)
        for name, value in (("k", dk), ("v", dv)):
            target = self.block.arrays[f"d{name}"]
            if target.dtype == jnp.float32:  # of several chunks: rounded up, so that there is no end to stop at
                target[at] = value
            else:
                staging = self.smem[f"{name}_smem"].at[pl.ds(self.index * ROWS, ROWS)]
                staging[...] = value.astype(self.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging, target.at[at])
        plgpu.wait_smem_to_gmem(0)


def _next_slot(slot: Any) -> Any:
    return lax.select(slot == STAGES - 1, jnp.int32(0), slot + 1)


def _along_rows(x: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x, (ROWS, *x.shape), [1])


def _opaque(x: Any) -> Any:
    """The same number, unknown to the compiler, so that addresses are computed from it where they are used.

    Otherwise it computes them all before the loop, dozens, and has no registers to keep them in.
    """
    return lax.optimization_barrier((x,))[0]


def _key_bias(key: jax.Array, slope: Any, first_query: Any, alibi: str, scale: float, dtype: Any) -> jax.Array:
    """ALiBi by key position in units of q . k; of mode "float32" what is left without the part of a tile's queries."""
    if alibi == "float32":
        return slope * (key - first_query).astype(jnp.float32)
    return hf_bf16_bias(slope, key.astype(jnp.float32), scale, dtype, rounded) / scale
