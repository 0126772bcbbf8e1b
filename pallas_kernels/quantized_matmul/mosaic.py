"""Products of a few rows with weights for Hopper, several in one launch: Pallas, Mosaic GPU. See stream.py."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.hopper import LOG2E, store
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.plan import Plan, input_launch
from pallas_kernels.quantized_matmul.product import Product
from pallas_kernels.quantized_matmul.stream import HALF_ROWS, ROWS, Stream, arrays_of, run, scratch


def project_mosaic(products: Sequence[Product], *, plan: Plan | None = None) -> list[Float[Array, "_ O"]]:
    """All products, in one launch. Weights of one form, all with as many inputs.

    Rows are a multiple of 8 here: what stands in the last ones may be anything, and makes anything.
    """
    interpretable = compat.interpreting()
    return _launch(list(products), plan=plan, num_sms=compat.num_sms(), interpretable=interpretable)


@functools.partial(jax.jit, static_argnames=("plan", "num_sms", "interpretable"))
def _launch(products: list[Product], *, plan: Plan | None, num_sms: int, interpretable: bool) -> list[Array]:
    num_rows = products[0].x.shape[0]
    weights, outputs = [product.weight for product in products], [product.num_outputs for product in products]
    launch = input_launch(weights, outputs, num_rows, num_sms, plan)
    plan, operands = launch.plan, launch.operands
    # Where a result goes into slots, they are an argument that the kernel writes to.
    out_types = [
        jax.ShapeDtypeStruct((num_rows, product.num_outputs), product.x.dtype)
        for product in products
        if product.slots is None
    ]
    inputs = {
        "products": [
            {
                "x": product.x,
                "weights": arrays_of(product.weight),
                "bias": product.bias,
                "rotary": product.rotary,
                "slots": product.slots and (jax.new_ref(product.slots[0]), product.slots[1]),
            }
            for product in products
        ],
    }
    flat, treedef = jax.tree.flatten(inputs)

    def body(*refs: Any, smem: dict[str, Any], out_smem: Any) -> None:
        arrays, made = treedef.unflatten(refs[: len(flat)]), iter(refs[len(flat) :])
        given = arrays["products"]
        outs: list[Any] = [next(made) if product.slots is None else None for product in products]
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def make(warpgroup: Any) -> Stream:
            return Stream(
                launch, [g["weights"] for g in given],
                block=block, split=jnp.int32(0), warpgroup=warpgroup,
                xs=[g["x"] for g in given], smem=smem, interpretable=interpretable,
            )  # fmt: skip

        def finish(stream: Stream, number: Any, tile: Any, k: int) -> None:
            """Adds up what all warpgroups have left of a tile, and sends it off."""
            own_smem, product, arrays = out_smem.at[warpgroup], products[k], given[k]
            first = (tile - operands[k].first_tile) * TILE

            def part(half: int | None = None) -> Any:
                """The tile as float32 of its own dtype's precision, or a half of it."""
                y = stream.gathered(number, half).astype(own_smem.dtype)
                if arrays["bias"] is not None:
                    outputs, layout = pl.ds(first, TILE), ROWS
                    if half is not None:
                        outputs, layout = pl.ds(first + half * TILE // 2, TILE // 2), HALF_ROWS
                    bias = plgpu.load(arrays["bias"].at[outputs], layout=layout.reduce(0), optimized=False)
                    y = y + lax.broadcast_in_dim(bias, y.shape, [1])
                y = y.astype(jnp.float32)
                return gelu(y).astype(own_smem.dtype).astype(jnp.float32) if product.activation == "gelu" else y

            if product.rotary is None:
                parts = {(0, TILE): part()}
            else:
                cos, sin = (
                    plgpu.load(angles, layout=HALF_ROWS, optimized=False).astype(jnp.float32)
                    for angles in arrays["rotary"]
                )
                one, other = part(0), part(1)
                parts = {
                    (0, TILE // 2): one * cos - other * sin,
                    (TILE // 2, TILE // 2): other * cos + one * sin,
                }
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # this warpgroup's tile before
            plgpu.commit_smem()
            for (start, size), y in parts.items():
                store(own_smem.at[:, pl.ds(start, size)], y.astype(own_smem.dtype))
            plgpu.commit_smem()
            outputs = pl.ds(first, TILE)
            if product.slots is None:
                plgpu.copy_smem_to_gmem(own_smem, outs[k].at[:, outputs])
                return
            slots, places = arrays["slots"]

            def put(row: Any, carry: None) -> None:
                plgpu.copy_smem_to_gmem(own_smem.at[pl.ds(row, 1)], slots.at[pl.ds(places[row], 1), outputs])
                return carry

            lax.fori_loop(0, places.shape[0], put, None)

        def consume(stream: Stream) -> None:
            stream.begin()

            def take_turn(turn: Any, carry: None) -> None:
                [partial] = stream.sums(turn)
                tile = stream.tile(turn, 0)
                stream.gather(turn, partial)
                # Each in its turn, while the others go on.
                is_mine = lax.rem(turn, jnp.int32(plan.warpgroups)) == warpgroup
                for k, operand in enumerate(operands):
                    is_own = (tile >= operand.first_tile) & (tile < operand.first_tile + operand.num_tiles)
                    pl.when(is_mine & is_own)(functools.partial(finish, stream, turn, tile, k))
                return carry

            lax.fori_loop(0, stream.num_turns, take_turn, None)
            plgpu.wait_smem_to_gmem(0)

        run(plan, warpgroup, make, consume)

    made = plgpu.kernel(
        body,
        out_type=out_types,
        grid=(launch.num_blocks,),
        grid_names=("block",),
        num_threads=plan.all_warpgroups,
        thread_name="warpgroup",
        kernel_name="project",
        compiler_params=parameters(interpretable),
        scratch_types={
            "smem": scratch(launch, num_rows),
            "out_smem": plgpu.SMEM((plan.warpgroups, num_rows, TILE), products[0].x.dtype),
        },
    )(*flat)
    results = iter(made)
    return [
        next(results) if product.slots is None else jax.freeze(arrays["slots"][0])
        for product, arrays in zip(products, inputs["products"], strict=True)
    ]


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
