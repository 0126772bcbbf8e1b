"""The decode kernel for Hopper: Pallas, Mosaic GPU.

A step of decoding reads all of K and V once and computes next to nothing, so what counts is that every multiprocessor
keeps enough copies in flight from the first microsecond on. Each warpgroup takes every n-th tile of keys of one row and
KV head, with the next tiles on their way into shared memory, and keeps an online softmax for all query heads of its
block at once. Then the warpgroups and blocks of a row and KV head combine what they have in one of two ways (cluster.py
and grid.py): each a part of the result, and always in the same order, so the same inputs give the same bits.

Heads are the columns of both products: the matrix instruction works on 64 rows and any multiple of 8 columns, so 71
heads cost as much as 72.

    scores [keys, heads] = K tile [keys, H] @ q^T [H, heads]
    sums   [H, heads]   += V tile^T [H, keys] @ weights [keys, heads]

What a dead slot of the cache holds is multiplied by a weight of zero, so it may be anything but infinity or NaN.

Letters as everywhere (B S N K G H); base-2 exponentials throughout, scores scaled by log2(e).
Source: Dao et al., Flash-Decoding for long-context inference (2023), for the split; Press et al., Train Short, Test
Long (2022), for ALiBi.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.decode_attention import cluster, grid
from pallas_kernels.decode_attention.cluster import MATRIX, PER_HEAD
from pallas_kernels.decode_attention.plan import MAX_HEADS, REDUCTION_BYTES, Plan, Shape, default_plan
from pallas_kernels.decode_attention.reference import PAGE
from pallas_kernels.flash_attention.reference import MASKED, hf_bf16_bias
from pallas_kernels.hopper import (
    LOG2E,
    filled,
    rounded,
    tiled,
    wait_until_results_have_left,
)

# Registers of one value a key: a row of the scores.
PER_KEY = MATRIX.reduce(1)
# 8 heads of 64 elements, four to a thread: what a copy within shared memory goes by.
QUERIES = plgpu.Layout.TILED(plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def reason_against(q: Array, keys: Array, scale: float) -> str | None:
    """Why the kernel cannot take these arguments here, or None where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or keys.dtype != q.dtype:
        return f"it takes bfloat16 or float16 throughout, not queries in {q.dtype} with keys in {keys.dtype}"
    if q.shape[-1] not in MAX_HEADS:
        return f"it takes head dims {' and '.join(map(str, MAX_HEADS))}, not {q.shape[-1]}"
    if keys.shape[1] % 8 and keys.shape[1] > 8:
        return f"it copies 8 slots at a time, and a row of the cache has {keys.shape[1]}: make that a multiple of 8"
    if scale <= 0:
        return f"it takes a positive scale, not {scale}"
    return None


