"""Combines what blocks have through the GPU's memory: any number of them, as long as all run at once.

Each warpgroup publishes its sums, maxima and totals; a counter for each row and KV head says when all have; then the
blocks share out the result. Interpretation takes this way too, with the barrier of a cluster instead of counters.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.plan import Plan, Shape
from pallas_kernels.flash_attention.reference import MASKED
from pallas_kernels.hopper import filled, meet, store, wait_until_results_have_left

# Several results [results, 8 heads, some of H]: a warp takes every fourth, a thread two numbers of a head.
PARTIALS = plgpu.Layout.TILED(plgpu.Tiling(((4, 8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


def units(H: int, num_streams: int) -> list[tuple[int, int]]:
    """In what pieces results are combined: how many at once, and how many rows of H.

    Each is as much as the registers take, so that its loads are in flight together. A row shorter than the cache has
    fewer results than the plan, and takes another size.
    """
    chunks = [chunk for chunk in (8, 16, 32, 64, 128) if chunk < 2 * num_streams or chunk == 8]
    return [(chunk, min(H, 1024 // chunk)) for chunk in chunks]


def outputs(shape: Shape, plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays for what is published, by name."""
    largest_chunk, _ = units(shape.H, plan.num_streams)[-1]
    num_results = -(-plan.num_streams // largest_chunk) * largest_chunk
    dims = (shape.B, shape.K * shape.head_blocks(plan), num_results, shape.heads(plan))
    rests = {"sums": (shape.H,), "maxima": (), "totals": ()}
    return {name: jax.ShapeDtypeStruct((*dims, *rest), jnp.float32) for name, rest in rests.items()}


def combine(warpgroup: Any, num_tiles: Any, results: tuple[Any, Any, Any]) -> None:
    """Brings the result of a row and KV head to the end: all its warpgroups call it.

    warpgroup: the kernel's. num_tiles: of the row. results: sums, maxima and totals of this warpgroup.
    """
    num_active = jnp.clip(num_tiles, 1, warpgroup.plan.num_streams)
    _Combination(warpgroup, num_active).run(*results)


class _Combination:
    def __init__(self, warpgroup: Any, num_active: Any):
        self.warpgroup, self.num_active = warpgroup, num_active
        self.shape, self.plan, self.settings = warpgroup.shape, warpgroup.plan, warpgroup.settings
        self.arrays, self.smem = warpgroup.arrays, warpgroup.smem
        self.row, self.pair, self.split = warpgroup.row, warpgroup.pair, warpgroup.split
        self.index, self.stream = warpgroup.index, warpgroup.stream

    def run(self, *results: Any) -> None:
        @pl.when(self.stream < self.num_active)
        def _publish():
            pl.when(self.num_active == 1)(lambda: self.warpgroup.store(*results))
            pl.when(self.num_active > 1)(lambda: self.publish(*results))

        self.meet()
        self.share_out()

    def publish(self, sums: Any, maxima: Any, totals: Any) -> None:
        """Leaves this warpgroup's results where the others find them."""
        at = (self.row, self.pair, self.stream)
        self.arrays["sums"].at[at].transpose((1, 0))[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
        store(self.arrays["maxima"].at[at], maxima)
        store(self.arrays["totals"].at[at], totals)

    def meet(self) -> None:
        """Returns when all blocks of this row and KV head have published."""
        if "met" in self.smem:
            plgpu.barrier_arrive(self.smem["met"])
            plgpu.barrier_wait(self.smem["met"])
        elif self.settings.interpretable:
            self.warpgroup.gather()
        else:
            index = self.row * (self.shape.pairs(self.plan) // self.shape.B) + self.pair
            come = functools.partial(meet, self.arrays["counters"], index, self.stream, self.num_active)
            has_others = (self.num_active > 1) & (self.stream < self.num_active)
            # The first warpgroup of each block shares out the result.
            pl.when(has_others & (self.index == 0))(come)
            pl.when(has_others & (self.index != 0))(functools.partial(come, waits=False))

    def share_out(self) -> None:
        """The first warpgroup of each block that has published does it: Pallas reduces for one at a time."""
        is_worker = (self.index == 0) & (self.split < self.num_active)
        sizes, fewer = units(self.shape.H, self.plan.num_streams), 1
        for (chunk, rows), unit_smem in zip(sizes, self.smem["units_smem"]):
            fits = (self.num_active > fewer) & ((self.num_active <= chunk) | (chunk == sizes[-1][0]))
            finish = functools.partial(self.finish, chunk, rows, unit_smem)
            pl.when(fits & is_worker)(finish)
            fewer = chunk

    def finish(self, chunk: int, rows: int, unit_smem: Any) -> None:
        """A share of the result: units of 8 heads by `rows` of H, from `chunk` results at a time."""
        head_units = self.warpgroup.heads // 8
        num_workers = jnp.minimum(self.num_active, self.plan.splits)

        def combine_unit(i, carry):
            u = self.split + i * num_workers
            head = lax.rem(u, jnp.int32(head_units)) * 8
            these_heads = pl.ds(head, 8)
            these_rows = pl.ds(lax.div(u, jnp.int32(head_units)) * rows, rows)

            def add(c, carry):
                sums, maxima, totals = carry
                at = (self.row, self.pair, pl.ds(c * chunk, chunk), these_heads)

                def load(ref, layout, dead: float):
                    """What has been published, `dead` where nothing was."""
                    x = plgpu.load(ref, layout=layout, optimized=False)
                    stream = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout) + c * chunk
                    return jnp.where(stream < self.num_active, x, dead)

                their_maxima = load(self.arrays["maxima"].at[at], PARTIALS.reduce(2), MASKED)
                their_totals = load(self.arrays["totals"].at[at], PARTIALS.reduce(2), 0.0)
                their_sums = load(self.arrays["sums"].at[*at, these_rows], PARTIALS, 0.0)
                new_maxima = jnp.maximum(maxima, their_maxima.max(axis=0))
                weights = jnp.exp2(their_maxima - lax.broadcast_in_dim(new_maxima, their_maxima.shape, [1]))
                factor = jnp.exp2(maxima - new_maxima)
                totals = totals * factor + (their_totals * weights).sum(axis=0)
                weighted = their_sums * lax.broadcast_in_dim(weights, their_sums.shape, [0, 1])
                sums = sums * lax.broadcast_in_dim(factor, sums.shape, [0]) + weighted.sum(axis=0)
                return sums, new_maxima, totals

            of_a_head = PARTIALS.reduce(2).reduce(0)
            empty = (
                filled((8, rows), 0.0, PARTIALS.reduce(0)),
                filled((8,), MASKED, of_a_head),
                filled((8,), 0.0, of_a_head),
            )
            sums, _, totals = lax.fori_loop(0, pl.cdiv(self.num_active, chunk), add, empty)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out = sums * lax.broadcast_in_dim(1.0 / totals, sums.shape, [0])
            unit_smem.at[:, 0][...] = out.astype(unit_smem.dtype)
            plgpu.commit_smem()
            heads = pl.ds(self.warpgroup.first_head + head, 8)
            target = self.arrays["out"].at[self.row, self.warpgroup.kv_head, heads, :, these_rows]
            plgpu.copy_smem_to_gmem(unit_smem, target)
            return carry

        num_units = head_units * (self.shape.H // rows)
        lax.fori_loop(0, pl.cdiv(num_units - self.split, num_workers), combine_unit, None)
        wait_until_results_have_left()
