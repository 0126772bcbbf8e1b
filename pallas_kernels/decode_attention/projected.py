"""Queries, keys and values of a new token, and its attention, in one launch, where each query head has keys of its own.

A cluster of blocks has one head. Its warpgroups share out the inputs of the head's three projections, as an input
stage does (quantized_matmul/stream.py). Of each one block adds up, ends the layer norm and sends query, key or value to
all (newest.py), while the products of the next one go on. Then they attend as decode attention does (mosaic.py). A tile
of keys and one of values take as much shared memory as a chunk of weights, and the first of them are on their way as
soon as the last chunks make room. So memory is read all the time, where two launches let it wait for some microseconds
between them.

Who has the tile of the new key or value puts it there, and into the cache, when both have come.
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

from pallas_kernels import arguments, compat, sending
from pallas_kernels.decode_attention import mosaic, newest
from pallas_kernels.decode_attention.cluster import MATRIX, Exchange
from pallas_kernels.decode_attention.mosaic import QUERIES, Settings, Warpgroup
from pallas_kernels.decode_attention.newest import HEAD, MAX_BLOCKS, NAMES, PER_OUTPUT
from pallas_kernels.decode_attention.plan import Plan, Shape, default_plan
from pallas_kernels.hopper import not_before, rounded, store
from pallas_kernels.quantized_matmul import plan as product_plan
from pallas_kernels.quantized_matmul.deferred import SCALE_ROW, SHIFT_ROW, Moments, reason_against_kernel
from pallas_kernels.quantized_matmul.mosaic import Norm, parameters
from pallas_kernels.quantized_matmul.product import Product, form_of, reason_against_products
from pallas_kernels.quantized_matmul.rows import load, over_rows
from pallas_kernels.quantized_matmul.stream import Stream, arrays_of, scratch

# Blocks of a cluster: with one there is nothing to gain, and what more than four send one another takes much room.
MIN_SPLITS, MAX_SPLITS = 2, MAX_BLOCKS
# Of a cluster multiprocessors lie together, in twos always. A GPU has not as many fours as a fourth of its
# multiprocessors, so that some clusters of four would come second, did not two blocks fit on one: with half the stages.
PAIR = 2
WARPGROUPS, STAGES_OF_PAIRS, STAGES = 2, 4, 2
TILE_KEYS = 64


def attend_projected(
    products: Sequence[Product],
    moments: Moments,
    keys: Float[Array, "1 S K 64"],
    values: Float[Array, "1 S K 64"],
    lengths: Int[Array, " 1"],
    places: Int[Array, " 1"],
    *,
    slopes: Float[Array, " K"] | None,
    alibi: str,
    scale: float | None = None,
    plan: Plan | None = None,
) -> tuple[Float[Array, "8 D"], Float[Array, "1 S K 64"], Float[Array, "1 S K 64"]]:
    """One token's attention, by the kernel.

    Args:
      products: of queries, keys and values: x [8, I] for a deferred norm, the same in all, with K x 64 outputs each.
      moments: of that norm.
      keys, values: the cache, with room for the new ones.
      lengths: of the row, the new token counted in; 0 attends to nothing.
      places: the slot of the new key and value, the last that `lengths` counts; one past the last slot for none.
      slopes, alibi, scale: as of `decode_attention`.
      plan: how it attends, None for the tuned one.

    Returns:
      Attention's output, of whose rows the first means something; and the cache with the new key and value.

    Raises:
      ValueError: what `reason_against` names.
    """
    if (reason := reason_against(products, keys, plan)) is not None:
        raise ValueError(f"attend_projected: {reason}")
    if scale is None:
        scale = arguments.default_scale(keys)
    return _launch(
        list(products), moments, keys, values, lengths, places, slopes,
        alibi=alibi, scale=scale, plan=plan or _plan(keys.shape), interpretable=compat.interpreting(),
    )  # fmt: skip


def reason_against(products: Sequence[Product], keys: Float[Array, "B S K H"], plan: Plan | None = None) -> str | None:
    """Why the kernel cannot take such products and a cache with such keys, or does not pay; None where it does."""
    B, _, K, H = keys.shape
    if (reason := compat.mosaic_reason() or reason_against_kernel() or reason_against_products(products)) is not None:
        return reason
    if B != 1 or H != HEAD or any(product.num_outputs != K * H for product in products):
        outputs = [product.num_outputs for product in products]
        return f"it takes one row of {K} heads of {HEAD} throughout, not {B} rows of {outputs} outputs, heads of {H}"
    if (dtype := products[0].x.dtype) != keys.dtype:
        return f"it takes one dtype throughout, not products in {dtype} with keys in {keys.dtype}"
    if (reason := mosaic.reason_against(keys[:, 0], keys, arguments.default_scale(keys))) is not None:
        return reason
    if any(form_of(product.weight) != "native" for product in products):
        return "it takes weights of 16 bits"  # of fewer a chunk takes another place than keys and values
    if any(product.rotary is not None or product.activation is not None for product in products):
        return "it neither rotates nor activates"
    plan = plan or _plan(keys.shape)
    if compat.interpreting():
        return None if plan.num_streams == 1 else "interpreted blocks have no words for one another"
    if plan.meeting != "cluster" or not MIN_SPLITS <= plan.splits <= MAX_SPLITS or plan.splits * K > compat.num_sms():
        return f"{K} heads of such a cache are no clusters of {MIN_SPLITS} to {MAX_SPLITS} blocks that run at once"
    return None


def _plan(cache_shape: tuple[int, ...]) -> Plan:
    if compat.interpreting():  # which has no words for what blocks send one another
        return Plan(TILE_KEYS, 1, STAGES, 1)
    B, S, K, H = cache_shape
    plan = default_plan(Shape(B, K, 1, H, S), compat.num_sms())
    stages = STAGES if plan.splits > PAIR else STAGES_OF_PAIRS
    return dataclasses.replace(plan, keys=TILE_KEYS, warpgroups=WARPGROUPS, stages=stages)


@functools.partial(jax.jit, static_argnames=("alibi", "scale", "plan", "interpretable"))
def _launch(
    products, moments, keys, values, lengths, places, slopes,
    *, alibi: str, scale: float, plan: Plan, interpretable: bool,
):  # fmt: skip
    num_rows = products[0].x.shape[0]
    _, S, K, H = keys.shape
    shape = Shape(1, K, 1, H, S)
    exchange = None if interpretable else shape.exchange(plan)
    launch = _product_launch(products, shape, plan)
    refs = jax.new_ref(keys), jax.new_ref(values)
    inputs = {
        "x": products[0].x,
        "weights": [arrays_of(product.weight) for product in products],
        "biases": [product.bias for product in products],
        "moments": moments.tiles,
        "k": refs[0],
        "v": refs[1],
        "lengths": lengths,
        "places": places,
        "slopes": slopes,
    }
    flat, treedef = jax.tree.flatten(inputs)
    settings = Settings(shape, plan, exchange, alibi, scale, interpretable)

    def body(*given: Any, **smem: Any) -> None:
        arrays = treedef.unflatten(given[:-1]) | {"out": given[-1]}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        _Warpgroup(settings, arrays, smem, launch, moments.epsilon).run()

    scratch_types = mosaic.buffers(shape, plan, keys.dtype, interpretable) | newest.buffers(plan.num_streams)
    scratch_types["products"] = scratch(launch, num_rows, leaves=False)
    scratch_types["row_smem"] = plgpu.SMEM((2, num_rows), jnp.float32)
    if exchange is None:
        scratch_types["plain_smem"] = mosaic.plain_queries(shape, plan, keys.dtype)
    else:
        scratch_types["exchange"] = exchange.buffers()
    blocks = {"grid": (1, K), "grid_names": ("row", "kv"), "cluster": (plan.splits,), "cluster_names": ("split",)}
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, K, 1, 1, H), keys.dtype),
        scratch_types=scratch_types,
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        kernel_name="attend_projected",
        compiler_params=parameters(interpretable),
        **blocks,
    )(*flat)
    return out.reshape(num_rows, K * H), jax.freeze(refs[0]), jax.freeze(refs[1])


def _product_launch(products: Sequence[Product], shape: Shape, plan: Plan) -> product_plan.Launch:
    """Block k of a cluster, with all its warpgroups, makes tile k of each product."""
    operands = tuple(
        product_plan.Operand("native", product.x.shape[1], product.num_outputs, i * shape.K)
        for i, product in enumerate(products)
    )
    of_products = product_plan.Plan(plan.warpgroups, plan.stages, splits=plan.splits)
    return product_plan.Launch(operands, of_products, shape.K)


class _Stream(Stream):
    """Weights of the projections, after which something else comes into the same shared memory."""

    follow: Callable[[Any], None] | None = None

    def be_followed(self, follow: Callable[[Any], None]) -> None:
        """Once begun. follow: starts the copies of the n-th of what comes after the weights, if there is one."""
        self.follow = follow
        at_least = len(self.operands) * (self.operands[0].num_chunks(self.plan) // self.num_shares)
        for n in range(at_least, self.plan.stages):
            pl.when(n >= self.total)(functools.partial(follow, n - self.total))

    def _copy(self, n: Any) -> None:
        super()._copy(n)
        if (follow := self.follow) is not None:
            pl.when(n >= self.total)(lambda: follow(n - self.total))


class _Warpgroup(Warpgroup):
    """One warpgroup of a block.

    Whatever else it needs of device memory is asked for before any weights, behind which it would come microseconds
    later.
    """

    def __init__(self, settings: Settings, arrays: dict[str, Any], smem: dict[str, Any], launch: Any, epsilon: float):
        super().__init__(settings, arrays, smem)
        self.products = _Stream(
            launch, arrays["weights"], block=self.pair, split=self.split, warpgroup=self.index,
            xs=[arrays["x"]] * len(NAMES), smem=smem["products"], in_turn=False,
            interpretable=settings.interpretable,
        )  # fmt: skip
        self.norm = Norm(self.products, arrays["moments"], smem["row_smem"], arrays["x"].shape[1], epsilon)
        outputs = pl.ds(self.pair * HEAD, HEAD)
        self.biases = [None if bias is None else load(bias.at[outputs], PER_OUTPUT) for bias in arrays["biases"]]
        self.length_and_place = arrays["lengths"][0], arrays["places"][0]

    def run(self) -> None:
        self.products.begin()
        self.open()
        length, self.place = self.length_and_place
        if not self.settings.interpretable:
            length, self.place = not_before(length), not_before(self.place)
        length = jnp.minimum(length, self.shape.capacity)
        num_mine = self.num_mine(length)
        self.products.be_followed(lambda n: pl.when(n < num_mine)(lambda: self.copy_tile(n, length)))
        totals: list[Any] = []
        for which in range(len(NAMES)):
            totals += self.products.sums(jnp.int32(which))
            if which == 0:
                self.norm.leave(jnp.int32(0))
            if not self.settings.interpretable:
                if which == 0:
                    sending.wait_for_all_open()
                share = self.split * self.plan.warpgroups + self.index
                newest.send_part(self.smem, which, share, totals[which], block=self.finisher(which))
            if which > 0:  # those before have been on their way for as long as these took
                self.finish_product(which - 1, totals[which - 1])
        self.finish_product(len(NAMES) - 1, totals[-1])
        self.take_queries()
        self.end(length, num_mine)
        if not self.settings.interpretable:
            for which in range(1, len(NAMES)):
                newest.wait_for_newest(self.smem, which)  # which must not come to a block that has ended

    def open(self) -> None:
        """Before other blocks send this one anything: sums and the newest token too."""
        if not self.settings.interpretable:
            newest.make_ready(self.smem, self.index)
        super().open()

    def slot(self, n: Any) -> Any:
        """Tiles come after chunks of weights."""
        return super().slot(n + self.products.total)

    def tile(self, name: str, slot: Any) -> Any:
        first = {"k": 0, "v": TILE_KEYS}[name]
        return self.smem["products"]["weights"].at[self.index, slot, 0, pl.ds(first, TILE_KEYS)]

    @property
    def has_first(self) -> Any:
        """No tile is copied for nothing."""
        return False

    def wait_for_all_open(self, exchange: Exchange) -> None:
        """That was before sums were sent."""

    def finisher(self, which: int) -> int:
        """The block of the cluster, whose first warpgroup makes query, key or value of the sums."""
        return which % self.plan.splits

    def finish_product(self, which: int, total: Any) -> None:
        """Of the one that does it, makes query, key or value. total: its own sums, all of them where it is alone."""
        interpretable = self.settings.interpretable

        @pl.when((self.split == self.finisher(which)) & (self.index == 0))
        def _finish():
            plgpu.commit_smem()  # moments, which this warpgroup has left
            sums = total if interpretable else newest.sum_of_parts(self.smem, which)
            read = (lambda ref: ref[0]) if interpretable else newest.first_of
            mean, inverse = (read(self.smem["row_smem"].at[i]) for i in range(2))
            row = plgpu.broadcasted_iota(jnp.int32, sums.shape, 1, layout=MATRIX)
            y, scale, shift = (jnp.where(row == of, sums, 0.0).sum(axis=1) for of in (0, SCALE_ROW, SHIFT_ROW))
            y = rounded((y - mean * scale) * inverse + shift, self.dtype)
            if (bias := self.biases[which]) is not None:
                y = rounded(y + bias.astype(jnp.float32), self.dtype)
            if interpretable:
                store(self.smem["newest"].at[which], y)
                plgpu.commit_smem()
            else:
                newest.send_newest(self.smem, which, y, self.plan.splits)

    def take_queries(self) -> None:
        """Waits for the query, and moves it into the order that the matrix instruction reads."""
        if not self.settings.interpretable:
            newest.wait_for_newest(self.smem, 0)

        @pl.when(self.index == 0)
        def _move():
            query = load(self.smem["newest"].at[0], QUERIES.reduce(0))
            # Columns of heads that do not exist are columns of this one.
            queries = plgpu.layout_cast(over_rows(query, (self.heads, HEAD)), QUERIES)
            self.smem["q_smem"][...] = queries.astype(self.dtype)
            plgpu.commit_smem()

        self.gather()

    def complete(self, name: str, n: Any, length: Any) -> None:
        """Puts the new key or value into the tile where it belongs, and into the cache: nobody else reads that slot."""
        which = NAMES.index({"k": "key", "v": "value"}[name])
        key = length - 1 - self.first_key(n)
        new = self.smem["newest"].at[which]
        tile = self.tile(name, self.slot(n))

        @pl.when((key >= 0) & (key < self.plan.keys))
        def _put():
            if self.settings.interpretable:
                row = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
                tile[...] = jnp.where(row == key, new[...].astype(self.dtype)[None], tile[...])
            else:
                newest.wait_for_newest(self.smem, which)
                newest.put_in_tile(tile, key, new)
            plgpu.commit_smem()

            @pl.when(self.place < self.shape.capacity)
            def _keep():
                kept = load(new, QUERIES.reduce(0)).astype(self.dtype)
                store(self.arrays[name].at[0, self.place, self.pair], kept)