def decode_mosaic(
    q: Float[Array, "R N H"],
    keys: Float[Array, "_ _ K H"],
    values: Float[Array, "_ _ K H"],
    lengths: Int[Array, " B"],
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    page_table: Int[Array, "B max_pages"] | None,
    *,
    plan: Plan | None = None,
) -> Float[Array, "R N H"]:
    """`decode_attention` by the kernel; its arguments, all given. `plan` None takes the tuned one.

    Under vmap the mapped calls become rows of one launch; slopes may not be mapped over.
    """
    options = {"alibi": alibi, "scale": scale, "plan": plan}
    options |= {"num_sms": compat.num_sms(), "interpretable": compat.interpreting()}

    def run(*arrays: Any) -> Array:
        return _launch(*arrays, None, **options)[0]

    launch = jax.custom_batching.custom_vmap(run)

    @launch.def_vmap
    def _fold(axis_size, in_batched, q, keys, values, lengths, slopes, page_table):
        q_mapped, keys_mapped, values_mapped, lengths_mapped, slopes_mapped, table_mapped = in_batched
        if slopes is not None and slopes_mapped:
            raise NotImplementedError("decode_attention: the kernel cannot be mapped over slopes")

        def rows(x, mapped):
            x = x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        if page_table is not None:
            page_table = rows(page_table, table_mapped)
        if page_table is None or keys_mapped or values_mapped:
            if page_table is not None:  # each call has its own pool
                pools = jnp.arange(axis_size, dtype=jnp.int32) * keys.shape[1 if keys_mapped else 0]
                page_table += jnp.repeat(pools, page_table.shape[0] // axis_size)[:, None]
            keys, values = rows(keys, keys_mapped), rows(values, values_mapped)
        B = lengths.shape[-1]
        idle = q.shape[-3] - B  # rows without a length, which would stand between those of the mapped calls
        q, lengths = rows(q[..., :B, :, :], q_mapped), rows(lengths, lengths_mapped)
        out = decode_mosaic(q, keys, values, lengths, slopes, alibi, scale, page_table, plan=plan)
        return jnp.pad(out.reshape(axis_size, B, *out.shape[1:]), ((0, 0), (0, idle), (0, 0), (0, 0))), True

    return launch(q, keys, values, lengths, slopes, page_table)


def decode_in_chain_mosaic(
    *arrays: Any, counters: Int[Array, " _"], alibi: str, scale: float, num_sms: int | None = None
) -> tuple[Float[Array, "R N H"], Int[Array, " _"]]:
    """`decode_mosaic` without vmap, for arrays in its order; and the counters for the next launch. num_sms:
    multiprocessors that it may have, None for all."""
    options = {"num_sms": compat.sms_of_a_kernel(num_sms), "interpretable": compat.interpreting()}
    return _launch(*arrays, counters, alibi=alibi, scale=scale, plan=None, **options)


# Compiled once a shape: what calls this in every layer would otherwise lower the kernel in every layer.
@functools.partial(jax.jit, static_argnames=("alibi", "scale", "plan", "num_sms", "interpretable"))
def _launch(
    q, keys, values, lengths, slopes, page_table, counters,
    *, alibi: str, scale: float, plan: Plan | None, num_sms: int, interpretable: bool,
) -> tuple[Array, Array | None]:  # fmt: skip
    num_rows, N, H = q.shape
    B, K = lengths.shape[0], keys.shape[2]
    capacity = keys.shape[1] if page_table is None else page_table.shape[1] * PAGE
    shape = Shape(B, K, N // K, H, capacity)
    plan = plan or default_plan(shape, num_sms)
    if not interpretable:
        shape.check(plan, num_sms)
    # Interpreted blocks cannot meet at a counter, but in clusters; and results go through memory there.
    exchange = None if interpretable else shape.exchange(plan)
    by_cluster = plan.splits > 1 and (plan.meeting == "cluster" or interpretable)
    heads, head_blocks = shape.heads(plan), shape.head_blocks(plan)
    has_slopes = slopes is not None and shape.G > 1

    tile = functools.partial(tiled, plan.warpgroups, plan.stages, plan.keys, H, dtype=q.dtype)
    scratch = {"k_smem": tile(), "v_smem": tile()}
    scratch |= buffers(shape, plan, q.dtype, interpretable, 1 if page_table is None else plan.keys // PAGE)
    if not shape.heads_fill_tiles:
        scratch["plain_smem"] = plain_queries(shape, plan, q.dtype)
    scratch["q_full"] = plgpu.Barrier(num_arrivals=2 if has_slopes else 1)
    if has_slopes:
        scratch["slope_smem"] = plgpu.SMEM((heads,), jnp.float32)
    grouped = jax.ShapeDtypeStruct((num_rows, K, shape.G, 1, H), q.dtype)
    outputs = {"out": grouped}
    if exchange is not None:
        scratch["exchange"] = exchange.buffers()
    elif plan.num_streams > 1:
        outputs |= grid.outputs(shape, plan)
        scratch["units_smem"] = [plgpu.SMEM((8, 1, rows), q.dtype) for _, rows in grid.units(H, plan.num_streams)]
        if by_cluster:
            scratch["met"] = plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=plan.warpgroups)
    kv = K * head_blocks
    if by_cluster:
        blocks = {"grid": (B, kv), "grid_names": ("row", "kv"), "cluster": (plan.splits,), "cluster_names": ("split",)}
    else:
        blocks = {"grid": (B, plan.splits, kv), "grid_names": ("row", "split", "kv")}

    if slopes is not None and K > 1 and shape.G > 1 and shape.G % 4:
        # Copies begin at multiples of 16 bytes.
        padding = head_blocks * heads - shape.G
        slopes = jnp.pad(slopes.reshape(K, shape.G), ((0, 0), (0, padding))).reshape(-1)
    inputs = {"q": q.reshape(grouped.shape), "k": keys, "v": values, "lengths": lengths}
    inputs |= {name: x for name, x in {"slopes": slopes, "table": page_table}.items() if x is not None}
    if plan.through_memory and not interpretable:
        inputs["counters"] = jax.new_ref(jnp.zeros(shape.pairs(plan), jnp.int32) if counters is None else counters)
    settings = Settings(shape, plan, exchange, alibi, scale, interpretable)
    # Pallas adds a barrier of the warpgroup wherever shared memory changes hands, some 5 a tile. Here warps meet where
    # they must: in over_keys, in commit_smem and at barriers in memory. Where results go through memory, Pallas' own
    # sums want theirs.
    parameters = plgpu.CompilerParams(
        approx_math=True,
        reduction_scratch_bytes=REDUCTION_BYTES if plan.through_memory else 0,
        unsafe_no_auto_barriers=not (interpretable or plan.through_memory),
    )

    def body(*arrays: Any, **smem: Any) -> None:
        Warpgroup(settings, dict(zip([*inputs, *outputs], arrays)), smem).run()

    made, *_ = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        compiler_params=parameters,
        **blocks,
    )(*inputs.values())
    if "counters" in inputs:
        counters = jax.freeze(inputs["counters"])
    return made.reshape(q.shape), counters


def buffers(shape: Shape, plan: Plan, dtype: Any, interpretable: bool, pages_per_tile: int = 1) -> dict[str, Any]:
    """Shared memory and barriers of a block for what it multiplies, tiles of K and V not counted."""
    W, heads, smem = plan.warpgroups, shape.heads(plan), functools.partial(tiled, dtype=dtype)
    made = {
        "q_smem": smem(heads, shape.H),
        "k_full": plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=W * plan.stages),
        "v_full": plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=W * plan.stages),
        "p_smem": smem(W, heads, plan.keys),
    }
    if W > 1:
        made["gathered"] = plgpu.Barrier(num_arrivals=W)
    if not interpretable:
        made["reduction_smem"] = plgpu.SMEM((W, 2, heads, 4), jnp.float32)
    return made


