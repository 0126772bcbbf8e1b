"""The decode kernel for Hopper: Pallas, Mosaic GPU.

A step of decoding reads all of K and V once and computes next to nothing, so what counts is that every multiprocessor
keeps enough copies in flight from the first microsecond on. Each block is one warpgroup that takes every n-th tile of
keys of one row and KV head, with the next tiles on their way into shared memory, and keeps an online softmax for all
query heads of that KV head at once. Then the blocks of a row and KV head meet, and each combines a part of the result:
always in the order of the blocks, so the same inputs give the same bits.

Heads are the columns of both products: the matrix instruction works on 64 rows and any multiple of 8 columns, so 71
heads cost as much as 72.

    scores [keys, heads] = K tile [keys, H] @ q^T [H, heads]
    sums   [H, heads]   += V tile^T [H, keys] @ weights [keys, heads]

How many blocks share a row depends on its length, not on the cache's capacity: those without a tile leave at once.
What a dead slot of the cache holds is multiplied by a weight of zero, so it may be anything but infinity or NaN.

Letters as everywhere (B S N K G H); base-2 exponentials throughout, scores scaled by log2(e).
Source: Dao et al., Flash-Decoding for long-context inference (2023), for the split; Press et al., Train Short, Test
Long (2022), for ALiBi.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.decode_attention.plan import MAX_HEADS, PAGE, Plan, Shape, default_plan
from pallas_kernels.flash_attention.reference import MASKED, hf_bf16_bias
from pallas_kernels.hopper import LOG2E, rounded, tiled

# Registers of the matrix instruction's results; of one value a head (a column of it), and of one a key (a row of it).
MATRIX = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
PER_HEAD = MATRIX.reduce(0)
PER_KEY = MATRIX.reduce(1)
# 8 heads of 64 elements, four to a thread: what a copy within shared memory goes by.
QUERIES = plgpu.Layout.TILED(plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
# Results of several blocks [blocks, 8 heads, some of H]: a warp takes every fourth, a thread two numbers of a head.
PARTIALS = plgpu.Layout.TILED(plgpu.Tiling(((4, 8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


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
    q: Float[Array, "B N H"],
    keys: Float[Array, "_ _ K H"],
    values: Float[Array, "_ _ K H"],
    lengths: Int[Array, " B"],
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    page_table: Int[Array, "B max_pages"] | None,
    *,
    plan: Plan | None = None,
) -> Float[Array, "B N H"]:
    """`decode_attention` by the kernel; its arguments, all given. `plan` None takes the tuned one.

    Under vmap the mapped calls become rows of one launch; slopes may not be mapped over.
    """
    options = {"alibi": alibi, "scale": scale, "plan": plan}
    options |= {"num_sms": compat.num_sms(), "interpretable": compat.interpreting()}
    launch = jax.custom_batching.custom_vmap(functools.partial(_launch, **options))

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
        q, lengths = rows(q, q_mapped), rows(lengths, lengths_mapped)
        out = decode_mosaic(q, keys, values, lengths, slopes, alibi, scale, page_table, plan=plan)
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return launch(q, keys, values, lengths, slopes, page_table)


# Compiled once a shape: what calls this in every layer would otherwise lower the kernel in every layer.
@functools.partial(jax.jit, static_argnames=("alibi", "scale", "plan", "num_sms", "interpretable"))
def _launch(
    q, keys, values, lengths, slopes, page_table,
    *, alibi: str, scale: float, plan: Plan | None, num_sms: int, interpretable: bool,
) -> Array:  # fmt: skip
    B, N, H = q.shape
    K = keys.shape[2]
    capacity = keys.shape[1] if page_table is None else page_table.shape[1] * PAGE
    shape = Shape(B, K, N // K, H, capacity)
    plan = plan or default_plan(shape, num_sms)
    if not interpretable:
        shape.check(plan, num_sms)
    # The interpreter has no semaphores, but clusters.
    by_cluster = plan.meeting == "cluster" or interpretable

    smem = functools.partial(tiled, dtype=q.dtype)
    pages_per_tile = 1 if page_table is None else plan.keys // PAGE
    scratch = {
        "k_smem": smem(plan.stages, plan.keys, H),
        "v_smem": smem(plan.stages, plan.keys, H),
        "q_smem": smem(shape.heads, H),
        "q_full": plgpu.Barrier(num_arrivals=2 if slopes is not None and shape.G > 1 else 1),
        "k_full": plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=plan.stages),
        "v_full": plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=plan.stages),
    }
    # Never needed at the same time: queries as they come in and results as they go out, and the weights of a tile.
    passing = [plgpu.SMEM((shape.heads, 1, H), q.dtype), smem(shape.heads, plan.keys)]
    if slopes is not None and shape.G > 1:
        scratch["slope_smem"] = plgpu.SMEM((shape.heads,), jnp.float32)
    grouped = jax.ShapeDtypeStruct((B, K, shape.G, 1, H), q.dtype)
    out_type = [grouped]
    units = _units(shape, plan)
    if plan.splits > 1:
        largest_chunk, _ = units[-1]
        partials = (B, K * shape.head_blocks, -(-plan.splits // largest_chunk) * largest_chunk, shape.heads)
        out_type += [jax.ShapeDtypeStruct((*partials, *rest), jnp.float32) for rest in ((H,), (), ())]
        passing += [plgpu.SMEM((8, 1, rows), q.dtype) for _, rows in units]
        if by_cluster:
            scratch["met"] = plgpu.ClusterBarrier(collective_axes=("split",))
    scratch["passing_smem"] = plgpu.RefUnion(*passing)
    kv = K * shape.head_blocks
    if by_cluster:
        grid = {"grid": (B, kv), "grid_names": ("row", "kv"), "cluster": (plan.splits,), "cluster_names": ("split",)}
    else:
        grid = {"grid": (B, plan.splits, kv), "grid_names": ("row", "split", "kv")}

    if slopes is not None and K > 1 and shape.G > 1 and shape.G % 4:
        # Copies begin at multiples of 16 bytes.
        padding = shape.head_blocks * shape.heads - shape.G
        slopes = jnp.pad(slopes.reshape(K, shape.G), ((0, 0), (0, padding))).reshape(-1)
    optional = {"slope_ref": slopes, "table_ref": page_table}
    names = [name for name, value in optional.items() if value is not None]
    kernel = functools.partial(
        _kernel, shape=shape, plan=plan, units=units, alibi=alibi, scale=scale, interpretable=interpretable
    )

    def body(q_ref, k_ref, v_ref, length_ref, *rest, **smem_refs):
        given = dict(zip(names, rest))
        kernel(q_ref, k_ref, v_ref, length_ref, *rest[len(names) :], **given, **smem_refs)

    out, *_ = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        # A KiB for each 8 heads lets the maximum over a tile's keys cross the warps in one go.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=max(2048, 128 * shape.heads)),
        **grid,
    )(q.reshape(grouped.shape), keys, values, lengths, *(optional[name] for name in names))
    return out.reshape(q.shape)


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, length_ref: Any,
    out_ref: Any, sums_ref: Any = None, maxima_ref: Any = None, totals_ref: Any = None,
    *, slope_ref: Any = None, table_ref: Any = None,
    k_smem: Any, v_smem: Any, q_smem: Any, passing_smem: Any, slope_smem: Any = None,
    q_full: Any, k_full: Any, v_full: Any, met: Any = None,
    shape: Shape, plan: Plan, units: Sequence[tuple[int, int]], alibi: str, scale: float, interpretable: bool,
):  # fmt: skip
    plain_smem, p_smem, *units_smem = passing_smem
    H, heads, num_keys = shape.H, shape.heads, plan.keys
    dtype = q_smem.dtype
    exponent_scale = scale * LOG2E
    row, pair, split = lax.axis_index("row"), lax.axis_index("kv"), lax.axis_index("split")
    kv_head = lax.div(pair, jnp.int32(shape.head_blocks))
    first_head = lax.rem(pair, jnp.int32(shape.head_blocks)) * heads  # of the KV head's

    length = jnp.minimum(length_ref[row], shape.capacity)
    num_tiles = pl.cdiv(length, num_keys)
    num_active = jnp.clip(num_tiles, 1, plan.splits)  # blocks that share this row: those with a tile, or the first
    num_mine = pl.cdiv(num_tiles - split, num_active)

    def first_key(i):
        """Position of the first key of this block's i-th tile."""
        return (split + i * num_active) * num_keys

    def slot(i):
        return lax.rem(i, jnp.int32(plan.stages))

    def copy_tile(ref, smem, full, i):
        target, barrier = smem.at[slot(i)], full.at[slot(i)]
        if table_ref is None:
            plgpu.copy_gmem_to_smem(ref.at[row, pl.ds(first_key(i), num_keys), kv_head], target, barrier)
            return
        for part in range(num_keys // PAGE):
            # A page past the row's last is not followed: the last one stands in, and is masked.
            index = jnp.minimum(lax.div(first_key(i), PAGE) + part, lax.div(length - 1, PAGE))
            page = table_ref[row, index]
            plgpu.copy_gmem_to_smem(ref.at[page, :, kv_head], target.at[pl.ds(part * PAGE, PAGE)], barrier)

    def attend():
        """Softmax over this block's tiles: sums of V, maxima of the exponents, totals of the weights."""
        plgpu.copy_gmem_to_smem(q_ref.at[row, kv_head, pl.ds(first_head, heads)], plain_smem, q_full)
        if slope_smem is not None:
            start = kv_head * (slope_ref.shape[0] // shape.K) + first_head
            plgpu.copy_gmem_to_smem(slope_ref.at[pl.ds(start, heads)], slope_smem, q_full)
        for i in range(plan.stages):
            pl.when(i < num_mine)(functools.partial(copy_tile, k_ref, k_smem, k_full, jnp.int32(i)))
            pl.when(i < num_mine)(functools.partial(copy_tile, v_ref, v_smem, v_full, jnp.int32(i)))

        # Copied plainly and moved into the order that the matrix instruction reads, because copies into that order
        # come 8 rows at a time, and 71 heads do not.
        plgpu.barrier_wait(q_full)
        q_smem[...] = plgpu.load(plain_smem.at[:, 0], layout=QUERIES, optimized=False)
        plgpu.commit_smem()
        slope: Any = None
        if slope_smem is not None:
            slope = plgpu.load(slope_smem, layout=PER_HEAD)
        elif slope_ref is not None:
            slope = _filled((heads,), slope_ref[kv_head], PER_HEAD)

        def bias(dims, j):
            """ALiBi of the keys at positions j, in units of the exponents."""
            if alibi == "float32":
                distance = (j - (length - 1)).astype(jnp.float32)
                return _over_heads(distance, dims) * _over_keys(slope * exponent_scale, dims)
            positions = _over_heads(j.astype(jnp.float32), dims)
            return hf_bf16_bias(_over_keys(slope, dims), positions, scale, dtype, rounded) * LOG2E

        def exponents(s, i):
            """Scores q . k of a tile to base-2 exponents, biased and masked."""
            x = s * exponent_scale
            if slope is not None:
                x += bias(s.shape, plgpu.broadcasted_iota(jnp.int32, (num_keys,), 0, layout=PER_KEY) + first_key(i))
            j = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=MATRIX) + first_key(i)
            return jnp.where(j < length, x, MASKED)

        def step(i, carry):
            sums, maxima, totals = carry
            plgpu.barrier_wait(k_full.at[slot(i)])

            def scores(accumulator):
                plgpu.wgmma(accumulator, k_smem.at[slot(i)], q_smem.transpose((1, 0)))
                return accumulator[...]

            x = exponents(pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((num_keys, heads), jnp.float32)), i)
            new_maxima = plgpu.layout_cast(jnp.maximum(maxima, x.max(axis=0)), PER_HEAD)
            # The maximum has brought all warps here: none still reads this tile of K, or the V of the tile before.
            pl.when(i + plan.stages < num_mine)(lambda: copy_tile(k_ref, k_smem, k_full, i + plan.stages))
            refill_v = (i > 0) & (i - 1 + plan.stages < num_mine)
            pl.when(refill_v)(lambda: copy_tile(v_ref, v_smem, v_full, i - 1 + plan.stages))

            p = jnp.exp2(x - _over_keys(new_maxima, x.shape))
            factor = jnp.exp2(maxima - new_maxima)
            totals *= _over_keys(factor, totals.shape)
            for first in range(0, num_keys, 64):
                totals += p[first : first + 64]
            p_smem.transpose((1, 0))[...] = p.astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(v_full.at[slot(i)])

            def weigh(accumulator):
                plgpu.wgmma(accumulator, v_smem.at[slot(i)].transpose((1, 0)), p_smem.transpose((1, 0)))
                return accumulator[...]

            sums *= _over_keys(factor, sums.shape)
            sums += pl.run_scoped(weigh, plgpu.WGMMAAccumulatorRef((H, heads), jnp.float32))
            return sums, new_maxima, totals

        # Totals stay apart by row of a tile until the end: adding those up costs more than adding tiles up.
        empty = _filled((H, heads), 0.0, MATRIX), _filled((heads,), MASKED, PER_HEAD), _filled((64, heads), 0.0, MATRIX)
        sums, maxima, totals = lax.fori_loop(0, num_mine, step, empty)
        return sums, maxima, totals.sum(axis=0)

    def store(sums, totals):
        factor = jnp.where(totals > 0.0, 1.0 / totals, 0.0)
        sums = plgpu.layout_cast((sums * _over_keys(factor, sums.shape)).astype(dtype), TRANSPOSED)
        plain_smem.at[:, 0].transpose((1, 0))[...] = sums
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(plain_smem, out_ref.at[row, kv_head, pl.ds(first_head, heads)])
        plgpu.wait_smem_to_gmem(0)

    def publish(sums, maxima, totals):
        """Leaves this block's results where the others find them."""
        sums_ref.at[row, pair, split].transpose((1, 0))[...] = plgpu.layout_cast(sums, TRANSPOSED)
        _store(maxima_ref.at[row, pair, split], maxima)
        _store(totals_ref.at[row, pair, split], totals)
        if not interpretable:
            _fence()

    def meet():
        """Returns when all blocks of this row and KV head have published."""
        if met is not None:
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
        else:
            semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((shape.pairs,)))
            semaphore = semaphores.at[row * (shape.K * shape.head_blocks) + pair]

            @pl.when((num_active > 1) & (split < num_active))
            def _meet():
                plgpu.semaphore_signal(semaphore, memory_scope="gpu")
                plgpu.semaphore_wait(semaphore, num_active, decrement=False, memory_scope="gpu")

    def combine(chunk: int, rows: int, unit_smem):
        """This block's share of the result: units of 8 heads by `rows` of H, from `chunk` blocks' results at a time."""
        head_units = heads // 8

        def combine_unit(i, carry):
            u = split + i * num_active
            head = lax.rem(u, jnp.int32(head_units)) * 8
            these_heads = pl.ds(head, 8)
            these_rows = pl.ds(lax.div(u, jnp.int32(head_units)) * rows, rows)

            def add(c, carry):
                sums, maxima, totals = carry
                at = (row, pair, pl.ds(c * chunk, chunk), these_heads)

                def load(ref, layout, dead: float):
                    """What blocks have published, `dead` for those that are none."""
                    x = plgpu.load(ref, layout=layout, optimized=False)
                    block = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout) + c * chunk
                    return jnp.where(block < num_active, x, dead)

                their_maxima = load(maxima_ref.at[at], PARTIALS.reduce(2), MASKED)
                their_totals = load(totals_ref.at[at], PARTIALS.reduce(2), 0.0)
                their_sums = load(sums_ref.at[*at, these_rows], PARTIALS, 0.0)
                new_maxima = jnp.maximum(maxima, their_maxima.max(axis=0))
                weights = jnp.exp2(their_maxima - lax.broadcast_in_dim(new_maxima, their_maxima.shape, [1]))
                factor = jnp.exp2(maxima - new_maxima)
                totals = totals * factor + (their_totals * weights).sum(axis=0)
                weighted = their_sums * lax.broadcast_in_dim(weights, their_sums.shape, [0, 1])
                sums = sums * lax.broadcast_in_dim(factor, sums.shape, [0]) + weighted.sum(axis=0)
                return sums, new_maxima, totals

            of_a_head = PARTIALS.reduce(2).reduce(0)
            empty = (
                _filled((8, rows), 0.0, PARTIALS.reduce(0)),
                _filled((8,), MASKED, of_a_head),
                _filled((8,), 0.0, of_a_head),
            )
            sums, _, totals = lax.fori_loop(0, pl.cdiv(num_active, chunk), add, empty)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            unit_smem.at[:, 0][...] = (sums * lax.broadcast_in_dim(1.0 / totals, sums.shape, [0])).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(unit_smem, out_ref.at[row, kv_head, pl.ds(first_head + head, 8), :, these_rows])
            return carry

        num_units = head_units * (H // rows)
        lax.fori_loop(0, pl.cdiv(num_units - split, num_active), combine_unit, None)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(split < num_active)
    def _attend():
        sums, maxima, totals = attend()
        if plan.splits == 1:
            store(sums, totals)
        else:
            pl.when(num_active == 1)(lambda: store(sums, totals))
            pl.when(num_active > 1)(lambda: publish(sums, maxima, totals))

    if plan.splits > 1:
        meet()
        fewer = 1
        for (chunk, rows), unit_smem in zip(units, units_smem):
            fits = (num_active > fewer) & ((num_active <= chunk) | (chunk == units[-1][0]))
            pl.when(fits & (split < num_active))(functools.partial(combine, chunk, rows, unit_smem))
            fewer = chunk


def _units(shape: Shape, plan: Plan) -> list[tuple[int, int]]:
    """In what pieces results are combined: of how many blocks at once, and how many rows of H.

    Each is as much as the registers take, so that its loads are in flight together. A row shorter than the cache has
    fewer blocks than the plan, and takes another size.
    """
    chunks = [chunk for chunk in (8, 16, 32, 64, 128) if chunk < 2 * plan.splits or chunk == 8]
    return [(chunk, min(shape.H, 1024 // chunk)) for chunk in chunks]


def _filled(dims: tuple[int, ...], value: Any, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(dims, value, jnp.float32), layout)


def _over_keys(x: Any, dims: tuple[int, ...]) -> Any:
    """A value a head, repeated over the rows of a matrix."""
    return lax.broadcast_in_dim(x, dims, [1])


def _over_heads(x: Any, dims: tuple[int, ...]) -> Any:
    """A value a key, repeated over the columns of a matrix."""
    return lax.broadcast_in_dim(x, dims, [0])


def _store(ref: Any, x: Any) -> None:
    """ref[...] = x where x does not fill whole lines of memory, which newer versions of JAX want said."""
    if (store := getattr(plgpu, "store", None)) is not None:
        store(ref, x, optimized=False)
    else:
        ref[...] = x


def _fence() -> None:
    """Makes what was written before it visible to the whole GPU before anything that comes after it."""

    @plgpu.inline_mgpu()
    def emit(_: Any = None):
        mgpu.utils.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)

    emit()
