"""The output stage for many rows, one launch: products + residual, and the layer norms of that. Pallas, Mosaic GPU.

Blocks make tiles of the new residual (quantized_matmul/wide_tiles.py) until all are in memory, and meet once. Then
their warpgroups share out the rows, four at a time, a warp each, which it reads out of the GPU's cache: once for the
mean, once for the variance, once to normalize.

All blocks must run at once: there are at most as many as the GPU has multiprocessors. They meet at a counter
(hopper.py), the first element of the array `meeting`, which goes from launch to launch as in mosaic.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.hopper import filled, meet, store
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.mosaic import parameters
from pallas_kernels.quantized_matmul.product import form_of, in_eights
from pallas_kernels.quantized_matmul.stream import arrays_of
from pallas_kernels.quantized_matmul.wide_plan import CONSUMERS, WideLaunch, WidePlan, default_plan
from pallas_kernels.quantized_matmul.wide_tiles import MATRIX, PER_OUTPUT, Tile, Tiles, run, scratch

ROWS_AT_ONCE = 4  # of a warpgroup that normalizes
PIECE, REST = 256, 64  # outputs that a warp reads at once: 16 bytes a thread, or what is left at a row's end
UNROLLED = 4  # pieces that it asks for before it uses the first


def attention_norm_wide(
    xs: Sequence[Float[Array, "R _"]],
    weights: Sequence[Any],
    biases: Sequence[Float[Array, " D"]],
    residual: Float[Array, "R D"],
    norms: Sequence[tuple[Float[Array, " D"], Float[Array, " D"]]],
    meeting: Int[Array, " M"],
    *,
    epsilon: float,
    plan: WidePlan | None = None,
) -> tuple[Float[Array, "R D"], list[Float[Array, "R D"]], Int[Array, " M"]]:
    """`attention_norm` by the kernel for many rows, and the array `meeting` for the next launch.

    Args:
      xs, weights: each [R, I] in bfloat16 with a weight [I, D], all of one form; I and D are multiples of 64. Where R
        is no multiple of 8, they, the residual and the results are copied.
      plan: None for the default one.

    Raises:
      ValueError: a plan that does not suit.
    """
    num_rows, form = residual.shape[0], form_of(weights[0])
    num_sms, interpretable = compat.num_sms(), compat.interpreting()
    if plan is None:
        plan = default_plan(form, num_rows, [residual.shape[1]], 1 if interpretable else num_sms)
    plan.check(form)
    out, normed, meeting = _launch(
        list(xs), list(weights), list(biases), residual, [tuple(norm) for norm in norms], meeting,
        epsilon=epsilon, plan=plan, num_sms=num_sms, interpretable=interpretable,
    )  # fmt: skip
    if num_rows % 8:
        out, normed = out[:num_rows], [y[:num_rows] for y in normed]
    return out, normed, meeting


@functools.partial(jax.jit, static_argnames=("epsilon", "plan", "num_sms", "interpretable"))
def _launch(
    xs, weights, biases, residual, norms, meeting, *, epsilon: float, plan: WidePlan, num_sms: int, interpretable: bool
):
    inputs = {
        "xs": [in_eights(x) for x in xs],
        "weights": [arrays_of(weight) for weight in weights],
        "biases": biases,
        "residual": in_eights(residual),
        "norms": norms,
    }
    num_rows, width = inputs["residual"].shape
    form, num_inputs = form_of(weights[0]), tuple(x.shape[1] for x in xs)
    launch = WideLaunch(form, num_rows, num_inputs, (width,), plan, num_sms)
    if not interpretable:
        inputs["meeting"] = jax.new_ref(meeting)
    rows = jax.ShapeDtypeStruct((num_rows, width), residual.dtype)
    given, treedef = jax.tree.flatten(inputs)
    made, made_treedef = jax.tree.flatten({"out": rows, "normed": [rows] * len(norms)})
    settings = _Settings(launch, epsilon, interpretable)

    def body(*refs: Any, smem: dict[str, Any]) -> None:
        arrays = treedef.unflatten(refs[: len(given)]) | made_treedef.unflatten(refs[len(given) :])
        rank = jnp.int32(0) if plan.cluster == 1 else lax.axis_index("rank")

        def make_tiles() -> Tiles:
            return Tiles(launch, arrays["xs"], arrays["weights"], smem, rank=rank, interpretable=interpretable)

        run(make_tiles, lambda warpgroup: _Warpgroup(settings, arrays, smem, make_tiles(), warpgroup).run())

    smem = scratch(launch, interpretable=interpretable)
    smem["residual_there"] = plgpu.Barrier(num_barriers=CONSUMERS)
    if interpretable:  # where blocks cannot meet at a counter
        smem["met"] = plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=CONSUMERS)
        blocks = {"cluster": (launch.num_clusters,), "cluster_names": ("block",)}
    else:
        blocks = {"grid": (launch.num_clusters,), "grid_names": ("block",)}
        if plan.cluster > 1:
            blocks |= {"cluster": (plan.cluster,), "cluster_names": ("rank",)}
    results = plgpu.kernel(
        body,
        out_type=made,
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="attention_norm_wide",
        compiler_params=parameters(interpretable),
        scratch_types={"smem": smem},
        **blocks,
    )(*given)
    results = made_treedef.unflatten(results)
    if not interpretable:
        meeting = jax.freeze(inputs["meeting"])
    return results["out"], results["normed"], meeting


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a kernel is compiled for."""

    launch: WideLaunch
    epsilon: float
    interpretable: bool


