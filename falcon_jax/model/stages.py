"""Tokens through all layers by fused stages: how a step of decoding runs where kernels for it exist, and a prompt where
weights have to be unpacked.

With a few rows a layer is as fast as its weights come out of memory, and each launch costs as much as megabytes of
them. Here a parallel layer is an input stage (all projections of the normalized input, GELU included), attention, and
an output stage (projections, residual and the norms that the next layer reads); a sequential one has two of each.
Where attention runs beside the MLP's first product, the input stage is two launches (beside.py).
Heads of 64 are rotated by the input stage, which also puts keys and values where the cache holds them. Of up to six
tokens norms begin in the output stage and end in the input stage after it.

Over the tensor axis of a mesh each device works on its heads and its part of the MLP's width. Where kernels reach the
other devices' memory (pallas_kernels/peers), the output stage adds up what all have made, and the launches are those
of one device; else it ends before the sum, which XLA makes, and norms follow that.

Rows are the tokens of all sequences, one after the other, filled up to a multiple of 8 with rows that mean nothing:
no stage mixes rows.

The trap: results differ from the plain layers' by rounding, as sums stay in float32 for longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from falcon_jax import sharding
from falcon_jax.model import beside, quantize
from falcon_jax.model import cache as kv_cache
from falcon_jax.model.step import Step
from pallas_kernels import compat, quantized_matmul
from pallas_kernels.attention_norm import attention_norm, attention_norm_deferred, new_meeting
from pallas_kernels.peers import Addresses
from pallas_kernels.quantized_matmul import MAX_ROWS, SIDE, Moments, Product, deferred, in_eights, project
from pallas_kernels.quantized_matmul.integers import ALL_ROWS, FEW_ROWS, FEW_TOKENS, TOKEN_ROWS, Integers
from pallas_kernels.sharded import HEAD_AXIS

if TYPE_CHECKING:
    from falcon_jax.config import FalconConfig
    from falcon_jax.model.cache import KVCache
    from falcon_jax.model.decoder import Block, FalconDecoder
    from falcon_jax.model.linear import LayerNorm, Linear


def pays(weights: str, num_tokens: int, cache_is_empty: bool) -> bool:
    """Whether so many tokens go through the stages where kernels for them exist, by the weights' form.

    As measured on an H200 (benchmarks/LOG.md): steps of every form, and prompts of 512 and 4,000 tokens where weights
    are quantized. Native prompts have been compared by 1,024 rows, where neither way is faster.
    """
    return weights != "native" or (num_tokens <= MAX_ROWS and not cache_is_empty)


def integers_pay(config: FalconConfig, weights: str) -> bool:
    """Whether input stages read x as integers (pallas_kernels/quantized_matmul/integers.py).

    Products with weights of 4 bits wait for arithmetic, of which that takes less; others wait for memory. Of layers the
    parallel ones alone have been measured (benchmarks/LOG.md).
    """
    return weights == "int4" and config.block == "parallel"


# Of a layer, by projection: what scale and shift of the norm that it reads come to, float32 [2, O].
NormSums = dict[str, Array]


def reads_norm_sums(config: FalconConfig, weights: str, dtype: DTypeLike, num_tokens: int, mesh: Mesh | None) -> bool:
    """Whether steps of so many tokens are faster with each layer's `norm_sums`, and can have them here.

    Args:
      weights: their form, one of quantize.WEIGHTS; dtype: the model's.
      num_tokens: of all rows.
    """
    return (
        _tokens_alone_pay(num_tokens)
        and jnp.dtype(dtype) == jnp.bfloat16
        and quantized_matmul.size_of(mesh) == 1
        and integers_pay(config, weights)
        and deferred.fits(num_tokens, config.width)
        and compat.mosaic_reason(mesh) is None
    )


def _tokens_alone_pay(num_tokens: int) -> bool:
    """Whether so many tokens fill the rows of integers that an instruction takes at once, without scale and shift."""
    return FEW_TOKENS < num_tokens <= len(TOKEN_ROWS)


def norm_sums(block: Block, implementation: str | None = None) -> NormSums:
    """Of a parallel layer, made once and for all: with them input stages of three and four tokens have half as much to
    multiply (pallas_kernels/quantized_matmul/integers.py)."""
    norms = _input_norms(block)
    read = {f"attention.{name}": norms[0] for name in ("query", "key", "value")} | {"mlp.up": norms[-1]}
    projections = {f"attention.{name}": getattr(block.attention, name) for name in ("query", "key", "value")}
    projections["mlp.up"] = block.mlp.up
    products = [
        Product(jnp.stack(norm.affine()), projections[name].matrix(), projections[name].num_outputs, dtype="float32")
        for name, norm in read.items()
    ]
    return dict(zip(read, project(products, implementation=implementation), strict=True))


def reason_against(decoder: FalconDecoder, num_tokens: int) -> str | None:
    """Why the kernels cannot take so many tokens of this model here, or None where they can."""
    config, mesh = decoder.config, decoder.mesh
    query, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = [config.mlp_width, query, keys]
    if mesh is not None and mesh.size > 1:
        if mesh.size > quantized_matmul.size_of(mesh):
            return "of a mesh it takes the tensor axis alone"
        if num_tokens > MAX_ROWS:
            return f"on a mesh it takes up to {MAX_ROWS} tokens at a time, not {num_tokens}"
        split = _split(decoder)
        # Attention stands between them: heads lie as the projections' columns do, or not at all.
        pairs = [("attention.query", config.num_heads), ("attention.key", config.num_kv_heads)]
        if any(split[name] != (count % mesh.size == 0) for name, count in pairs):
            heads = f"{config.num_heads} and {config.num_kv_heads} heads"
            return f"{heads} do not lie over {mesh.size} devices as their weights do"
        if split["attention.query"] != split["attention.output"] or split["mlp.up"] != split["mlp.down"]:
            return f"weights of {decoder.weights} lie over {mesh.size} devices on one side of a layer and not the other"
        of_device = ("mlp.up", "attention.query", "attention.key")
        sizes = [size // mesh.size if split[name] else size for size, name in zip(sizes, of_device, strict=True)]
    reason = compat.mosaic_reason(mesh)
    return reason or quantized_matmul.reason_against(num_tokens, [config.width, *sizes], decoder.dtype)


def _split(decoder: FalconDecoder) -> dict[str, bool]:
    """Of each projection's name in a layer, whether its heads or the MLP's width lie over the mesh's tensor axis."""
    mesh, block = decoder.mesh, decoder.layers[0]
    names = ["attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"]
    if mesh is None or mesh.size == 1:
        return dict.fromkeys(names, False)
    found = {}
    for name in names:
        part, _, projection = name.partition(".")
        path, shape = f"layers.0.{name}.weight", getattr(getattr(block, part), projection).shape
        layout = next(iter(quantize.layouts(path, shape, decoder.weights, mesh).values()))
        assert layout is not None  # there is a mesh
        found[name] = any(HEAD_AXIS in axes for axes in sharding.axes_by_dimension(layout.spec))
    return found


