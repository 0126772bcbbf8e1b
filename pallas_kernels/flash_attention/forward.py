"""The forward kernel for Hopper: Pallas, Mosaic GPU.

One warpgroup copies K and V tiles into shared memory; two or three others each own 64 queries and keep two products
in flight: the scores of the next tile, and the weighted sum of V for the present one. The softmax of one warpgroup runs
while the tensor cores work for the others, which take turns at issuing. As many blocks as the GPU has multiprocessors
stay resident and take tile after tile, the longest first, heads that share K and V side by side.

ALiBi costs next to nothing. A row's softmax does not change when the row is shifted, so the bias of query i and key j
can be slope * (j - i0), with i0 the tile's first query: a value a column. The accumulator of q . k, which has to be set
to something before the product, starts from that instead of zero.

Documents that lie back to back in a row cost a mask where one begins within a tile of keys, and nothing elsewhere:
tiles of keys before the first document of a tile of queries are skipped.

Letters as everywhere (B T S N K G H); base-2 exponentials throughout, scores scaled by log2(e).
Source: Shah et al., FlashAttention-3 (2024), for the overlap of products and softmax within a warpgroup; Press et al.,
Train Short, Test Long (2022), for ALiBi.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, hopper
from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.starts import scores_start

# Where maxima start: below any score, and so far above what is masked (reference.MASKED) that a tile wholly masked has
# weights of exactly zero.
LOWEST_MAXIMUM = -1e20
ROWS = 64  # queries of a warpgroup: the M of Hopper's matrix instruction
PER_ROW = plgpu.Layout.WGMMA.reduce(1)


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


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is fixed when the kernel is compiled. num_queries, num_keys: T and S before they are padded."""

    blocks: Blocks
    num_keys: int
    num_queries: int
    alibi: str | None
    scale: float
    interpretable: bool


def default_blocks(head_dim: int, alibi: str | None) -> Blocks:
    """What measured fastest on an H100 (benchmarks/LOG.md)."""
    if head_dim == 128:
        return Blocks(2, 128, 2, take_turns=False)
    # Rounding as transformers does takes more registers than three warpgroups have.
    return Blocks(2, 128, 4) if alibi == "hf_bf16" else Blocks(3, 128, 3)


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
    starts: Int[Array, "B T"] | None = None,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N Tp"]]:
    """Causal attention, and the logarithm of each row's sum of exponentials.

    Args:
      q, k, v: bfloat16 or float16; H is 64 or 128; K divides N.
      query_offset, lengths, slopes, alibi, scale, starts: as in `attention`.
      blocks: None for the tuned ones.

    Returns:
      The output, zero for queries that see no key, and the natural-log sum in float32 [B, N, Tp], Tp = T rounded up
      to 128, -inf for queries that see no key; entries past T mean nothing.
    """
    interpretable = compat.interpreting()
    mode = None if slopes is None else alibi
    blocks = blocks or default_blocks(q.shape[-1], mode)
    if interpretable:
        blocks = dataclasses.replace(blocks, keys=64, stages=2)
    settings = _Settings(blocks, k.shape[1], q.shape[1], mode, scale, interpretable)
    return _forward(q, k, v, query_offset, lengths, slopes, starts, settings=settings, num_sms=compat.num_sms())


