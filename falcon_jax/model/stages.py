"""Few tokens through all layers by fused stages: how a step of decoding runs where kernels for it exist.

With a few rows a layer is as fast as its weights come out of memory, and each launch costs as much as megabytes of
them. Here a parallel layer is an input stage (all projections of the normalized input, GELU included), attention, and
an output stage (projections, residual and the norms that the next layer reads); a sequential one has two of each.

Rows are the tokens of all sequences, one after the other, filled up to a multiple of 8 with rows that mean nothing:
no stage mixes rows.

The trap: results differ from the plain layers' by rounding, as sums stay in float32 for longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from falcon_jax.model.step import Step
from pallas_kernels import compat, quantized_matmul
from pallas_kernels.attention_norm import attention_norm
from pallas_kernels.quantized_matmul import in_eights, project

if TYPE_CHECKING:
    from falcon_jax.model.cache import KVCache
    from falcon_jax.model.decoder import Block, FalconDecoder
    from falcon_jax.model.linear import LayerNorm


def reason_against(decoder: FalconDecoder, num_tokens: int) -> str | None:
    """Why the kernels cannot take so many tokens of this model here, or None where they can."""
    config = decoder.config
    if decoder.mesh is not None and decoder.mesh.size > 1:
        return "it runs on one device"
    heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = config.width, config.mlp_width, *heads
    reason = compat.mosaic_reason(decoder.mesh)
    return reason or quantized_matmul.reason_against(num_tokens, sizes, decoder.embed.weight[...].dtype)


def run(
    decoder: FalconDecoder, x: Float[Array, "B T D"], step: Step, cache: KVCache, implementation: str | None
) -> tuple[Float[Array, "B T D"], list[tuple[Array, Array]]]:
    """All layers and the final norm.

    Returns:
      The final hidden states, and each layer's keys and values with the new tokens in them.
    """
    B, T, D = x.shape
    residual = in_eights(x)
    layers = list(decoder.layers)
    following = [_input_norms(block) for block in layers[1:]] + [[decoder.final_norm]]
    normed = [norm(residual) for norm in _input_norms(layers[0])]
    counter = jnp.zeros(1, jnp.int32)
    kept = []
    for i, (block, norms) in enumerate(zip(layers, following, strict=True)):
        with jax.named_scope(f"layer_{i}"):
            slots = cache.keys[i], cache.values[i]
            residual, normed, counter, slots = _layer(
                block, residual, normed, norms, counter, step, slots, implementation
            )
            kept.append(slots)
    return normed[0][: B * T].reshape(B, T, D), kept


def _input_norms(block: Block) -> list[LayerNorm]:
    """The norms of the residual that a layer reads first."""
    return [block.attention_norm, block.mlp_norm] if block.parallel and block.has_mlp_norm else [block.attention_norm]


def _layer(
    block: Block,
    residual: Float[Array, "R D"],
    normed: list[Float[Array, "R D"]],
    norms: list[LayerNorm],
    counter: Array,
    step: Step,
    slots: tuple[Array, Array],
    implementation: str | None,
):
    def finish(xs, projections, residual, norms, counter):
        biases = [projection.bias[...].reshape(-1) for projection in projections if hasattr(projection, "bias")]
        return attention_norm(
            xs,
            [projection.matrix() for projection in projections],
            residual,
            [norm.affine() for norm in norms],
            biases=biases,
            epsilon=norms[0].epsilon,
            counter=counter,
            implementation=implementation,
        )

    attention, mlp = block.attention, block.mlp
    products = [projection.product(normed[0]) for projection in (attention.query, attention.key, attention.value)]
    if block.parallel:
        products.append(mlp.up.product(normed[-1], "gelu"))
    q, k, v, *hidden = project(products, implementation=implementation)
    attended, slots = _attend(block, q, k, v, step, slots)
    if block.parallel:
        projections = [attention.output, mlp.down]
        return *finish([attended, *hidden], projections, residual, norms, counter), slots
    residual, normed, counter = finish([attended], [attention.output], residual, [block.mlp_norm], counter)
    hidden = project([mlp.up.product(normed[0], "gelu")], implementation=implementation)
    return *finish(hidden, [mlp.down], residual, norms, counter), slots


def _attend(
    block: Block, q: Array, k: Array, v: Array, step: Step, slots: tuple[Array, Array]
) -> tuple[Float[Array, "R NH"], tuple[Array, Array]]:
    """Attention of rows [R, heads x H] to the cache, which gets their keys and values first."""
    num_rows, (B, _, K, H) = q.shape[0], slots[0].shape
    T = step.num_columns
    k, v = (x[: B * T].reshape(B, T, K, H) for x in (k, v))
    # Single tokens keep the rows that mean nothing: to cut them off and put them on again would be two launches.
    q = q.reshape(num_rows, 1, -1, H) if T == 1 else q[: B * T].reshape(B, T, -1, H)
    q, k = block.attention.rotate(q, k, step)
    out, kept = block.attention.attend(q, k, v, step, slots)
    assert kept is not None  # slots came in
    out = out.reshape(-1, out.shape[2] * H)
    return jnp.pad(out, ((0, num_rows - out.shape[0]), (0, 0))), kept
