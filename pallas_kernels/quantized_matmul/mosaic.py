"""Products of a few rows with weights for Hopper, several in one launch: Pallas, Mosaic GPU. See stream.py."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.hopper import LOG2E, filled, not_before, rounded, store, wait_until_results_have_left
from pallas_kernels.quantized_matmul.deferred import Moments
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.integers import IntegerRows
from pallas_kernels.quantized_matmul.plan import Plan, input_launch
from pallas_kernels.quantized_matmul.product import Product, rows_read
from pallas_kernels.quantized_matmul.rows import (
    HALF_ROWS,
    ROWS,
    load,
    moments_of_rows,
    over_outputs,
    over_rows,
)
from pallas_kernels.quantized_matmul.stream import Stream, arrays_of, run, scratch, x_of

HALF = TILE // 2


def project_mosaic(
    products: Sequence[Product],
    *,
    moments: Moments | None = None,
    num_sms: int | None = None,
    num_rows: int | None = None,
    plan: Plan | None = None,
) -> list[Float[Array, "_ O"]]:
    """All products, in one launch. Weights of one form, all with as many inputs.

    Rows are a multiple of 8 here: what stands in the last ones may be anything, and makes anything.
    moments: None, or of a layer norm that ends here (deferred.py).
    num_sms: multiprocessors that it may have, None for all.
    num_rows: how many rows mean something, the first ones; None for all.
    """
    num_sms, interpretable = compat.sms_of_a_kernel(num_sms), compat.interpreting()
    num_read = rows_read(products[0].num_rows, num_rows)
    options = {"num_read": num_read, "plan": plan, "num_sms": num_sms, "interpretable": interpretable}
    return _launch(list(products), moments, **options)


@functools.partial(jax.jit, static_argnames=("num_read", "plan", "num_sms", "interpretable"))
def _launch(
    products: list[Product], moments: Moments | None, *, num_read: int, plan: Plan | None, num_sms: int,
    interpretable: bool,
) -> list[Array]:  # fmt: skip
    num_rows, width = products[0].x.shape
    weights, outputs = [product.weight for product in products], [product.num_outputs for product in products]
    integers = products[0].x if isinstance(products[0].x, IntegerRows) else None
    launch = input_launch(weights, outputs, num_rows, num_sms, plan, integers=integers is not None)
    plan = launch.plan
    # Where a result goes into slots, they are an argument that the kernel writes to.
    out_types = [
        jax.ShapeDtypeStruct((num_rows, product.num_outputs), product.out_dtype)
        for product in products
        if product.slots is None
    ]
    inputs = [
        {
            "x": x_of(product.x, num_read),
            "weights": arrays_of(product.weight),
            "bias": product.bias,
            "affine": product.affine,
            "rotary": product.rotary,
            "slots": product.slots and (jax.new_ref(product.slots[0]), product.slots[1]),
        }
        for product in products
    ]
    flat, treedef = jax.tree.flatten((inputs, moments and moments.tiles))

    def body(*refs: Any, smem: dict[str, Any]) -> None:
        (given, tiles), made = treedef.unflatten(refs[: len(flat)]), iter(refs[len(flat) :])
        outs: list[Any] = [next(made) if product.slots is None else None for product in products]
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def make(warpgroup: Any) -> Stream:
            return Stream(
                launch, [g["weights"] for g in given],
                block=block, split=jnp.int32(0), warpgroup=warpgroup,
                xs=[g["x"] for g in given], smem=smem["stream"], in_turn=True, interpretable=interpretable,
            )  # fmt: skip

        def consume(stream: Stream) -> None:
            norm = None if moments is None else Norm(stream, tiles, smem["rows"], width, moments.epsilon)
            stream.begin()
            names = ("tile", "bias", "has_bias", "affine", "has_affine")
            own = {name: smem[name].at[warpgroup] for name in names if name in smem}
            _Epilogue(products, given, outs, own, norm).take_turns(stream)

        run(plan, warpgroup, make, consume)

    dtype, W = products[0].x.dtype, plan.warpgroups
    smem: dict[str, Any] = {"stream": scratch(launch, num_rows, integers=integers)}
    if moments is not None:
        smem["rows"] = plgpu.SMEM((2, num_rows), jnp.float32)
    if any(product.bias is not None for product in products):
        smem |= {"bias": plgpu.SMEM((W, TILE), dtype), "has_bias": plgpu.Barrier(num_barriers=W)}
    if any(product.affine is not None for product in products):
        smem |= {"affine": plgpu.SMEM((W, 2, TILE), jnp.float32), "has_affine": plgpu.Barrier(num_barriers=W)}
    if any(product.slots is not None for product in products):
        smem["tile"] = plgpu.SMEM((W, num_rows, TILE), dtype)
    made = plgpu.kernel(
        body,
        out_type=out_types,
        grid=(launch.num_blocks,),
        grid_names=("block",),
        num_threads=plan.all_warpgroups,
        thread_name="warpgroup",
        kernel_name="project",
        compiler_params=parameters(interpretable),
        scratch_types={"smem": smem},
    )(*flat)
    results = iter(made)
    return [
        next(results) if product.slots is None else jax.freeze(arrays["slots"][0])
        for product, arrays in zip(products, inputs, strict=True)
    ]


class Norm:
    """The end of a layer norm (deferred.py). The first warpgroup puts the moments of rows together, for all.

    What it needs is asked for before any weights, behind which it would come microseconds later, and not used until a
    tile's products have been added up.

    Args:
      stream: the warpgroup's, not begun.
      tiles: moments of the rows' tiles, in device memory.
      smem: [2, R], for each row's mean and inverse standard deviation.
    """

    def __init__(self, stream: Stream, tiles: Any, smem: Any, width: int, epsilon: float):
        self.smem, self.width, self.epsilon = smem, width, epsilon
        self.is_first, self.interpretable = stream.warpgroup == 0, stream.interpretable
        nothing = filled(tiles.shape[1:], 0.0, ROWS)
        self.of_tiles = lax.cond(
            self.is_first, lambda: (load(tiles.at[0]), load(tiles.at[1])), lambda: (nothing, nothing)
        )

    def leave(self, turn: Any) -> None:
        """In the first turn, before the block's warpgroups meet, leaves what `end` reads after that."""

        @pl.when(self.is_first & (turn == 0))
        def _leave():
            means, squares = self.of_tiles if self.interpretable else (not_before(x, ROWS) for x in self.of_tiles)
            for i, of_rows in enumerate(moments_of_rows(means, squares, self.width, self.epsilon)):
                store(self.smem.at[i], of_rows)

    def end(self, y: Any, scale: Any, shift: Any, layout: Any) -> Any:
        """Of products y of rows, and of scale and shift in their place, those of the normalized rows."""
        mean, inverse = (over_outputs(load(self.smem.at[i], layout.reduce(1)), y.shape) for i in range(2))
        return (y - mean * over_rows(scale, y.shape)) * inverse + over_rows(shift, y.shape)