class _Warpgroup:
    """One of those of a block that multiply."""

    def __init__(self, settings: _Settings, arrays: dict[str, Any], smem: dict[str, Any], tiles: Tiles, warpgroup: Any):
        self.settings, self.arrays, self.smem, self.tiles, self.warpgroup = settings, arrays, smem, tiles, warpgroup
        self.num_rows, self.width = arrays["residual"].shape
        block = tiles.cluster * settings.launch.plan.cluster + tiles.rank
        self.index, self.count = block * CONSUMERS + warpgroup, settings.launch.num_blocks * CONSUMERS

    def run(self) -> None:
        def take_turn(turn: Any, slot: Any) -> Any:
            y, slot = self.tiles.accumulate(self.warpgroup, slot)
            tile = self.tiles.tile(turn)
            output = self.tiles.own_output(tile, 0, self.warpgroup)
            pl.when(output < self.width)(functools.partial(self.add_residual, tile, output, y))
            return slot

        lax.fori_loop(0, self.tiles.num_turns, take_turn, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        if self.settings.interpretable:
            plgpu.barrier_arrive(self.smem["met"])
            plgpu.barrier_wait(self.smem["met"])
        else:
            meet(self.arrays["meeting"], 0, self.index, self.count)
        groups = self.num_rows // ROWS_AT_ONCE
        num_turns = lax.div(jnp.int32(groups - 1 + self.count) - self.index, jnp.int32(self.count))

        def normalize(turn: Any, carry: None) -> None:
            self.normalize(pl.ds((self.index + turn * self.count) * ROWS_AT_ONCE, ROWS_AT_ONCE))
            return carry

        lax.fori_loop(0, num_turns, normalize, None)

    def add_residual(self, tile: Tile, output: Any, y: Any) -> None:
        """y: what the products come to, [64 outputs, rows]."""
        rows_out, first_row = self.settings.launch.plan.rows_out, self.tiles.own_row(tile, self.warpgroup)
        there = self.smem["residual_there"].at[self.warpgroup]
        outputs = pl.ds(output, TILE)
        biases = [plgpu.load(bias.at[outputs], layout=PER_OUTPUT, optimized=False) for bias in self.arrays["biases"]]
        bias = sum(b.astype(jnp.float32) for b in biases)

        def rows(part: int) -> Any:
            return pl.ds(first_row + part * rows_out, rows_out)

        def prepare(part: int, buffer: Any) -> None:
            plgpu.copy_gmem_to_smem(self.arrays["residual"].at[rows(part), outputs], buffer, there)

        def make(_: int, y: Any, target: Any) -> None:
            if biases:
                y = y + lax.broadcast_in_dim(bias, y.shape, [0])
            plgpu.barrier_wait(there)
            y = y + plgpu.load(target, layout=MATRIX).astype(jnp.float32)
            store(target, y.astype(target.dtype))

        def copy(part: int, buffer: Any) -> None:
            plgpu.copy_smem_to_gmem(buffer, self.arrays["out"].at[rows(part), outputs])

        self.tiles.send(self.warpgroup, y, make, copy, prepare=prepare)

    def normalize(self, rows: Any) -> None:
        """Four rows, by each norm: as `reference.layer_norm` does."""
        out, inverse_width = self.arrays["out"], 1.0 / self.width

        def load(start: Any, size: int) -> Any:
            y = plgpu.load(out.at[rows, pl.ds(start, size)], layout=_layout(size), optimized=False)
            return y.astype(jnp.float32)

        def total(of: Callable[[Any], Any]) -> Any:
            """of(y), added up over the whole rows."""
            start = filled((ROWS_AT_ONCE, PIECE), 0.0, _layout(PIECE))
            sums, rests = self.each_piece(lambda start, size: of(load(start, size)), start)
            added = sums.sum(axis=1)
            for rest in rests:
                added = added + plgpu.layout_cast(rest.sum(axis=1), _layout(PIECE).reduce(1))
            return added

        mean = total(lambda y: y) * inverse_width

        def squared_distance(y: Any) -> Any:
            distance = y - _over_outputs(mean, y.shape)
            return distance * distance

        inverse = lax.rsqrt(total(squared_distance) * inverse_width + self.settings.epsilon)

        def write(start: Any, size: int) -> Any:
            layout, outputs = _layout(size), pl.ds(start, size)
            y = load(start, size)
            y = (y - _over_outputs(mean, y.shape)) * _over_outputs(inverse, y.shape)
            for norm, normed in zip(self.arrays["norms"], self.arrays["normed"], strict=True):
                scale, shift = (
                    plgpu.load(array.at[outputs], layout=layout.reduce(0), optimized=False).astype(jnp.float32)
                    for array in norm
                )
                made = y * lax.broadcast_in_dim(scale, y.shape, [1]) + lax.broadcast_in_dim(shift, y.shape, [1])
                store(normed.at[rows, outputs], made.astype(normed.dtype))
            return None

        self.each_piece(write, None)

    def each_piece(self, of: Callable[[Any, int], Any], start: Any) -> tuple[Any, list[Any]]:
        """Calls of(first output, how many) all along a row.

        Returns:
          `start` + what it makes of whole pieces, where it makes anything; and what it makes of each rest.
        """

        def pieces(first: Any, count: int, total: Any) -> Any:
            made = [of(first + i * PIECE, PIECE) for i in range(count)]
            return None if total is None else sum(made, total)

        whole = self.width // PIECE
        total = lax.fori_loop(
            0, whole // UNROLLED, lambda i, total: pieces(i * (UNROLLED * PIECE), UNROLLED, total), start
        )
        total = pieces(whole // UNROLLED * UNROLLED * PIECE, whole % UNROLLED, total)
        return total, [of(first, REST) for first in range(whole * PIECE, self.width, REST)]


def _layout(size: int) -> Any:
    """[4 rows, size]: a warp has a row, a thread some neighbouring outputs."""
    tiling = plgpu.Tiling(((ROWS_AT_ONCE, size), (size // 32,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _over_outputs(x: Any, dims: tuple[int, ...]) -> Any:
    """A value a row, repeated over the outputs."""
    layout = _layout(dims[1]).reduce(1)
    return lax.broadcast_in_dim(plgpu.layout_cast(x, layout), dims, [0])
