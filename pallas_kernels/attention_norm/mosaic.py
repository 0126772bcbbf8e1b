"""The output stage for Hopper, one launch: products + residual, and the layer norms of that. Pallas, Mosaic GPU.

Streams of weights (quantized_matmul/stream.py) make tiles of 64 outputs of all rows. A norm needs the mean and the
variance of whole rows, so blocks meet once: each publishes, for its tile, every row's mean and the sum of squared
distances from that (moments.py), reads those of all, and puts them together in the same order as everybody else. Then
it normalizes its own tile, which it has kept in shared memory.

All blocks must run at once. So there are at most as many as fit the GPU, and two launches never overlap: each takes
the array through which its blocks meet from the launch before.

Without norms (`add_mosaic`) there is nothing to meet for, nor where norms end in the products that read them
(`defer_norm_mosaic`, quantized_matmul/deferred.py).

Where a GPU has more multiprocessors than a model has tiles, several blocks, a cluster, share out the inputs of a tile
and bring what they come to to the first of them, which does the rest: with 8 rows through its shared memory (parts.py),
with more through device memory.

Where several devices share out the inputs (`exchange`), a tile is done when the parts of all have been added up, in
memory that they write for each other (pallas_kernels/peers).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, sending
from pallas_kernels.attention_norm import parts
from pallas_kernels.attention_norm.moments import count_of_launches, end_launch, publish, read
from pallas_kernels.hopper import fence_memory, rounded, store, wait_until_results_have_left
from pallas_kernels.peers import exchange as exchanges
from pallas_kernels.peers.exchange import Exchange
from pallas_kernels.quantized_matmul.deferred import SCALE_ROW, SHIFT_ROW, Moments, padded_tiles
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.integer_sums import store_integers
from pallas_kernels.quantized_matmul.integers import Integers
from pallas_kernels.quantized_matmul.mosaic import parameters
from pallas_kernels.quantized_matmul.plan import Launch, Plan, check_all_run_at_once, output_launch, sent_bytes
from pallas_kernels.quantized_matmul.product import rows_read
from pallas_kernels.quantized_matmul.rows import (
    PER_COLUMN,
    load,
    moments_of_rows,
    moments_of_tile,
    number_of,
    over_outputs,
    over_rows,
)
from pallas_kernels.quantized_matmul.stream import Stream, arrays_of, run, scratch, x_of


def attention_norm_mosaic(
    xs: Sequence[Float[Array, "R _"]],
    weights: Sequence[Any],
    biases: Sequence[Float[Array, " D"]],
    residual: Float[Array, "R D"],
    norms: Sequence[tuple[Float[Array, " D"], Float[Array, " D"]]],
    meeting: Int[Array, " M"],
    *,
    epsilon: float,
    plan: Plan | None = None,
    exchange: Exchange | None = None,
    table: Int[Array, " E"] | None = None,
    num_rows: int | None = None,
) -> tuple[Float[Array, "R D"], list[Float[Array, "R D"]], Int[Array, " M"]]:
    """`attention_norm` by the kernel, for rows that are a multiple of 8, and the array `meeting` for the next
    launch. exchange, table: None, or how this device adds up what all make, and its row of their `table`. num_rows: how
    many rows of xs mean something, the first ones; None for all."""
    results, meeting = _run(
        xs, weights, biases, residual, norms, meeting, residual, epsilon, plan, num_rows, exchange, table
    )  # fmt: skip
    return results["out"], results["normed"], meeting


def defer_norm_mosaic(
    xs: Sequence[Float[Array, "8 _"]],
    weights: Sequence[Any],
    biases: Sequence[Float[Array, " D"]],
    residual: Float[Array, "8 D"],
    norms: Sequence[tuple[Float[Array, " D"], Float[Array, " D"]]],
    *,
    epsilon: float,
    plan: Plan | None = None,
    exchange: Exchange | None = None,
    table: Int[Array, " E"] | None = None,
    num_rows: int | None = None,
    integers: Integers | None = None,
) -> tuple[Float[Array, "8 D"], list[Any], Moments]:
    """`attention_norm_deferred` by the kernel, for 8 rows. exchange, table, num_rows: as of `attention_norm_mosaic`."""
    results, _ = _run(
        xs, weights, biases, residual, norms, None, residual, epsilon, plan, num_rows, exchange, table, integers
    )  # fmt: skip
    return results["out"], results["normed"], Moments(results["moments"], epsilon)


def add_mosaic(
    xs: Sequence[Float[Array, "R _"]],
    weights: Sequence[Any],
    num_outputs: int,
    *,
    plan: Plan | None = None,
    num_rows: int | None = None,
) -> Float[Array, "R O"]:
    """The products alone, added up in float32 and rounded to x's dtype; rows are a multiple of 8.

    One device's part where several share out the inputs. No norm, so blocks need not meet. num_rows: as of
    `attention_norm_mosaic`.
    """
    shape = jax.ShapeDtypeStruct((xs[0].shape[0], num_outputs), xs[0].dtype)
    results, _ = _run(xs, weights, [], None, [], None, shape, 0.0, plan, num_rows)
    return results["out"]


def _run(
    xs, weights, biases, residual, norms, meeting, like: Any, epsilon: float, plan: Plan | None, num_rows: int | None,
    exchange: Exchange | None = None, table: Array | None = None, integers: Integers | None = None,
):  # fmt: skip
    """What a launch makes, by name, and the array `meeting` for the next one. like: of the results' shape and dtype."""
    return _launch(
        list(xs), list(weights), list(biases), residual, [tuple(norm) for norm in norms], meeting, table,
        shape=jax.ShapeDtypeStruct(like.shape, like.dtype), epsilon=epsilon, exchange=exchange, integers=integers,
        num_read=rows_read(like.shape[0], num_rows), plan=plan,
        num_sms=compat.num_sms(), interpretable=compat.interpreting(),
    )  # fmt: skip