class _Epilogue:
    """What becomes of a warpgroup's tiles.

    Args:
      given, outs: each product's arguments but x, and its result where that goes into no slots, in device memory.
      smem: this warpgroup's. "tile" [R, 64], for one on its way to slots, if any goes there. If any product has a bias,
        "bias" [64], for a tile's, and "has_bias", a barrier for when it is there; in the same way "affine" [2, 64].
      norm: None, or one that ends here.
    """

    def __init__(
        self,
        products: Sequence[Product],
        given: list[dict[str, Any]],
        outs: list[Any],
        smem: dict[str, Any],
        norm: Norm | None,
    ):
        self.products, self.given, self.outs, self.smem, self.norm = products, given, outs, smem, norm
        self.dtype = products[0].x.dtype

    def take_turns(self, stream: Stream) -> None:
        """Makes all tiles of a stream."""

        def take_turn(turn: Any, carry: None) -> None:
            tile = stream.tile(turn, 0)

            def with_own_operand(do: Callable[[Any, int], None]) -> None:
                for k, operand in enumerate(stream.operands):
                    own = tile - operand.first_tile
                    is_own = (own >= 0) & (own < operand.num_tiles)
                    pl.when(is_own)(functools.partial(do, own * TILE, k))

            if "bias" in self.smem or "affine" in self.smem:  # asked for after the products it would be waited for
                pl.when(stream.is_finisher(turn))(lambda: with_own_operand(self._copy_columns))
            [partial] = stream.sums(turn)
            if self.norm is not None:
                self.norm.leave(turn)
            stream.leave(turn, partial)

            @pl.when(stream.is_finisher(turn))
            def _finish_own():
                stream.wait_for_all(turn)
                with_own_operand(functools.partial(self._finish, stream, turn))
                stream.let_go(turn)

            return carry

        lax.fori_loop(0, stream.num_turns, take_turn, None)
        wait_until_results_have_left()

    def _copy_columns(self, first: Any, k: int) -> None:
        """Starts the copies of product k's bias, and of what scale and shift come to, for outputs from `first`."""
        for name in ("bias", "affine"):
            if (columns := self.given[k][name]) is not None:
                plgpu.commit_smem()  # all warps have read the ones before
                outputs = pl.ds(first, TILE)
                source = columns.at[outputs] if name == "bias" else columns.at[:, outputs]
                plgpu.copy_gmem_to_smem(source, self.smem[name], self.smem[f"has_{name}"])

    def _finish(self, stream: Stream, number: Any, first: Any, k: int) -> None:
        """Adds up what all warpgroups have left of a tile, product k's outputs from `first`, and sends it off."""
        product, given = self.products[k], self.given[k]
        part = functools.partial(self._part, stream, number, k)
        for name in ("bias", "affine"):
            if given[name] is not None:
                plgpu.barrier_wait(self.smem[f"has_{name}"])
        if product.rotary is None:
            parts = {(0, TILE): part()}
        else:
            cos, sin = (load(angles, HALF_ROWS).astype(jnp.float32) for angles in given["rotary"])
            one, other = part(0), part(1)
            parts = {(0, HALF): one * cos - other * sin, (HALF, HALF): other * cos + one * sin}
        if product.slots is None:
            for (start, size), y in parts.items():
                store(self.outs[k].at[:, pl.ds(first + start, size)], y.astype(product.out_dtype))
            return
        tile = self.smem["tile"]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # this warpgroup's tile before
        plgpu.commit_smem()
        for (start, size), y in parts.items():
            store(tile.at[:, pl.ds(start, size)], y.astype(self.dtype))
        plgpu.commit_smem()
        outputs, (slots, places) = pl.ds(first, TILE), given["slots"]

        def put(row: Any, carry: None) -> None:
            # A place past the last one is out of bounds, where copies write nothing.
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(row, 1)], slots.at[pl.ds(places[row], 1), outputs])
            return carry

        lax.fori_loop(0, places.shape[0], put, None)

    def _part(self, stream: Stream, number: Any, k: int, half: int | None = None) -> Any:
        """The tile but for its rotation, or a half of it: float32 with the precision of the result."""
        outputs, layout = pl.ds(0, TILE), ROWS
        if half is not None:
            outputs, layout = pl.ds(half * HALF, HALF), HALF_ROWS
        y = stream.gathered(number, half)
        if self.norm is not None:
            if self.given[k]["affine"] is None:
                scale, shift = (stream.gathered(number, half, row) for row in stream.affine_rows)
            else:
                scale, shift = (load(self.smem["affine"].at[i, outputs], layout.reduce(0)) for i in range(2))
            y = self.norm.end(y, scale, shift, layout)
        y = y.astype(self.products[k].out_dtype)
        if self.given[k]["bias"] is not None:
            y = y + over_rows(load(self.smem["bias"].at[outputs], layout.reduce(0)), y.shape)
        y = y.astype(jnp.float32)
        return rounded(gelu(y), self.dtype) if self.products[k].activation == "gelu" else y


def parameters(interpretable: bool) -> Any:
    """Warps meet where the kernels say so. Pallas would let them at every access of shared memory."""
    return plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not interpretable)


def gelu(x: Any) -> Any:
    """x Phi(x) in float32, to 2e-7 |x|: the compiler has no erf.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26.
    """
    size = jnp.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * size)
    sum_of_powers = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        sum_of_powers = sum_of_powers * t + coefficient
    tail = 0.5 * sum_of_powers * t * jnp.exp2(size * size * -LOG2E)  # of the normal distribution, past |x|
    return x * jnp.where(x < 0.0, tail, 1.0 - tail)