def run(
    decoder: FalconDecoder,
    x: Float[Array, "B T D"],
    step: Step,
    cache: KVCache,
    implementation: str | None,
    peers: Addresses | None = None,
    norm_sums: Sequence[NormSums] | None = None,
) -> tuple[Float[Array, "B T D"], list[tuple[Array, Array]]]:
    """All layers and the final norm.

    Args:
      peers: where kernels on the devices of the decoder's mesh find each other's memory, for up to 64 tokens; or None.
      norm_sums: each layer's, which as many tokens as `reads_norm_sums` says read; or None.

    Returns:
      The final hidden states, and each layer's keys and values with the new tokens in them.
    """
    B, T, D = x.shape
    residual = in_eights(x)
    layers = list(decoder.layers)
    norms_after = [_input_norms(block) for block in layers[1:]] + [[decoder.final_norm]]
    places = _positions(decoder, step, cache, residual.shape[0])
    is_one = quantized_matmul.size_of(decoder.mesh) == 1
    defers = deferred.fits(B * T, D) and (is_one or peers is not None)
    attention_sms = 0
    # Over several devices it has not been measured.
    if is_one and decoder.options.concurrent and T == 1 and places[1] is not None and compat.mosaic_reason() is None:
        shape = decoder.config, decoder.weights, B, cache.capacity
        attention_sms = beside.attention_sms(*shape, compat.num_sms())
    mesh = _Mesh(decoder.mesh, _split(decoder), peers, B * T)
    integers = None
    if defers and is_one and x.dtype == jnp.bfloat16 and integers_pay(decoder.config, decoder.weights):
        tokens_alone = norm_sums is not None and _tokens_alone_pay(B * T)
        held = TOKEN_ROWS if tokens_alone else FEW_ROWS if B * T <= FEW_TOKENS else ALL_ROWS
        integers = Integers(decoder.weights, held)
    shared = _Shared(step, implementation, mesh, defers, integers, attention_sms, *places)
    normed = shared.normalize(residual, _input_norms(layers[0]))
    meetings = new_meeting(residual.shape[0], D), jnp.zeros(B * decoder.config.num_heads, jnp.int32)
    kept = []
    for i, (block, norms) in enumerate(zip(layers, norms_after, strict=True)):
        with jax.named_scope(f"layer_{i}"):
            slots = cache.keys[i], cache.values[i]
            defers = shared.defers and i + 1 < len(layers)  # no stage reads the final norm
            if integers is not None and integers.rows == TOKEN_ROWS:
                assert norm_sums is not None
                normed = dataclasses.replace(normed, sums=norm_sums[i])
            residual, normed, meetings, slots = _layer(block, residual, normed, norms, defers, meetings, shared, slots)
            kept.append(slots)
    return normed.rows[0][: B * T].reshape(B, T, D), kept


