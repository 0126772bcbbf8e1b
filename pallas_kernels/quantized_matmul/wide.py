"""Products of many rows with weights for Hopper, several in one launch: Pallas, Mosaic GPU. See wide_tiles.py."""

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
from pallas_kernels.hopper import store
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.mosaic import gelu, parameters
from pallas_kernels.quantized_matmul.product import Product, form_of, in_eights
from pallas_kernels.quantized_matmul.stream import arrays_of
from pallas_kernels.quantized_matmul.wide_plan import CONSUMERS, WideLaunch, WidePlan, default_plan
from pallas_kernels.quantized_matmul.wide_tiles import PER_OUTPUT, Tile, Tiles, run, scratch


def project_wide(products: Sequence[Product], *, plan: WidePlan | None = None) -> list[Float[Array, "R O"]]:
    """All products activation(x @ weight + bias), in one launch.

    Args:
      products: with x [R, I] of one shape in bfloat16 and weights of one form; I and O are multiples of 64. Where R is
        no multiple of 8, x and the results are copied.
      plan: None for the default one.

    Raises:
      ValueError: a plan that does not suit, or a product with `rotary` or `slots`, which are for a few rows.
    """
    if any(product.rotary is not None or product.slots is not None for product in products):
        raise ValueError("project_wide neither rotates nor fills slots")
    num_rows, form = products[0].x.shape[0], form_of(products[0].weight)
    num_sms, interpretable = compat.num_sms(), compat.interpreting()
    if plan is None:
        outputs = [product.num_outputs for product in products]
        plan = default_plan(form, num_rows, outputs, 1 if interpretable else num_sms)
    plan.check(form)
    made = _launch(list(products), plan=plan, num_sms=num_sms, interpretable=interpretable)
    return [y[:num_rows] for y in made] if num_rows % 8 else made


@functools.partial(jax.jit, static_argnames=("plan", "num_sms", "interpretable"))
def _launch(products: list[Product], *, plan: WidePlan, num_sms: int, interpretable: bool) -> list[Array]:
    xs = {id(product.x): in_eights(product.x) for product in products}  # one x of several products stays one
    num_rows = next(iter(xs.values())).shape[0]
    launch = WideLaunch(
        form_of(products[0].weight),
        num_rows,
        tuple(product.x.shape[1] for product in products),
        tuple(product.num_outputs for product in products),
        plan,
        num_sms,
    )
    given, treedef = jax.tree.flatten(
        {
            "xs": [xs[id(product.x)] for product in products],
            "weights": [arrays_of(product.weight) for product in products],
            "biases": [product.bias for product in products],
        }
    )
    activations = [product.activation for product in products]
    has_biases = any(product.bias is not None for product in products)
    smem_types = scratch(launch, interpretable=interpretable)
    if has_biases:
        smem_types["bias"] = plgpu.SMEM((CONSUMERS, TILE), jnp.bfloat16)

    def body(*refs: Any, smem: dict[str, Any]) -> None:
        arrays, outs = treedef.unflatten(refs[: len(given)]), refs[len(given) :]
        rank = jnp.int32(0) if plan.cluster == 1 else lax.axis_index("rank")

        def make_tiles() -> Tiles:
            return Tiles(launch, arrays["xs"], arrays["weights"], smem, rank=rank, interpretable=interpretable)

        def finish(tiles: Tiles, tile: Tile, warpgroup: Any, y: Any) -> None:
            bias = load_bias(tiles, tile, warpgroup) if has_biases else None
            is_gelu = functools.reduce(
                jnp.logical_or, [tiles.is_of(tile, k) for k, name in enumerate(activations) if name], jnp.bool(False)
            )

            def make(_: int, y: Any, target: Any) -> None:
                y = y.astype(target.dtype)
                if bias is not None:
                    y = y + lax.broadcast_in_dim(bias, y.shape, [0])

                def activated() -> None:
                    store(target, gelu(y.astype(jnp.float32)).astype(y.dtype))

                if all(activations):
                    activated()
                elif any(activations):
                    pl.when(is_gelu)(activated)
                    pl.when(jnp.logical_not(is_gelu))(lambda: store(target, y))
                else:
                    store(target, y)

            def copy(part: int, buffer: Any) -> None:
                rows = pl.ds(tiles.own_row(tile, warpgroup) + part * plan.rows_out, plan.rows_out)
                for k, out in enumerate(outs):
                    output = tiles.own_output(tile, k, warpgroup)
                    put = functools.partial(plgpu.copy_smem_to_gmem, buffer, out.at[rows, pl.ds(output, TILE)])
                    # The trap: copies leave out what lies past an array's end, but not where a single tile of outputs
                    # is all it has (one key head's): Mosaic drops an axis of length one together with its index.
                    pl.when(tiles.is_of(tile, k) & (output < products[k].num_outputs))(put)

            tiles.send(warpgroup, y, make, copy)

        def load_bias(tiles: Tiles, tile: Tile, warpgroup: Any) -> Any:
            """bfloat16 [64 outputs]. By way of shared memory, which branches can write to."""
            own = smem["bias"].at[warpgroup]
            store(own, plgpu.layout_cast(jnp.zeros(TILE, own.dtype), PER_OUTPUT))
            for k, bias in enumerate(arrays["biases"]):
                if bias is None:
                    continue
                output = tiles.own_output(tile, k, warpgroup)

                def fill(bias: Any = bias, output: Any = output) -> None:
                    store(own, plgpu.load(bias.at[pl.ds(output, TILE)], layout=PER_OUTPUT, optimized=False))

                pl.when(tiles.is_of(tile, k) & (output < products[k].num_outputs))(fill)
            return plgpu.load(own, layout=PER_OUTPUT, optimized=False)

        def consume(warpgroup: Any) -> None:
            tiles = make_tiles()

            def take_turn(turn: Any, slot: Any) -> Any:
                y, slot = tiles.accumulate(warpgroup, slot)
                finish(tiles, tiles.tile(turn), warpgroup, y)
                return slot

            lax.fori_loop(0, tiles.num_turns, take_turn, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        run(make_tiles, consume)

    made = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((num_rows, product.num_outputs), jnp.bfloat16) for product in products],
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="project_wide",
        compiler_params=parameters(interpretable),
        scratch_types={"smem": smem_types},
        grid=(launch.num_clusters,),
        grid_names=("block",),
        **({} if plan.cluster == 1 else {"cluster": (plan.cluster,), "cluster_names": ("rank",)}),
    )(*given)
    return list(made)