# Compiled once a shape: what calls this in every layer would otherwise lower the kernel in every layer.
@functools.partial(jax.jit, static_argnames=("settings", "num_sms"))
def _forward(q, k, v, query_offset, lengths, slopes, starts, *, settings, num_sms):
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    blocks = settings.blocks
    W, keys, stages = blocks.warpgroups, blocks.keys, blocks.stages
    work = tiles.Tiles(
        batch=B,
        kv_heads=K,
        group=N // K,
        num_tiles=pl.cdiv(T, ROWS * W),
        bytes_per_kv_head=2 * S * H * q.dtype.itemsize,
        key_tiles_before=(S - T) / keys,
        key_tiles_each=ROWS * W / keys,
    )
    table, counts = work.schedule(min(num_sms, B * N * work.num_tiles))
    # Copies of tiles want the sequence axis in multiples of 8.
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q, k, v))
    tiled = functools.partial(hopper.tiled, dtype=q.dtype)
    scratch = {
        "q_smem": tiled(W, ROWS, H),
        "k_smem": tiled(stages, keys, H),
        "v_smem": tiled(stages, keys, H),
        "out_smem": tiled(W, ROWS, H),
        "lse_smem": plgpu.SMEM((W, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=W),
        "q_free": plgpu.Barrier(num_barriers=W),
        "k_full": plgpu.Barrier(num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=W, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=W, num_barriers=stages),
        "turns": plgpu.Barrier(num_barriers=W),
    }
    if settings.interpretable:
        scratch["p_smem"] = tiled(W, ROWS, keys)
    inputs = {"q": q, "k": k, "v": v, "table": table, "counts": counts}
    optional = {"offsets": query_offset, "lengths": lengths, "slopes": slopes}
    if starts is not None:  # for every row of the last tile, too
        optional["starts"] = jnp.pad(starts.astype(jnp.int32), ((0, 0), (0, -T % (ROWS * W))), mode="edge")
    inputs |= {name: array for name, array in optional.items() if array is not None}
    out_type = {
        "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "lse": jax.ShapeDtypeStruct((B, N, tiles.padded_length(T)), jnp.float32),
    }

    def body(*arrays: Any, **smem: Any) -> None:
        _Block(settings, dict(zip([*inputs, *out_type], arrays)), smem).run()

    out, lse = plgpu.kernel(
        body,
        out_type=tuple(out_type.values()),
        scratch_types=scratch,
        grid=(len(counts),),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not settings.interpretable),
    )(*inputs.values())
    return out[:, :T], lse


class _Tile(NamedTuple):
    """Queries of one row and head that a block works on at a time, and what they see; all int32 scalars.

    first_query, offset, length: the tile's first query, the row's offset, its keys that count. first_step, num_steps:
    the first tile of keys to go through, and the number after the last; there is at least one.
    """

    batch: Any
    head: Any
    kv_head: Any
    first_query: Any
    offset: Any
    length: Any
    first_step: Any
    num_steps: Any


class _Block:
    """What one block does, tile after tile. `arrays` in device memory and `smem` by name, barriers among the latter."""

    def __init__(self, settings: _Settings, arrays: dict[str, Any], smem: dict[str, Any]):
        self.settings = settings
        self.arrays = arrays
        self.smem = smem
        self.blocks = settings.blocks
        self.block = lax.axis_index("block")
        self.warpgroup = lax.axis_index("warpgroup")
        self.num_rounds = arrays["counts"][self.block]

    def run(self) -> None:
        # Registers of a thread: 504 to share out among three warpgroups, 512 among four.
        many = self.blocks.warpgroups > 2

        @pl.when(self.warpgroup == self.blocks.warpgroups)
        def _copy():
            plgpu.set_max_registers(32 if many else 40, action="decrease")
            self.copy()

        @pl.when(self.warpgroup < self.blocks.warpgroups)
        def _compute():
            plgpu.set_max_registers(160 if many else 232, action="increase")
            _Warpgroup(self).run()

    def tile(self, round_index: Any) -> _Tile:
        batch, head, kv_head, index = (self.arrays["table"][self.block, round_index, i] for i in range(4))
        num_queries, num_keys = self.settings.num_queries, self.settings.num_keys
        offset, length = 0, num_keys
        if "offsets" in self.arrays:
            offset = self.arrays["offsets"][batch]
        if "lengths" in self.arrays:
            length = jnp.minimum(self.arrays["lengths"][batch], num_keys)
        rows = self.blocks.warpgroups * ROWS
        visible = jnp.minimum(jnp.minimum((index + 1) * rows, num_queries) + offset, length)
        num_steps = jnp.maximum(pl.cdiv(visible, self.blocks.keys), 1)
        first_step = 0
        if "starts" in self.arrays:  # those of later queries are no lower
            first_step = lax.div(self.arrays["starts"][batch, index * rows], jnp.int32(self.blocks.keys))
            first_step = jnp.minimum(first_step, num_steps - 1)
        return _Tile(batch, head, kv_head, index * rows, offset, length, first_step, num_steps)

    def next_slot(self, slot: Any) -> Any:
        return lax.select(slot == self.blocks.stages - 1, jnp.int32(0), slot + 1)

    def copy(self) -> None:
        """The copying warpgroup: queries of each tile, then its keys and values as shared memory gets free."""
        smem, stages = self.smem, self.blocks.stages

        def copy_tile(round_index, carry):
            tile = self.tile(round_index)
            for w in range(self.blocks.warpgroups):
                pl.when(round_index > 0)(lambda w=w: plgpu.barrier_wait(smem["q_free"].at[w]))
                rows = pl.ds(tile.first_query + w * ROWS, ROWS)
                queries = self.arrays["q"].at[tile.batch, rows, tile.head]
                plgpu.copy_gmem_to_smem(queries, smem["q_smem"].at[w], smem["q_full"].at[w])

            def copy_step(step, carry):
                slot, count = carry
                at = (tile.batch, pl.ds(step * self.blocks.keys, self.blocks.keys), tile.kv_head)
                for name in "kv":
                    pl.when(count >= stages)(lambda name=name: plgpu.barrier_wait(smem[f"{name}_free"].at[slot]))
                    destination, full = smem[f"{name}_smem"].at[slot], smem[f"{name}_full"].at[slot]
                    plgpu.copy_gmem_to_smem(self.arrays[name].at[at], destination, full)
                return self.next_slot(slot), count + 1

            return lax.fori_loop(tile.first_step, tile.num_steps, copy_step, carry)

        slot, count = lax.fori_loop(0, self.num_rounds, copy_tile, (jnp.int32(0), jnp.int32(0)))

        # Every phase of a barrier has to be seen before its memory goes.
        def see_out(_, slot):
            plgpu.barrier_wait(smem["k_free"].at[slot])
            plgpu.barrier_wait(smem["v_free"].at[slot])
            return self.next_slot(slot)

        first_unseen = lax.select(count >= stages, slot, jnp.int32(0))
        lax.fori_loop(0, jnp.minimum(count, stages), see_out, first_unseen)
        for w in range(self.blocks.warpgroups):
            plgpu.barrier_wait(smem["q_free"].at[w])


