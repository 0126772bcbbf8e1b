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
from pallas_kernels.hopper import LOG2E
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.product import Product, form_of
from pallas_kernels.quantized_matmul.stream import (
    ROWS,
    Operand,
    Plan,
    Stream,
    arrays_of,
    fitting_plan,
    run,
    scratch,
)


def project_mosaic(products: Sequence[Product], *, plan: Plan | None = None) -> list[Float[Array, "R O"]]:
    """All products, in one launch. Weights of one form, all with as many inputs.

    Rows are a multiple of 8 here: what stands in the last ones may be anything, and makes anything.
    """
    if plan is None:
        num_rows = products[0].x.shape[0]
        available = compat.MAX_SMEM_BYTES - 1024 - 4 * num_rows * TILE * 2  # tiles on their way out
        form = form_of(products[0].weight)
        # Of three forms int4 alone gains by a producer, a quarter: the rest waits for memory in any case.
        plan = fitting_plan(form, num_rows, available, producer=form == "int4")
    return _launch(list(products), plan=plan, num_sms=compat.num_sms(), interpretable=compat.interpreting())


@functools.partial(jax.jit, static_argnames=("plan", "num_sms", "interpretable"))
def _launch(products: list[Product], *, plan: Plan, num_sms: int, interpretable: bool) -> list[Array]:
    num_rows, num_inputs = products[0].x.shape
    operands, num_tiles = [], 0
    for product in products:
        operands.append(Operand(form_of(product.weight), num_inputs, product.num_outputs, num_tiles))
        num_tiles += operands[-1].num_tiles
    num_blocks = min(num_sms, -(-num_tiles // plan.width))
    out_types = [jax.ShapeDtypeStruct((num_rows, product.num_outputs), product.x.dtype) for product in products]
    inputs = [[product.x, product.bias, *arrays_of(product.weight)] for product in products]
    flat, treedef = jax.tree.flatten(inputs)

    def body(*refs: Any, smem: dict[str, Any], out_smem: Any) -> None:
        given, outs = treedef.unflatten(refs[: len(flat)]), refs[len(flat) :]
        xs, biases, weights = [g[0] for g in given], [g[1] for g in given], [g[2:] for g in given]
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def make(warpgroup: Any) -> Stream:
            return Stream(
                operands, xs, weights, smem, plan,
                warpgroup=warpgroup,
                block=(block, num_blocks),
                share=(warpgroup, plan.warpgroups),
                interpretable=interpretable,
            )  # fmt: skip

        def finish(stream: Stream, number: Any, tile: Any, k: int) -> None:
            own_smem = out_smem.at[warpgroup]
            y = stream.gathered(number).astype(own_smem.dtype)
            outputs = pl.ds((tile - operands[k].first_tile) * TILE, TILE)
            if biases[k] is not None:
                bias = plgpu.load(biases[k].at[outputs], layout=ROWS.reduce(0), optimized=False)
                y = y + lax.broadcast_in_dim(bias, y.shape, [1])
            if products[k].activation == "gelu":
                y = gelu(y.astype(jnp.float32)).astype(y.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # this warpgroup's tile before
            plgpu.commit_smem()
            own_smem[...] = y
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_smem, outs[k].at[:, outputs])

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

    return plgpu.kernel(
        body,
        out_type=out_types,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=plan.all_warpgroups,
        thread_name="warpgroup",
        kernel_name="project",
        compiler_params=parameters(interpretable),
        scratch_types={
            "smem": scratch(operands[0], plan, num_rows),
            "out_smem": plgpu.SMEM((plan.warpgroups, num_rows, TILE), products[0].x.dtype),
        },
    )(*flat)


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
