"""The forward kernel for Hopper: Pallas, Mosaic GPU.

One warpgroup copies K and V tiles into shared memory; two or three others each own 64 queries and keep two products
in flight: the scores of the next tile, and the weighted sum of V for the present one. The softmax of one warpgroup runs
while the tensor cores work for the others, which take turns at issuing. As many blocks as the GPU has multiprocessors
stay resident and take tile after tile, the longest first, heads that share K and V side by side.

ALiBi costs next to nothing. A row's softmax does not change when the row is shifted, so the bias of query i and key j
can be slope * (j - i0), with i0 the tile's first query: a value a column. The accumulator of q . k, which has to be set
to something before the product, starts from that instead of zero.

Letters as everywhere (B T S N K G H); base-2 exponentials throughout, scores scaled by log2(e).
Source: Shah et al., FlashAttention-3 (2024), for the overlap of products and softmax within a warpgroup; Press et al.,
Train Short, Test Long (2022), for ALiBi.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.starts import scores_start

LOG2E = math.log2(math.e)
# Where maxima start: below any score, and so far above what is masked (starts.MASKED) that a tile wholly masked has
# weights of exactly zero.
LOWEST_MAXIMUM = -1e20
ROWS = 64  # queries of a warpgroup: the M of Hopper's matrix instruction


class Tile(NamedTuple):
    """A tile of queries of one row and head: int32 scalars."""

    batch: Any
    head: Any
    kv_head: Any
    index: Any


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one block's work.

    warpgroups: that compute, each on 64 queries.
    keys: of a K or V tile.
    stages: tiles of K, and as many of V, that shared memory holds.
    take_turns: warpgroups issue their products one after the other, so that one's softmax meets another's products.
    """

    warpgroups: int
    keys: int
    stages: int
    take_turns: bool = True