class _Softmax(NamedTuple):
    """Where a warpgroup stands in a tile: sums `o` of weighted values, maxima `m`, totals of weights, in float32.

    o [ROWS, H] still lacks the tile of keys whose weights `p` [ROWS, keys] are, in the inputs' dtype.
    """

    o: Any
    m: Any
    total: Any
    p: Any


class _Warpgroup:
    """A computing warpgroup of a block, on its own 64 queries of each tile."""

    def __init__(self, block: _Block):
        self.block = block
        self.settings = block.settings
        self.keys = block.blocks.keys
        self.index = block.warpgroup
        self.smem = block.smem
        self.q = self.smem["q_smem"].at[self.index]
        self.dtype = self.q.dtype
        self.exponent_scale = self.settings.scale * hopper.LOG2E
        self.num_warpgroups = block.blocks.warpgroups
        self.takes_turns = block.blocks.take_turns and self.num_warpgroups > 1

    def run(self) -> None:
        if self.takes_turns:  # the last one lets the first begin
            pl.when(self.index == self.num_warpgroups - 1)(self.pass_turn)
        lax.fori_loop(0, self.block.num_rounds, self.attend, jnp.int32(0))
        if self.takes_turns:  # which leaves an arrival over that somebody has to see
            pl.when(self.index == 0)(self.wait_turn)
        plgpu.wait_smem_to_gmem(0)

    def wait_turn(self) -> None:
        if self.takes_turns:
            plgpu.barrier_wait(self.smem["turns"].at[self.index])

    def pass_turn(self) -> None:
        if self.takes_turns:
            plgpu.barrier_arrive(self.smem["turns"].at[lax.rem(self.index + 1, jnp.int32(self.num_warpgroups))])

    def attend(self, round_index: Any, slot: Any) -> Any:
        """One tile of queries; `slot` holds its first keys. Returns the slot after its last ones."""
        tile = self.block.tile(round_index)
        first_row = tile.first_query + self.index * ROWS + tile.offset
        starts = functools.partial(self.start, tile, first_row)
        plgpu.barrier_wait(self.smem["q_full"].at[self.index])
        state = self.first_step(starts(jnp.int32(tile.first_step), masked=True), slot)

        def step(index: Any, carry: tuple[_Softmax, Any], *, masked: bool) -> tuple[_Softmax, Any]:
            state, slot = carry
            return self.step(starts(index, masked=masked), state, slot)

        # Tiles of keys that all these queries see come before those that causality or the row's end cuts, and after
        # those in which a document of these queries begins.
        cut, full = (functools.partial(step, masked=masked) for masked in (True, False))
        num_full = jnp.minimum(lax.div(jnp.minimum(first_row + 1, tile.length), self.keys), tile.num_steps)
        second, carry = tile.first_step + 1, (state, slot)
        if "starts" in self.block.arrays:
            last_start = self.block.arrays["starts"][tile.batch, tile.first_query + (self.index + 1) * ROWS - 1]
            first_full = jnp.clip(pl.cdiv(last_start, self.keys), second, tile.num_steps)
            carry, second = lax.fori_loop(second, first_full, cut, carry), first_full
        carry = lax.fori_loop(second, num_full, full, carry)
        state, slot = lax.fori_loop(jnp.maximum(num_full, second), tile.num_steps, cut, carry)

        plgpu.barrier_arrive(self.smem["q_free"].at[self.index])
        plgpu.barrier_wait(self.smem["v_full"].at[slot])
        state = state._replace(o=self.multiply(state.o, state.p, self.smem["v_smem"].at[slot]))
        plgpu.barrier_arrive(self.smem["v_free"].at[slot])
        self.store(tile, state)
        return self.block.next_slot(slot)

    def start(self, tile: _Tile, first_row: Any, step: Any, *, masked: bool) -> jax.Array:
        """What the accumulator of a tile of scores starts from."""
        first_key = step * self.keys
        num_visible = num_hidden = None
        if masked:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW) + first_row
            num_visible = jnp.minimum(row + 1, tile.length) - first_key
            if "starts" in self.block.arrays:  # read where needed: registers are scarce
                rows = pl.ds(tile.first_query + self.index * ROWS, ROWS)
                starts = self.block.arrays["starts"].at[tile.batch, rows]
                num_hidden = plgpu.load(starts, layout=PER_ROW, optimized=False) - first_key
        settings = self.settings
        return scores_start(
            ROWS,
            self.keys,
            alibi=settings.alibi,
            slope=self.slope(tile),
            first_row=first_row,
            first_key=first_key,
            num_visible=num_visible,
            num_hidden=num_hidden,
            scale=settings.scale,
            dtype=self.dtype,
            interpretable=settings.interpretable,
        )

    def slope(self, tile: _Tile) -> Any:
        return None if self.settings.alibi is None else self.block.arrays["slopes"][tile.head]

    def first_step(self, start: jax.Array, slot: Any) -> _Softmax:
        """Scores and weights of the first tile of keys."""
        plgpu.barrier_wait(self.smem["k_full"].at[slot])
        self.wait_turn()
        s = self.multiply(start, self.q, self.smem["k_smem"].at[slot].transpose((1, 0)), self.pass_turn)
        plgpu.barrier_arrive(self.smem["k_free"].at[slot])
        m = hopper.filled((ROWS,), LOWEST_MAXIMUM, PER_ROW)
        p, m, _ = self.weights(s, m)
        o = hopper.filled(self.q.shape, 0.0, plgpu.Layout.WGMMA)
        return _Softmax(o, m, p.sum(axis=1), p.astype(self.dtype))

    def step(self, start: jax.Array, state: _Softmax, slot: Any) -> tuple[_Softmax, Any]:
        """Scores and weights of the next tile of keys, while the values of the one before are added up."""
        smem = self.smem
        next_slot = self.block.next_slot(slot)
        next_k, v = smem["k_smem"].at[next_slot].transpose((1, 0)), smem["v_smem"].at[slot]
        plgpu.barrier_wait(smem["v_full"].at[slot])
        plgpu.barrier_wait(smem["k_full"].at[next_slot])
        self.wait_turn()

        def products(refs):
            s_ref, o_ref, m_ref, total_ref, p_ref, alpha_ref = refs
            plgpu.wgmma(s_ref, self.q, next_k)
            plgpu.wgmma(o_ref, p_ref[...], v)
            self.pass_turn()
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            plgpu.barrier_arrive(smem["k_free"].at[next_slot])
            p, m, alpha = self.weights(s, m_ref[...])
            total = total_ref[...] * alpha + p.sum(axis=1)
            # The product with V still reads the old weights: the new ones stay in float32, in the registers of the
            # scores, until it has ended. The barriers keep the compiler from moving the cast ahead.
            p, m, total, alpha = lax.optimization_barrier((p, m, total, alpha))
            plgpu.wgmma_wait(0)
            (p,) = lax.optimization_barrier((p,))
            m_ref[...], total_ref[...], p_ref[...], alpha_ref[...] = m, total, p.astype(self.dtype), alpha

        if self.settings.interpretable:
            s = self.multiply(start, self.q, next_k, self.pass_turn)
            plgpu.barrier_arrive(smem["k_free"].at[next_slot])
            o = self.multiply(state.o, state.p, v)
            p, m, alpha = self.weights(s, state.m)
            total, p = state.total * alpha + p.sum(axis=1), p.astype(self.dtype)
        else:
            o, m, total, p = state
            accumulator = hopper.Accumulator.init
            updated: Any = pl.run_state(products)((accumulator(start), accumulator(o), m, total, p, m))
            _, o, m, total, p, alpha = updated
        plgpu.barrier_arrive(smem["v_free"].at[slot])
        return _Softmax(o * lax.broadcast_in_dim(alpha, o.shape, [0]), m, total, p), next_slot

    def weights(self, s: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights of a tile of scores, the maxima with it, and the factor on everything before."""
        new_m = jnp.maximum(m, s.max(axis=1) * self.exponent_scale)
        p = jnp.exp2(s * self.exponent_scale - lax.broadcast_in_dim(new_m, s.shape, [0]))
        return p, new_m, jnp.exp2(m - new_m)

    def multiply(self, start: Any, a: Any, b: Any, when_issued: Callable[[], None] | None = None) -> Any:
        """start + a @ b, awaited. Interpretation takes neither set accumulators nor operands in registers."""

        def issue(accumulator):
            plgpu.wgmma(accumulator, a, b)
            if when_issued is not None:
                when_issued()
            return accumulator[...] if self.settings.interpretable else None

        if not self.settings.interpretable:
            return pl.run_state(issue)(hopper.Accumulator.init(start))
        if isinstance(a, jax.Array):
            p_smem = self.smem["p_smem"].at[self.index]
            p_smem[...] = a
            plgpu.commit_smem()
            a = p_smem
        return start + pl.run_scoped(issue, hopper.Accumulator(start.shape, jnp.float32))

    def store(self, tile: _Tile, state: _Softmax) -> None:
        seen = state.total > 0  # at least 1 where any key was seen: the largest weight
        factor = jnp.where(seen, 1.0 / state.total, 0.0)
        out = (state.o * lax.broadcast_in_dim(factor, state.o.shape, [0])).astype(self.dtype)
        lse = (state.m + jnp.log2(state.total)) * (1 / hopper.LOG2E)
        if self.settings.alibi == "float32":  # scores were counted from the first query's position, not their own
            row = plgpu.broadcasted_iota(jnp.float32, (ROWS,), 0, layout=PER_ROW)
            lse -= row * (self.slope(tile) * self.settings.scale)
        lse = jnp.where(seen, lse, -jnp.inf)

        out_smem, lse_smem = (self.smem[name].at[self.index] for name in ("out_smem", "lse_smem"))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
        out_smem[...] = out
        lse_smem[...] = lse
        plgpu.commit_smem()
        first, lse_array = tile.first_query + self.index * ROWS, self.block.arrays["lse"]
        rows = pl.ds(first, ROWS)
        plgpu.copy_smem_to_gmem(out_smem, self.block.arrays["out"].at[tile.batch, rows, tile.head])

        # A copy of one stretch of memory does not end where the row does, as others do, but goes on in the next head.
        @pl.when(first < lse_array.shape[2])
        def _copy_lse():
            plgpu.copy_smem_to_gmem(lse_smem, lse_array.at[tile.batch, tile.head, rows])