_STATIC = ("shape", "epsilon", "exchange", "integers", "num_read", "plan", "num_sms", "interpretable")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _launch(
    xs, weights, biases, residual, norms, meeting, table,
    *, shape: jax.ShapeDtypeStruct, epsilon: float, exchange: Exchange | None, integers: Integers | None,
    num_read: int, plan: Plan | None, num_sms: int, interpretable: bool,
):  # fmt: skip
    num_rows, width = shape.shape
    launch = output_launch(weights, width, num_rows, len(norms), num_sms, plan)
    plan, num_blocks = launch.plan, launch.num_blocks
    meets = meeting is not None  # else norms are deferred
    if meets and not interpretable:
        check_all_run_at_once(launch, num_rows, len(norms), num_sms)
    settings = _Settings(
        launch, num_rows, width, len(norms), len(biases), residual is not None, meets, exchange, integers, epsilon,
        interpretable,
    )  # fmt: skip
    inputs = {
        "xs": [x_of(x, num_read) for x in xs],
        "weights": [arrays_of(weight) for weight in weights],
        "columns": [*biases, *(array for norm in norms for array in norm)],
        "residual": residual,
        "table": table,
    }
    if meets and not interpretable:
        inputs["meeting"] = jax.new_ref(meeting)
    normed = shape if integers is None else integers.described(width, shape.dtype)
    outputs: dict[str, Any] = {"out": shape, "normed": [normed] * len(norms)}
    if norms and (interpretable or not meets):
        outputs["moments"] = jax.ShapeDtypeStruct((2, num_rows, padded_tiles(width)), jnp.float32)
    sends = not interpretable and sent_bytes(plan.splits, num_rows) > 0
    if plan.splits > 1 and not sends:
        outputs["partial"] = jax.ShapeDtypeStruct((num_blocks, plan.width, plan.splits, num_rows, TILE), jnp.float32)
    given, treedef = jax.tree.flatten(inputs)
    made, made_treedef = jax.tree.flatten(outputs)

    def body(*refs: Any, smem: dict[str, Any]) -> None:
        arrays = treedef.unflatten(refs[: len(given)]) | made_treedef.unflatten(refs[len(given) :])
        warpgroup, block, split = (lax.axis_index(name) for name in ("warpgroup", "block", "split"))

        def make(warpgroup: Any) -> Stream:
            return Stream(
                launch, arrays["weights"],
                block=block, split=split, warpgroup=warpgroup,
                xs=arrays["xs"], smem=smem, in_turn=False, interpretable=interpretable,
            )  # fmt: skip

        def consume(stream: Stream) -> None:
            _Block(settings, arrays, smem, stream, (warpgroup, block, split)).run()

        if "parts" in smem:
            parts.expect_all(smem, warpgroup)
            if plan.producer:
                pl.when(warpgroup == plan.warpgroups)(sending.wait_for_all_open)
        run(plan, warpgroup, make, consume)

    tile = functools.partial(plgpu.SMEM, dtype=shape.dtype)
    smem = scratch(launch, num_rows) | {"tiles": tile((plan.width, num_rows, TILE))}
    if norms and meets:
        smem["normed"] = tile((len(norms), num_rows, TILE))
    elif integers is not None:
        smem["normed"] = plgpu.SMEM((len(norms), 2 * integers.num_held, TILE), jnp.int8)
        smem["normed_blocks"] = plgpu.SMEM((len(norms), 2 * integers.num_held), jnp.int32)
    if inputs["columns"]:
        smem["columns"] = tile((plan.width, len(inputs["columns"]), TILE))
    if num_fetched := settings.has_residual + len(inputs["columns"]):
        smem["ready"] = plgpu.Barrier(num_arrivals=plan.width * num_fetched)
    if interpretable:  # where blocks cannot meet in device memory
        smem["met"] = plgpu.ClusterBarrier(collective_axes=("block", "split"), num_arrivals=1)
        blocks = {"cluster": (num_blocks, plan.splits), "cluster_names": ("block", "split")}
    else:
        blocks = {"grid": (num_blocks,), "grid_names": ("block",)}
        blocks |= {"cluster": (plan.splits,), "cluster_names": ("split",)}
    if sends:
        smem |= parts.buffers(plan, num_rows)
    elif plan.splits > 1:
        smem["shared_out"] = plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=1)
    results = plgpu.kernel(
        body,
        out_type=made,
        num_threads=plan.all_warpgroups,
        thread_name="warpgroup",
        kernel_name="attention_norm",
        compiler_params=parameters(interpretable),
        scratch_types={"smem": smem},
        **blocks,
    )(*given)
    results = made_treedef.unflatten(results)
    if "meeting" in inputs:
        meeting = jax.freeze(inputs["meeting"])
    return results, meeting


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a kernel is compiled for."""

    launch: Launch
    num_rows: int
    width: int
    num_norms: int
    num_biases: int
    has_residual: bool
    meets: bool  # or else its norms, if any, end in what reads them
    exchange: Exchange | None
    integers: Integers | None  # as which rows for deferred norms are written; None for floating point
    epsilon: float
    interpretable: bool

    @property
    def plan(self) -> Plan:
        return self.launch.plan

    @property
    def num_tiles(self) -> int:
        return self.launch.num_tiles


class _Block:
    """One warpgroup's part in a block. The first does all that comes after the products."""

    def __init__(
        self,
        settings: _Settings,
        arrays: dict[str, Any],
        smem: dict[str, Any],
        stream: Stream,
        place: tuple[Any, Any, Any],
    ):
        self.settings, self.arrays, self.smem, self.stream = settings, arrays, smem, stream
        self.warpgroup, self.block, self.split = place

    def run(self) -> None:
        self.stream.begin()
        if self.meets_in_memory:
            self.launch_number = count_of_launches(self.arrays["meeting"]) + 1
        if self.settings.exchange is not None:
            tiles = range(self.settings.plan.width)
            exchange, table = self.settings.exchange, self.arrays["table"]
            self.exchanged = [exchanges.launch_of(exchange, table, self.tile(i)) for i in tiles]
        is_last = (self.warpgroup == 0) & (self.split == 0)
        if "ready" in self.smem:
            pl.when(is_last)(self.fetch_rest)

        sums = self.stream.sums(jnp.int32(0))
        if "parts" in self.smem:
            sending.wait_for_all_open()
        for i, partial in enumerate(sums):
            self.stream.leave(i, partial)
            pl.when(self.stream.is_finisher(i))(functools.partial(self.finish, i))
        if self.settings.meets:
            pl.when(self.warpgroup == 0)(self.meet_and_normalize)
        else:
            pl.when(is_last)(wait_until_results_have_left)

    def finish(self, i: int) -> None:
        """What becomes of the sums of this block's i-th tile."""
        self.stream.wait_for_all(i)
        if self.settings.plan.splits > 1:
            self.share_out(i)
        exists = self.tile(i) < self.settings.num_tiles
        pl.when((self.split == 0) & exists)(functools.partial(self.add_residual, i))
        self.stream.let_go(i)

    @property
    def meets_in_memory(self) -> bool:
        return self.settings.meets and not self.settings.interpretable

    def tile(self, i: int) -> Any:
        return self.stream.tile(jnp.int32(0), i)

    def outputs(self, i: int) -> Any:
        """Where the outputs of this block's i-th tile are."""
        return pl.ds(self.tile(i) * TILE, TILE)

    def fetch_rest(self) -> None:
        """Starts copies of what is needed after the products. Past the last tile they are zeros."""
        for i in range(self.settings.plan.width):
            outputs = self.outputs(i)
            if self.settings.has_residual:
                residual = self.arrays["residual"].at[:, outputs]
                plgpu.copy_gmem_to_smem(residual, self.smem["tiles"].at[i], self.smem["ready"])
            for j, column in enumerate(self.arrays["columns"]):
                target = self.smem["columns"].at[i, j]
                plgpu.copy_gmem_to_smem(column.at[outputs], target, self.smem["ready"])

    def share_out(self, i: int) -> None:
        """Brings this block's part of a tile's sums to the cluster's first block. By way of device memory, it returns
        when the whole cluster has."""
        if "parts" in self.smem:
            pl.when(self.split > 0)(lambda: parts.send(self.smem, i, self.split, self.stream.gathered(i)))
            return
        store(self.arrays["partial"].at[self.block, i, self.split], self.stream.gathered(i))
        if not self.settings.interpretable:
            fence_memory()
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem["shared_out"])
        plgpu.barrier_wait(self.smem["shared_out"])

    def sums_of_all(self, i: int) -> Any:
        """Of a tile, those of all blocks that share it: float32 [R, 64], as ROWS."""
        if "shared_out" in self.smem:
            shared = [load(self.arrays["partial"].at[self.block, i, j]) for j in range(self.settings.plan.splits)]
            return sum(shared[1:], shared[0])
        own = self.stream.gathered(i)
        if "parts" not in self.smem:
            return own
        if i == 0:
            sending.wait_for_all_sent(self.smem["parts_there"])
        return parts.add_all(self.smem, i, own)

    def add_residual(self, i: int) -> None:
        """The tile of the new residual, and what the others must know of it."""
        settings = self.settings
        y = self.sums_of_all(i)
        if settings.exchange is not None:
            table, tile, launch = self.arrays["table"], self.tile(i), self.exchanged[i]
            y = exchanges.add_up(settings.exchange, table, y, tile=tile, launch=launch)
        if i == 0 and "ready" in self.smem:
            plgpu.barrier_wait(self.smem["ready"])
        for j in range(settings.num_biases):
            y = y + over_rows(self.column(i, j), y.shape)
        kept = self.smem["tiles"].at[i]
        if settings.has_residual:
            y = y + load(kept).astype(jnp.float32)
        y = y.astype(kept.dtype)
        out = self.arrays["out"].at[:, self.outputs(i)]
        if settings.meets:
            store(kept, y)  # `normalize` reads it
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(kept, out)
        else:
            store(out, y)
        if not settings.num_norms:
            return
        y = y.astype(jnp.float32)
        if not settings.meets:
            self.begin_norms(i, y)
        mean, squares = moments_of_tile(y)
        if self.meets_in_memory:
            number, width = self.launch_number, settings.width
            publish(self.arrays["meeting"], mean, squares, tile=self.tile(i), width=width, launch=number)
        else:
            store(self.arrays["moments"].at[0, :, self.tile(i)], mean)
            store(self.arrays["moments"].at[1, :, self.tile(i)], squares)

    def begin_norms(self, i: int, y: Any) -> None:
        """Writes a tile's rows for each norm as deferred.py has them."""
        num_norms, integers, outputs = self.settings.num_norms, self.settings.integers, self.outputs(i)
        if integers is not None and i > 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before
            plgpu.commit_smem()
        row, copies = number_of(y.shape, 0), []
        for j in range(num_norms):
            scale, shift = (over_rows(column, y.shape) for column in self.affine(i, j))
            scaled = jnp.where(row == SCALE_ROW, scale, jnp.where(row == SHIFT_ROW, shift, y * scale))
            of_norm, dtype = self.arrays["normed"][j], self.arrays["out"].dtype
            if integers is None:
                store(of_norm.at[:, outputs], scaled.astype(dtype))
                continue
            values, blocks = self.smem["normed"].at[j], self.smem["normed_blocks"].at[j]
            store_integers(values, blocks, rounded(scaled, dtype), integers, interpretable=self.settings.interpretable)
            copies += [(values, of_norm.values.at[:, outputs]), (blocks, of_norm.blocks.at[self.tile(i)])]
        if copies:
            plgpu.commit_smem()
        for made, target in copies:
            plgpu.copy_smem_to_gmem(made, target)

    def meet_and_normalize(self) -> None:
        settings = self.settings
        if settings.interpretable:
            plgpu.barrier_arrive(self.smem["met"])
            plgpu.barrier_wait(self.smem["met"])

        @pl.when(self.split == 0)
        def _normalize():
            for first in range(0, settings.num_rows, 8):
                rows = pl.ds(first, 8)
                mean, inverse = self.moments_of_rows(first)
                for i in range(settings.plan.width):
                    exists = self.tile(i) < settings.num_tiles
                    pl.when(exists)(functools.partial(self.normalize, i, rows, mean, inverse))
            if self.meets_in_memory:
                pl.when(self.block == 0)(lambda: end_launch(self.arrays["meeting"], self.launch_number))
            wait_until_results_have_left()

    def moments_of_rows(self, first_row: int) -> tuple[Any, Any]:
        """Mean of 8 rows, and the inverse of their standard deviation."""
        settings = self.settings
        if self.meets_in_memory:
            meeting, number = self.arrays["meeting"], self.launch_number
            means, squares = read(meeting, first_row, width=settings.width, launch=number)
        else:
            means, squares = (load(self.arrays["moments"].at[i, pl.ds(first_row, 8)]) for i in range(2))
        return moments_of_rows(means, squares, settings.width, settings.epsilon)

    def normalize(self, i: int, rows: Any, mean: Any, inverse: Any) -> None:
        """8 rows of one tile, by each norm."""
        y = load(self.smem["tiles"].at[i, rows]).astype(jnp.float32)
        y = (y - over_outputs(mean, y.shape)) * over_outputs(inverse, y.shape)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before
        plgpu.commit_smem()
        for j in range(self.settings.num_norms):
            scale, shift = (over_rows(column, y.shape) for column in self.affine(i, j))
            target = self.smem["normed"].at[j, rows]
            store(target, (y * scale + shift).astype(target.dtype))
        plgpu.commit_smem()
        for j in range(self.settings.num_norms):
            target = self.arrays["normed"][j].at[rows, self.outputs(i)]
            plgpu.copy_smem_to_gmem(self.smem["normed"].at[j, rows], target)

    def affine(self, i: int, j: int) -> tuple[Any, Any]:
        """Scale and shift of norm j for a tile's outputs."""
        first = self.settings.num_biases + 2 * j
        return self.column(i, first), self.column(i, first + 1)

    def column(self, i: int, j: int) -> Any:
        return load(self.smem["columns"].at[i, j], PER_COLUMN).astype(jnp.float32)