def default_blocks(head_dim: int) -> Blocks:
    """What measured fastest on an H100 (benchmarks/LOG.md)."""
    return Blocks(2, 128, 2, take_turns=False) if head_dim == 128 else Blocks(3, 128, 3)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_offset: Int[Array, " B"] | None,
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    *,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N Tp"]]:
    """Causal attention, and the logarithm of each row's sum of exponentials.

    Args:
      q, k, v: bfloat16 or float16; H is 64 or 128; K divides N.
      query_offset, lengths, slopes, alibi, scale: as in `attention`.
      blocks: None for the tuned ones.

    Returns:
      The output, zero for queries that see no key, and the natural-log sum in float32 [B, N, Tp], Tp = T rounded up
      to 128, -inf for queries that see no key; entries past T mean nothing.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    blocks = blocks or default_blocks(H)
    if compat.interpreting():
        blocks = dataclasses.replace(blocks, keys=64, stages=2)
    W = blocks.warpgroups
    work = tiles.Tiles(
        batch=B,
        kv_heads=K,
        group=N // K,
        num_tiles=pl.cdiv(T, ROWS * W),
        bytes_per_kv_head=2 * S * H * q.dtype.itemsize,
        key_tiles_before=(S - T) / blocks.keys,
        key_tiles_each=ROWS * W / blocks.keys,
    )
    num_blocks = min(compat.num_sms(), B * N * work.num_tiles)
    table, counts = work.schedule(num_blocks)
    kernel = functools.partial(
        _kernel, blocks=blocks, num_queries=T, num_keys=S, alibi=alibi, scale=scale, interpretable=compat.interpreting()
    )
    # Copies of tiles want the sequence axis in multiples of 8.
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q, k, v))
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def smem(*shape: int) -> Any:
        return plgpu.SMEM(shape, q.dtype, transforms=tiled)

    scratch = {
        "q_smem": smem(W, ROWS, H),
        "k_smem": smem(blocks.stages, blocks.keys, H),
        "v_smem": smem(blocks.stages, blocks.keys, H),
        "out_smem": smem(W, ROWS, H),
        "p_smem": smem(W, ROWS, blocks.keys) if compat.interpreting() else None,
        "lse_smem": plgpu.SMEM((W, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=W),
        "q_free": plgpu.Barrier(num_barriers=W),
        "k_full": plgpu.Barrier(num_barriers=blocks.stages),
        "v_full": plgpu.Barrier(num_barriers=blocks.stages),
        "k_free": plgpu.Barrier(num_arrivals=W, num_barriers=blocks.stages),
        "v_free": plgpu.Barrier(num_arrivals=W, num_barriers=blocks.stages),
        "turn": plgpu.Barrier(num_barriers=W),
    }
    scalars = {"offset_ref": query_offset, "length_ref": lengths, "slope_ref": slopes}
    names = [name for name, value in scalars.items() if value is not None]

    def body(q_ref, k_ref, v_ref, table_ref, count_ref, *rest, **smem_refs):
        given = dict(zip(names, rest))
        out_ref, lse_ref = rest[len(names) :]
        given = {name: given.get(name) for name in scalars}
        kernel(q_ref, k_ref, v_ref, table_ref, count_ref, out_ref, lse_ref, **given, **smem_refs)

    out, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, tiles.padded_length(T)), jnp.float32),
        ),
        scratch_types={name: value for name, value in scratch.items() if value is not None},
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not compat.interpreting()),
    )(q, k, v, table, counts, *(scalars[name] for name in names))
    return out[:, :T], lse


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    table_ref,
    count_ref,
    out_ref,
    lse_ref,
    offset_ref,
    length_ref,
    slope_ref,
    *,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    lse_smem,
    q_full,
    q_free,
    k_full,
    v_full,
    k_free,
    v_free,
    turn,
    p_smem=None,
    blocks: Blocks,
    num_queries: int,
    num_keys: int,
    alibi: str,
    scale: float,
    interpretable: bool,
):
    W, keys, stages = blocks.warpgroups, blocks.keys, blocks.stages
    H = q_smem.shape[-1]
    block = lax.axis_index("block")
    warpgroup = lax.axis_index("warpgroup")
    num_rounds = count_ref[block]
    exponent_scale = scale * LOG2E
    take_turns = blocks.take_turns and W > 1

    def tile_of(round_index) -> Tile:
        return Tile(*(table_ref[block, round_index, i] for i in range(4)))

    def extent(tile: Tile):
        """Offset of the row, its keys that count, and how many K tiles this tile of queries reads (at least one)."""
        offset = 0 if offset_ref is None else offset_ref[tile.batch]
        length = num_keys if length_ref is None else jnp.minimum(length_ref[tile.batch], num_keys)
        last = jnp.minimum((tile.index + 1) * (W * ROWS), num_queries) + offset
        return offset, length, jnp.maximum(pl.cdiv(jnp.minimum(last, length), keys), 1)

    def next_slot(slot):
        return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)

    @pl.when(warpgroup == W)
    def _copy():
        plgpu.set_max_registers(32 if W == 3 else 40, action="decrease")

        def copy_tile(round_index, carry):
            slot, count = carry
            tile = tile_of(round_index)
            _, _, num_steps = extent(tile)
            for w in range(W):
                pl.when(round_index > 0)(lambda w=w: plgpu.barrier_wait(q_free.at[w]))
                rows = pl.ds(tile.index * (W * ROWS) + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[tile.batch, rows, tile.head], q_smem.at[w], q_full.at[w])

            def copy_step(step, carry):
                slot, count = carry
                at = (tile.batch, pl.ds(step * keys, keys), tile.kv_head)
                pl.when(count >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[slot], k_full.at[slot])
                pl.when(count >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[slot], v_full.at[slot])
                return next_slot(slot), count + 1

            return lax.fori_loop(0, num_steps, copy_step, (slot, count))

        slot, count = lax.fori_loop(0, num_rounds, copy_tile, (jnp.int32(0), jnp.int32(0)))

        # Every phase of a barrier has to be seen before its memory goes.
        def see_out(_, slot):
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])
            return next_slot(slot)

        first_unseen = lax.select(count >= stages, slot, jnp.int32(0))
        lax.fori_loop(0, jnp.minimum(count, stages), see_out, first_unseen)
        for w in range(W):
            plgpu.barrier_wait(q_free.at[w])

    @pl.when(warpgroup < W)
    def _compute():
        plgpu.set_max_registers(160 if W == 3 else 232, action="increase")
        q_mine = q_smem.at[warpgroup]
        my_turn = turn.at[warpgroup]
        next_turn = turn.at[lax.rem(warpgroup + 1, jnp.int32(W))]
        if take_turns:
            pl.when(warpgroup == W - 1)(lambda: plgpu.barrier_arrive(next_turn))

        def multiply(init, a, b, when_issued=lambda: None):
            """init + a @ b, awaited. Interpretation takes neither set accumulators nor operands in registers."""
            if not interpretable:

                def issue(accumulator):
                    plgpu.wgmma(accumulator, a, b)
                    when_issued()

                return pl.run_state(issue)(plgpu.ACC.init(init))
            if isinstance(a, jax.Array):
                p_smem.at[warpgroup][...] = a
                plgpu.commit_smem()
                a = p_smem.at[warpgroup]

            def product(accumulator):
                plgpu.wgmma(accumulator, a, b)
                when_issued()
                return accumulator[...]

            return init + pl.run_scoped(product, plgpu.ACC(init.shape, jnp.float32))

        def softmax(s, m):
            """Weights of a tile of scores `s`, the new maxima `m`, and the factor on what came before."""
            new_m = jnp.maximum(m, s.max(axis=1) * exponent_scale)
            alpha = jnp.exp2(m - new_m)
            return jnp.exp2(s * exponent_scale - lax.broadcast_in_dim(new_m, s.shape, [0])), new_m, alpha

        def attend(round_index, slot):
            tile = tile_of(round_index)
            offset, length, num_steps = extent(tile)
            first_query = tile.index * (W * ROWS) + warpgroup * ROWS
            first_row = first_query + offset
            num_full = jnp.minimum(lax.div(jnp.minimum(first_row + 1, length), keys), num_steps)
            slope = None if slope_ref is None else slope_ref[tile.head]

            def start(step, masked: bool):
                """What the accumulator of a tile of scores starts from."""
                num_visible = None
                if masked:
                    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1)) + first_row
                    num_visible = jnp.minimum(row + 1, length) - step * keys
                return scores_start(
                    ROWS,
                    keys,
                    alibi=None if slope is None else alibi,
                    slope=slope,
                    first_row=first_row,
                    first_key=step * keys,
                    num_visible=num_visible,
                    scale=scale,
                    dtype=q_smem.dtype,
                    interpretable=interpretable,
                )

            def wait_turn():
                if take_turns:
                    plgpu.barrier_wait(my_turn)

            def pass_turn():
                if take_turns:
                    plgpu.barrier_arrive(next_turn)

            def first_step():
                init = start(jnp.int32(0), masked=True)
                plgpu.barrier_wait(q_full.at[warpgroup])
                plgpu.barrier_wait(k_full.at[slot])
                wait_turn()
                m = plgpu.layout_cast(jnp.full((ROWS,), LOWEST_MAXIMUM, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

                s = multiply(init, q_mine, k_smem.at[slot].transpose((1, 0)), pass_turn)
                plgpu.barrier_arrive(k_free.at[slot])
                p, m, _ = softmax(s, m)
                return m, p.sum(axis=1), p.astype(q_smem.dtype)

            def step_pair(step, carry, *, masked: bool):
                """Scores of tile `step`, while V of the tile before it is added up."""
                o, m, l, p, slot = carry
                new_slot = next_slot(slot)
                init = start(step, masked)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(k_full.at[new_slot])
                wait_turn()

                def products(refs):
                    s_ref, o_ref, p_ref, m_ref, l_ref, alpha_ref = refs
                    plgpu.wgmma(s_ref, q_mine, k_smem.at[new_slot].transpose((1, 0)))
                    plgpu.wgmma(o_ref, p_ref[...], v_smem.at[slot])
                    pass_turn()
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    plgpu.barrier_arrive(k_free.at[new_slot])
                    new_p, new_m, alpha = softmax(s, m_ref[...])
                    new_l = l_ref[...] * alpha + new_p.sum(axis=1)
                    # The product with V still reads the old weights: the new ones stay in float32, in the registers of
                    # the scores, until it has ended. The barriers keep the compiler from moving the cast ahead.
                    new_p, new_m, new_l, alpha = lax.optimization_barrier((new_p, new_m, new_l, alpha))
                    plgpu.wgmma_wait(0)
                    (new_p,) = lax.optimization_barrier((new_p,))
                    p_ref[...] = new_p.astype(q_smem.dtype)
                    m_ref[...], l_ref[...], alpha_ref[...] = new_m, new_l, alpha

                if interpretable:
                    s = multiply(init, q_mine, k_smem.at[new_slot].transpose((1, 0)), pass_turn)
                    plgpu.barrier_arrive(k_free.at[new_slot])
                    o = multiply(o, p, v_smem.at[slot])
                    p, m, alpha = softmax(s, m)
                    p, l = p.astype(q_smem.dtype), l * alpha + p.sum(axis=1)
                else:
                    state = (plgpu.ACC.init(init), plgpu.ACC.init(o), p, m, l, m)
                    _, o, p, m, l, alpha = pl.run_state(products)(state)
                plgpu.barrier_arrive(v_free.at[slot])
                return o * lax.broadcast_in_dim(alpha, o.shape, [0]), m, l, p, new_slot

            m, l, p = first_step()
            o = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
            carry = (o, m, l, p, slot)
            unmasked, masked = (functools.partial(step_pair, masked=flag) for flag in (False, True))
            carry = lax.fori_loop(1, num_full, unmasked, carry)
            carry = lax.fori_loop(jnp.maximum(num_full, 1), num_steps, masked, carry)
            o, m, l, p, slot = carry
            plgpu.barrier_arrive(q_free.at[warpgroup])

            plgpu.barrier_wait(v_full.at[slot])
            o = multiply(o, p, v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            store(tile, o, m, l, first_query, slope)
            return next_slot(slot)

        def store(tile, o, m, l, first_query, slope):
            seen = l > 0  # at least 1 where any key was seen: the largest weight
            factor = jnp.where(seen, 1.0 / l, 0.0)
            o = (o * lax.broadcast_in_dim(factor, o.shape, [0])).astype(q_smem.dtype)
            lse = (m + jnp.log2(l)) * (1 / LOG2E)
            if slope is not None and alibi == "float32":
                row = plgpu.broadcasted_iota(jnp.float32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
                lse -= row * (slope * scale)
            lse = jnp.where(seen, lse, -jnp.inf)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem.at[warpgroup][...] = o
            lse_smem.at[warpgroup][...] = lse
            plgpu.commit_smem()
            rows = pl.ds(first_query, ROWS)
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_ref.at[tile.batch, rows, tile.head])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[tile.batch, tile.head, rows])

        lax.fori_loop(0, num_rounds, attend, jnp.int32(0))
        if take_turns:
            # One arrival is left over from the start: take it, so that no barrier ends in the middle of a phase.
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(my_turn))
        plgpu.wait_smem_to_gmem(0)