@dataclasses.dataclass(frozen=True)
class _Normed:
    """What is read of a residual: rows [R, D] for each of its norms, maybe as integers. moments: of norms that end
    where they are read; sums: what these rows lack."""

    rows: list[Any]
    moments: Moments | None = None
    sums: NormSums | None = None


@dataclasses.dataclass(frozen=True)
class _Mesh:
    """What the stages run over. split: as `_split` has it. num_tokens: those that mean something."""

    mesh: Mesh | None
    split: dict[str, bool]
    peers: Addresses | None
    num_tokens: int

    def of_output(self, names: Iterable[str]) -> dict[str, Any]:
        """What an output stage of these projections must know of it."""
        split = [self.split[name] for name in names]
        return {"mesh": self.mesh, "are_split": split, "peers": self.peers, "num_rows": self.num_tokens}


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What all layers share. defers: whether norms that an input stage reads end there; integers: as which it has them.
    attention_sms: as beside.py has it.
    rotary: cos and sin by which it rotates; places: where it puts keys and values; None where that is done after it."""

    step: Step
    implementation: str | None
    mesh: _Mesh
    defers: bool
    integers: Integers | None
    attention_sms: int
    rotary: tuple[Float[Array, "R 32"], Float[Array, "R 32"]] | None
    places: Int[Array, " tokens"] | None

    def product(self, name: str, projection: Linear, normed: _Normed, norm: int, **rest: Any) -> Product:
        """Of the rows for a norm of that number."""
        affine = None if normed.sums is None else normed.sums[name]
        return projection.product(normed.rows[norm], is_split=self.mesh.split[name], affine=affine, **rest)

    def project(self, products: list[Product], moments: Moments | None, num_sms: int | None = None) -> list[Array]:
        options = {"mesh": self.mesh.mesh, "implementation": self.implementation}
        return project(products, moments=moments, num_sms=num_sms, **options)

    def project_beside_attention(self, products: list[Product], others: list[Product], moments: Moments | None):
        """`products`, which attention reads, and `others`, which run beside it or in the same launch."""
        if not (others and self.attention_sms):
            return self.project([*products, *others], moments)
        made = self.project(products, moments)
        # What may run at the same time the GPU begins in XLA's order. The others would leave next to nothing to a
        # launch behind them; so they come behind it, by a barrier that XLA takes out when all has its place.
        *made, moments = jax.lax.optimization_barrier((*made, moments))
        return made + self.project(others, moments, compat.num_sms() - self.attention_sms)

    def normalize(self, residual: Float[Array, "R D"], norms: list[LayerNorm]) -> _Normed:
        """What the first input stage reads, which no output stage has made."""
        if self.defers:
            rows, moments = deferred.begin(residual, [norm.affine() for norm in norms], norms[0].epsilon)
            return _Normed(rows if self.integers is None else [self.integers.of(x) for x in rows], moments)
        return _Normed([norm(residual) for norm in norms])


def _positions(decoder: FalconDecoder, step: Step, cache: KVCache, num_rows: int):
    """`_Shared`'s last two."""
    if num_rows > MAX_ROWS or not step.reads_cache:
        return None, None
    rotary = None
    if step.rotary is not None:
        if decoder.config.head_dim != SIDE:
            return None, None
        half = [angles[..., : SIDE // 2].reshape(-1, SIDE // 2) for angles in step.rotary]
        cos, sin = (jnp.pad(angles, ((0, num_rows - angles.shape[0]), (0, 0))) for angles in half)
        dtype = cache.keys[0].dtype
        rotary = cos.astype(dtype), sin.astype(dtype)
    return rotary, kv_cache.places(step.offsets, step.num_columns, cache.capacity)


def _input_norms(block: Block) -> list[LayerNorm]:
    """The norms of the residual that a layer reads first."""
    return [block.attention_norm, block.mlp_norm] if block.parallel and block.has_mlp_norm else [block.attention_norm]


def _layer(
    block: Block,
    residual: Float[Array, "R D"],
    normed: _Normed,
    norms: list[LayerNorm],
    defers: bool,
    meetings: tuple[Array, Array],
    shared: _Shared,
    slots: tuple[Array, Array],
):
    """A layer, before which `normed` was made, and at the end of which `norms` are, or begin if `defers`.

    meetings: the arrays through which blocks of the output stages' kernels meet, and the counters of attention's.
    """
    meeting, counters = meetings
    attention, mlp = block.attention, block.mlp
    outputs = {"attention.output": attention.output, "mlp.down": mlp.down}

    def finish(
        inputs: dict[str, Array], residual: Array, norms: list[LayerNorm], defers: bool
    ) -> tuple[Array, _Normed]:
        nonlocal meeting
        projections = [outputs[name] for name in inputs]
        arguments = (
            list(inputs.values()),
            [projection.matrix() for projection in projections],
            residual,
            [norm.affine() for norm in norms],
        )
        options = {
            "biases": [projection.bias[...].reshape(-1) for projection in projections if hasattr(projection, "bias")],
            "epsilon": norms[0].epsilon,
            "implementation": shared.implementation,
            **shared.mesh.of_output(inputs),
        }
        if defers:
            residual, rows, moments = attention_norm_deferred(*arguments, integers=shared.integers, **options)
            return residual, _Normed(rows, moments)
        residual, rows, meeting = attention_norm(*arguments, meeting=meeting, **options)
        return residual, _Normed(rows)

    def up(normed: _Normed) -> Product:
        return shared.product("mlp.up", mlp.up, normed, -1, activation="gelu")

    if block.parallel:
        attended, slots, counters, (hidden,) = _attend(block, normed, [up(normed)], counters, shared, slots)
        residual, normed = finish({"mlp.down": hidden, "attention.output": attended}, residual, norms, defers)
        return residual, normed, (meeting, counters), slots
    attended, slots, counters, _ = _attend(block, normed, [], counters, shared, slots)
    residual, normed = finish({"attention.output": attended}, residual, [block.mlp_norm], shared.defers)
    (hidden,) = shared.project([up(normed)], normed.moments)
    residual, normed = finish({"mlp.down": hidden}, residual, norms, defers)
    return residual, normed, (meeting, counters), slots


def _attend(
    block: Block,
    normed: _Normed,
    others: list[Product],
    counters: Int[Array, " C"],
    shared: _Shared,
    slots: tuple[Array, Array],
) -> tuple[Float[Array, "R NH"], tuple[Array, Array], Int[Array, " C"], list[Array]]:
    """The input stage, `others` in it, and attention of all rows to the cache with their keys and values.

    Returns:
      Attention's output [R, heads x H], the cache's keys and values, the counters for the next layer, and what `others`
      come to.
    """
    attention, step, (B, S, K, H) = block.attention, shared.step, slots[0].shape
    T, num_rows = step.num_columns, normed.rows[0].shape[0]
    key_rotary = None if attention.rotates_cached_keys else shared.rotary
    products = [
        shared.product("attention.query", attention.query, normed, 0, rotary=shared.rotary),
        shared.product("attention.key", attention.key, normed, 0, rotary=key_rotary),
        shared.product("attention.value", attention.value, normed, 0),
    ]
    if not others and _attends_as_it_projects(products, normed, shared, slots):
        from pallas_kernels.decode_attention.projected import attend_projected

        assert normed.moments is not None and shared.places is not None
        out, keys, values = attend_projected(
            products, normed.moments, *slots, step.num_keys(), shared.places, slopes=step.slopes, alibi=step.alibi
        )  # fmt: skip
        return out, (keys, values), counters, []
    if shared.places is not None:
        products[1:] = [
            dataclasses.replace(product, slots=(x.reshape(B * S, K * H), shared.places))
            for product, x in zip(products[1:], slots, strict=True)
        ]
    q, k, v, *made = shared.project_beside_attention(products, others, normed.moments)
    # Single tokens keep the rows that mean nothing: to cut them off and put them on again would be two launches.
    q = q.reshape(num_rows, 1, -1, H) if T == 1 else q[: B * T].reshape(B, T, -1, H)
    if shared.places is None:
        k, v = (x[: B * T].reshape(B, T, K, H) for x in (k, v))
        q, k = attention.rotate(q, k, step)
        out, kept = attention.attend(q, k, v, step, slots)
        assert kept is not None  # slots came in
    else:
        kept = k.reshape(slots[0].shape), v.reshape(slots[1].shape)
        num_sms = shared.attention_sms or None
        out, after = attention.attend_to_cache(q, *kept, step, counters=counters, num_sms=num_sms)
        assert after is not None  # they went in
        counters = after
    out = out.reshape(-1, out.shape[2] * H)
    return jnp.pad(out, ((0, num_rows - out.shape[0]), (0, 0))), kept, counters, made


def _attends_as_it_projects(
    products: list[Product], normed: _Normed, shared: _Shared, slots: tuple[Array, Array]
) -> bool:
    """Whether queries, keys, values and attention to them are one launch (decode_attention/projected.py)."""
    step, is_one = shared.step, quantized_matmul.size_of(shared.mesh.mesh) == 1
    if not is_one or normed.moments is None or shared.places is None or shared.implementation == "xla":
        return False
    if step.num_columns > 1 or step.key_rotary is not None or compat.mosaic_reason() is not None:
        return False
    # Not at the top: Pallas takes half a second to import, and only Hopper runs it.
    from pallas_kernels.decode_attention.projected import reason_against

    return reason_against(products, slots[0]) is None
