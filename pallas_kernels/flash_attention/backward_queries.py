"""dQ alone: a tile of queries stays, tiles of keys go by, and dQ never leaves registers.

The other half of a backward pass in two kernels, which recompute scores and dO V^T twice, seven products in all, but
need no float32 dQ in memory. The kernel of backward_keys.py does without this one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.backward_keys import LOG2E, Accumulator, Settings, tiled
from pallas_kernels.flash_attention.starts import scores_start
from pallas_kernels.flash_attention.tiles import Tiles

STAGES = 2  # tiles of K and V that shared memory holds
WARPGROUPS = 2  # that compute
ROWS = 64
QUERIES = WARPGROUPS * ROWS
PER_QUERY = plgpu.Layout.WGMMA.reduce(1)


def gradient(inputs: dict[str, Any], settings: Settings, keys: int) -> jax.Array:
    """dQ [B, T, N, H] in q's dtype; arguments as of `backward_keys.gradients`. `keys`: of a tile, 64 or 128."""
    p, dtype = settings.problem, inputs["q"].dtype
    table = Tiles(
        batch=p.B,
        kv_heads=p.K,
        group=p.group,
        num_tiles=-(-p.T // QUERIES),
        bytes_per_kv_head=2 * p.S * p.H * dtype.itemsize,
        key_tiles_before=(p.S - p.T) / keys,
        key_tiles_each=QUERIES / keys,
    ).order()
    inputs = {**inputs, "table": table}

    scratch = {
        "q_smem": tiled(WARPGROUPS, ROWS, p.H, dtype=dtype),
        "dout_smem": tiled(WARPGROUPS, ROWS, p.H, dtype=dtype),
        "stats_smem": plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32),
        "k_smem": tiled(STAGES, keys, p.H, dtype=dtype),
        "v_smem": tiled(STAGES, keys, p.H, dtype=dtype),
        "queries_full": plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    }
    if settings.interpretable:
        scratch["ds_smem"] = tiled(WARPGROUPS, ROWS, keys, dtype=dtype)

    def body(*arrays: Any, **smem: Any) -> None:
        _Block(settings, keys, dict(zip([*inputs, "dq"], arrays)), smem).run()

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(inputs["q"].shape, dtype),
        scratch_types=scratch,
        grid=(len(table),),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_backward_queries",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not settings.interpretable),
    )(*inputs.values())