def plain_queries(shape: Shape, plan: Plan, dtype: Any) -> Any:
    """Shared memory for queries, and for results, that copies cannot put into the matrix instruction's order."""
    return plgpu.SMEM((shape.heads(plan), 1, shape.H), dtype)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a kernel is compiled for, beside its arrays. exchange: None where results go through memory, or nowhere."""

    shape: Shape
    plan: Plan
    exchange: cluster.Exchange | None
    alibi: str
    scale: float
    interpretable: bool


class Warpgroup:
    """One warpgroup of a block. `arrays` in device memory and `smem` by name, barriers among the latter."""

    def __init__(self, settings: Settings, arrays: dict[str, Any], smem: dict[str, Any]):
        self.settings, self.arrays, self.smem = settings, arrays, smem
        self.shape, self.plan = settings.shape, settings.plan
        self.heads, head_blocks = self.shape.heads(self.plan), self.shape.head_blocks(self.plan)
        self.dtype = smem["q_smem"].dtype
        self.exponent_scale = settings.scale * LOG2E
        self.row, self.pair, self.split = (lax.axis_index(name) for name in ("row", "kv", "split"))
        self.index = lax.axis_index("warpgroup")
        self.kv_head = lax.div(self.pair, jnp.int32(head_blocks))
        self.first_head = lax.rem(self.pair, jnp.int32(head_blocks)) * self.heads  # of the KV head's
        self.is_paged = "table" in arrays
        # Tiles are dealt out to all warpgroups of all blocks, one each and then from the first again.
        self.stream = self.index * self.plan.splits + self.split
        if "slopes" in arrays and "slope_smem" not in smem:  # one query head; asked for before any keys
            self.only_slope = arrays["slopes"][self.kv_head]

    def run(self) -> None:
        length = self.length()
        pl.when(self.index == 0)(self.copy_queries)
        num_mine = self.begin(length)
        self.take_queries()
        self.end(length, num_mine)

    def length(self) -> Any:
        """Of the row: its keys."""
        return jnp.minimum(self.arrays["lengths"][self.row], self.shape.capacity)

    def num_mine(self, length: Any) -> Any:
        """Tiles of this warpgroup."""
        return pl.cdiv(pl.cdiv(length, self.plan.keys) - self.stream, self.plan.num_streams)

    @property
    def has_first(self) -> Any:
        """Whether this warpgroup's first tile is copied whatever the row's length is: nobody waits for that then."""
        return not self.is_paged and self.stream * self.plan.keys < self.shape.capacity

    def begin(self, length: Any) -> Any:
        """Starts the first copies, and returns `num_mine`."""
        if not self.is_paged:  # the page of a tile is not known before the length is
            pl.when(self.has_first)(lambda: self.copy_tile(jnp.int32(0), None))
        self.open()
        num_mine = self.num_mine(length)
        for n in range(0 if self.is_paged else 1, self.plan.stages):
            pl.when(n < num_mine)(functools.partial(self.copy_tile, jnp.int32(n), length))
        return num_mine

    def open(self) -> None:
        """Before other blocks send this one anything."""
        if self.settings.exchange is not None:
            self.settings.exchange.open(self.smem["exchange"], self.index, self.split)

    def end(self, length: Any, num_mine: Any) -> None:
        """Attends, and brings the result to the end."""
        results = self.attend(length, num_mine)
        if not self.is_paged:

            @pl.when((num_mine <= 0) & self.has_first)
            def _wait_for_copies():  # which must not outlive the block
                plgpu.barrier_wait(self.smem["k_full"].at[self.barrier(0)])
                plgpu.barrier_wait(self.smem["v_full"].at[self.barrier(0)])

        if self.plan.num_streams == 1:
            self.store(*results)
        elif self.settings.exchange is not None:
            self.wait_for_all_open(self.settings.exchange)
            self.combine_in_cluster(self.settings.exchange, *results)
        else:
            grid.combine(self, pl.cdiv(length, self.plan.keys), results)

    def wait_for_all_open(self, exchange: cluster.Exchange) -> None:
        """Before this block sends others anything."""
        exchange.wait_for_all_open()

    # Copies

    def copy_queries(self) -> None:
        heads = pl.ds(self.first_head, self.heads)
        q = self.arrays["q"].at[self.row, self.kv_head, heads]
        if self.shape.heads_fill_tiles:
            q, target = q.at[:, 0], self.smem["q_smem"]
        else:
            target = self.smem["plain_smem"]
        plgpu.copy_gmem_to_smem(q, target, self.smem["q_full"])
        if "slope_smem" in self.smem:
            slopes = self.arrays["slopes"]
            start = self.kv_head * (slopes.shape[0] // self.shape.K) + self.first_head
            plgpu.copy_gmem_to_smem(slopes.at[pl.ds(start, self.heads)], self.smem["slope_smem"], self.smem["q_full"])

    def take_queries(self) -> None:
        """Waits for the queries, and moves them into the order that the matrix instruction reads."""
        plgpu.barrier_wait(self.smem["q_full"])
        if self.shape.heads_fill_tiles:
            return

        @pl.when(self.index == 0)
        def _move():
            self.smem["q_smem"][...] = plgpu.load(self.smem["plain_smem"].at[:, 0], layout=QUERIES, optimized=False)
            plgpu.commit_smem()

        self.gather()

    def gather(self) -> None:
        """Returns when all warpgroups of the block have come here."""
        if self.plan.warpgroups > 1:
            plgpu.barrier_arrive(self.smem["gathered"])
            plgpu.barrier_wait(self.smem["gathered"])

    def first_key(self, n: Any) -> Any:
        """Position of the first key of this warpgroup's n-th tile."""
        return (self.stream + n * self.plan.num_streams) * self.plan.keys

    def slot(self, n: Any) -> Any:
        return lax.rem(n, jnp.int32(self.plan.stages))

    def tile(self, name: str, slot: Any) -> Any:
        """Shared memory [keys, H] of this warpgroup for a tile of K or V."""
        return self.smem[f"{name}_smem"].at[self.index, slot]

    def barrier(self, slot: Any) -> Any:
        return self.index * self.plan.stages + slot

    def copy_tile(self, n: Any, length: Any) -> None:
        self.copy_part("k", n, length)
        self.copy_part("v", n, length)

    def copy_part(self, name: str, n: Any, length: Any) -> None:
        """Starts the copy of this warpgroup's n-th tile of K or V."""
        source, slot = self.arrays[name], self.slot(n)
        target = self.tile(name, slot)
        full = self.smem[f"{name}_full"].at[self.barrier(slot)]
        if not self.is_paged:
            tile = source.at[self.row, pl.ds(self.first_key(n), self.plan.keys), self.kv_head]
            plgpu.copy_gmem_to_smem(tile, target, full)
            return
        for part in range(self.plan.keys // PAGE):
            # A page past the row's last is not followed: the last one stands in, and is masked.
            index = jnp.minimum(lax.div(self.first_key(n), PAGE) + part, lax.div(length - 1, PAGE))
            page = self.arrays["table"][self.row, index]
            plgpu.copy_gmem_to_smem(source.at[page, :, self.kv_head], target.at[pl.ds(part * PAGE, PAGE)], full)

    # Attention

    def attend(self, length: Any, num_mine: Any) -> tuple[Any, Any, Any]:
        """Softmax over this warpgroup's tiles: sums of V, maxima of the exponents, totals of the weights."""
        H, heads, num_keys = self.shape.H, self.heads, self.plan.keys
        slope: Any = None
        if "slope_smem" in self.smem:
            slope = plgpu.load(self.smem["slope_smem"], layout=PER_HEAD)
        elif "slopes" in self.arrays:
            slope = filled((heads,), self.only_slope, PER_HEAD)
        p_smem = self.smem["p_smem"].at[self.index]

        def step(n, carry):
            sums, maxima, totals = carry
            slot = self.slot(n)
            k, v = self.tile("k", slot), self.tile("v", slot)
            plgpu.barrier_wait(self.smem["k_full"].at[self.barrier(slot)])
            self.complete("k", n, length)

            def scores(accumulator):
                plgpu.wgmma(accumulator, k, self.smem["q_smem"].transpose((1, 0)))
                return accumulator[...]

            s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((num_keys, heads), jnp.float32))
            x = self.exponents(s, self.first_key(n), length, slope)
            new_maxima = jnp.maximum(maxima, self.over_keys("max", x, lax.rem(n, jnp.int32(2))))
            # The maximum has brought all warps here: none still reads this tile of K, or the V of the tile before.
            pl.when(n + self.plan.stages < num_mine)(lambda: self.copy_part("k", n + self.plan.stages, length))
            refill_v = (n > 0) & (n - 1 + self.plan.stages < num_mine)
            pl.when(refill_v)(lambda: self.copy_part("v", n - 1 + self.plan.stages, length))

            p = jnp.exp2(x - _over_keys(new_maxima, x.shape))
            factor = jnp.exp2(maxima - new_maxima)
            totals *= _over_keys(factor, totals.shape)
            for first in range(0, num_keys, 64):
                totals += p[first : first + 64]
            p_smem.transpose((1, 0))[...] = p.astype(self.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(self.smem["v_full"].at[self.barrier(slot)])
            self.complete("v", n, length)

            def weigh(accumulator):
                plgpu.wgmma(accumulator, v.transpose((1, 0)), p_smem.transpose((1, 0)))
                return accumulator[...]

            sums *= _over_keys(factor, sums.shape)
            sums += pl.run_scoped(weigh, plgpu.WGMMAAccumulatorRef((H, heads), jnp.float32))
            return sums, new_maxima, totals

        # Totals stay apart by row of a tile until the end: adding those up costs more than adding tiles up.
        empty = filled((H, heads), 0.0, MATRIX), filled((heads,), MASKED, PER_HEAD), filled((64, heads), 0.0, MATRIX)
        sums, maxima, totals = lax.fori_loop(0, num_mine, step, empty)
        parity = lax.rem(jnp.maximum(num_mine, 0), jnp.int32(2))
        return sums, maxima, self.over_keys("add", totals, parity)

    def complete(self, name: str, n: Any, length: Any) -> None:
        """Called for each tile of K and V in shared memory: nothing is missing from what the cache holds."""

    def exponents(self, s: Any, first_key: Any, length: Any, slope: Any) -> Any:
        """Scores q . k of a tile to base-2 exponents, biased and masked."""
        x = s * self.exponent_scale
        if slope is not None:
            key = plgpu.broadcasted_iota(jnp.int32, (self.plan.keys,), 0, layout=PER_KEY) + first_key
            x += self.bias(key, length, slope, s.shape)
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=MATRIX) + first_key
        return jnp.where(key < length, x, MASKED)

    def bias(self, key: Any, length: Any, slope: Any, dims: tuple[int, int]) -> Any:
        """ALiBi of the keys at these positions, in units of the exponents."""
        if self.settings.alibi == "float32":
            distance = (key - (length - 1)).astype(jnp.float32)
            return _over_heads(distance, dims) * _over_keys(slope * self.exponent_scale, dims)
        positions = _over_heads(key.astype(jnp.float32), dims)
        return hf_bf16_bias(_over_keys(slope, dims), positions, self.settings.scale, self.dtype, rounded) * LOG2E

    def over_keys(self, operation: str, x: Any, parity: Any) -> Any:
        if self.settings.interpretable:
            return x.max(axis=0) if operation == "max" else x.sum(axis=0)
        return cluster.over_keys(operation, x, self.smem["reduction_smem"].at[self.index], parity)

    def store(self, sums: Any, _: Any, totals: Any) -> None:
        """Writes the result where nobody else has a part in it."""
        factor = jnp.where(totals > 0.0, 1.0 / totals, 0.0)
        sums = (sums * _over_keys(factor, sums.shape)).astype(self.dtype)
        out = self.arrays["out"].at[self.row, self.kv_head, pl.ds(self.first_head, self.heads)]
        # Over the queries, in either form.
        if self.shape.heads_fill_tiles:
            out, out_smem = out.at[:, 0], self.smem["q_smem"]
            out_smem.transpose((1, 0))[...] = sums
        else:
            out_smem = self.smem["plain_smem"]
            out_smem.at[:, 0].transpose((1, 0))[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out)
        wait_until_results_have_left()

    def combine_in_cluster(self, exchange: cluster.Exchange, sums: Any, maxima: Any, totals: Any) -> None:
        """Combines results through the shared memory of the blocks: within each, then among them."""
        smem = self.smem["exchange"]
        if self.plan.warpgroups == 1:
            exchange.send(smem, self.split, sums, maxima, totals)
        else:
            exchange.leave(smem, self.index, sums, maxima, totals)
            self.gather()
            exchange.send_merged(smem, self.index, self.split)
        if self.plan.splits > 1:
            exchange.wait_for_all_sent(smem)
        else:
            self.gather()
        first_row = (self.row * self.shape.K + self.kv_head) * self.shape.G + self.first_head
        num_heads = self.shape.G - self.first_head
        exchange.finish(smem, self.arrays["out"], self.index, self.split, first_row, num_heads)


def _over_keys(x: Any, dims: tuple[int, ...]) -> Any:
    """A value a head, repeated over the rows of a matrix."""
    return lax.broadcast_in_dim(x, dims, [1])


def _over_heads(x: Any, dims: tuple[int, ...]) -> Any:
    """A value a key, repeated over the columns of a matrix."""
    return lax.broadcast_in_dim(x, dims, [0])