class _Block:
    """What one block does, on 128 queries. `arrays` in device memory and `smem` by name."""

    def __init__(self, settings: Settings, keys: int, arrays: dict[str, Any], smem: dict[str, Any]):
        self.settings, self.problem, self.keys = settings, settings.problem, keys
        self.arrays, self.smem = arrays, smem
        self.warpgroup = lax.axis_index("warpgroup")
        self.row, self.head, self.kv_head, self.tile = (arrays["table"][lax.axis_index("block"), i] for i in range(4))
        self.offset = arrays["offsets"][self.row] if "offsets" in arrays else jnp.int32(0)
        self.length = arrays["lengths"][self.row] if "lengths" in arrays else jnp.int32(self.problem.S)
        end = jnp.minimum(jnp.minimum((self.tile + 1) * QUERIES, self.problem.T) + self.offset, self.length)
        self.num_steps = jnp.maximum(pl.cdiv(end, keys), 1)

    def run(self) -> None:
        @pl.when(self.warpgroup == WARPGROUPS)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            self.load()

        @pl.when(self.warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            self.compute()

    def load(self) -> None:
        """The loading warpgroup: the queries once, then keys and values as shared memory gets free."""
        arrays, smem = self.arrays, self.smem
        for w in range(WARPGROUPS):
            rows, full = pl.ds(self.tile * QUERIES + w * ROWS, ROWS), smem["queries_full"].at[w]
            for name in ("q", "dout"):
                plgpu.copy_gmem_to_smem(arrays[name].at[self.row, rows, self.head], smem[f"{name}_smem"].at[w], full)
            plgpu.copy_gmem_to_smem(arrays["stats"].at[self.row, self.head, :, rows], smem["stats_smem"].at[w], full)

        def load_tile(step, slot):
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(smem["free"].at[slot]))
            at = (self.row, pl.ds(step * self.keys, self.keys), self.kv_head)
            for name in "kv":
                plgpu.copy_gmem_to_smem(arrays[name].at[at], smem[f"{name}_smem"].at[slot], smem["full"].at[slot])
            return _next_slot(slot)

        lax.fori_loop(0, self.num_steps, load_tile, jnp.int32(0))

    def compute(self) -> None:
        """A computing warpgroup, on its own 64 queries."""
        smem, settings = self.smem, self.settings
        first_query = self.tile * QUERIES + self.warpgroup * ROWS
        plgpu.barrier_wait(smem["queries_full"].at[self.warpgroup])
        q, stats = smem["q_smem"].at[self.warpgroup], smem["stats_smem"].at[self.warpgroup]
        exponent = plgpu.load(stats.at[0], layout=PER_QUERY) * (settings.scale * LOG2E)
        minus_delta = plgpu.load(stats.at[1], layout=PER_QUERY)

        def accumulate(dq_acc):
            def add(step, slot):
                ds = self.softmax(first_query, exponent, minus_delta, step, slot)
                if settings.interpretable:  # which takes no operands in registers
                    smem["ds_smem"][self.warpgroup] = ds
                    plgpu.commit_smem()
                    ds = smem["ds_smem"].at[self.warpgroup]
                plgpu.wgmma(dq_acc, ds, smem["k_smem"].at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(smem["free"].at[slot], predicate=step + STAGES < self.num_steps)
                return _next_slot(slot)

            lax.fori_loop(0, self.num_steps, add, jnp.int32(0))
            return dq_acc[...]

        dq = pl.run_scoped(accumulate, Accumulator((ROWS, self.problem.H), jnp.float32))
        q[...] = (dq * settings.scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, self.arrays["dq"].at[self.row, pl.ds(first_query, ROWS), self.head])
        plgpu.wait_smem_to_gmem(0)

    def softmax(self, first_query: Any, exponent: jax.Array, minus_delta: jax.Array, step: Any, slot: Any) -> jax.Array:
        """dS [ROWS, keys] in the inputs' dtype, from Q K^T and dO V^T."""
        smem, settings, shape = self.smem, self.settings, (ROWS, self.keys)
        s_start = self.start_of_scores(first_query, step)
        dp_start = lax.broadcast_in_dim(minus_delta, shape, [0])
        plgpu.barrier_wait(smem["full"].at[slot])

        def multiply(s_acc, dp_acc):
            for acc, mine, other in ((s_acc, "q", "k"), (dp_acc, "dout", "v")):
                other = smem[f"{other}_smem"].at[slot].transpose((1, 0))
                plgpu.wgmma(acc, smem[f"{mine}_smem"].at[self.warpgroup], other)

        def weights(s, dp):
            p = jnp.exp2(s * (settings.scale * LOG2E) + lax.broadcast_in_dim(exponent, shape, [0]))
            return (p * dp()).astype(smem["q_smem"].dtype)

        def products(refs):
            s_acc, dp_acc, ds_ref = refs
            multiply(s_acc, dp_acc)
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            ds_ref[...] = weights(s, lambda: plgpu.wgmma_accumulator_load(dp_acc, wait_n=0))

        def products_interpreted(s_acc, dp_acc):
            multiply(s_acc, dp_acc)
            return weights(s_acc[...] + s_start, lambda: dp_acc[...] + dp_start)

        if settings.interpretable:  # which takes no accumulators that are set
            return pl.run_scoped(products_interpreted, *[Accumulator(shape, jnp.float32)] * 2)
        nothing = plgpu.layout_cast(jnp.zeros(shape, smem["q_smem"].dtype), plgpu.Layout.WGMMA)
        return pl.run_state(products)((Accumulator.init(s_start), Accumulator.init(dp_start), nothing))[2]

    def start_of_scores(self, first_query: Any, step: Any) -> jax.Array:
        """What Q K^T starts from, [ROWS, keys]: ALiBi, as far as the statistics lack it, in units of q . k."""
        settings, first_key = self.settings, step * self.keys

        def start(num_visible):
            return scores_start(
                ROWS,
                self.keys,
                alibi=settings.alibi,
                slope=None if settings.alibi is None else self.arrays["slopes"][self.head],
                # The statistics count from the first query of a tile of the other kernel.
                first_row=self.offset + first_query // self.problem.queries * self.problem.queries,
                first_key=first_key,
                num_visible=num_visible,
                scale=settings.scale,
                dtype=self.smem["q_smem"].dtype,
                interpretable=settings.interpretable,
            )

        def start_hiding():
            query = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_QUERY) + (first_query + self.offset)
            return start(jnp.minimum(query + 1, self.length) - first_key)

        sees_all = first_key + self.keys <= jnp.minimum(first_query + self.offset + 1, self.length)
        return lax.cond(sees_all, lambda: start(None), start_hiding)


def _next_slot(slot: Any) -> Any:
    return lax.select(slot == STAGES - 1, jnp.int32(0), slot + 1)
