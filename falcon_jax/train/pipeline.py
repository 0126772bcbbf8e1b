"""A pipeline over the mesh's "stage" axis: each stage holds some layers, micro-batches pass through them in turn.

Layers are dealt out to S stages in R rounds of P = L / (S R) layers: stage s holds, for round r, the layers (r S + s) P
+ 0 .. P-1. R = 1 is the plain pipeline; with more rounds a micro-batch goes around the ring of stages R times, and the
idle time at start and end shrinks from (S - 1) / A to (S - 1) / (A R) of the whole.

Micro-batches go in groups of S through all rounds, so that what stage S - 1 passes on is, one tick later, what stage 0
needs next, and nothing waits anywhere: at tick t, stage s works on item t - s, and item n is micro-batch
n // (S R) S + n % S in round n // S % R. A must be a multiple of S.

Source: Huang et al., GPipe (2019); the rounds are the interleaved schedule of Narayanan et al., Efficient Large-Scale
Language Model Training on GPU Clusters (2021), section 2.2, run forward and then backward as a whole, by
differentiation.

The trap: in the first S - 1 ticks and in the last some stages have nothing to do and compute on what is there. It is
finite, and nothing of it is kept.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from falcon_jax import sharding
from falcon_jax.errors import ConfigError
from falcon_jax.model.params import Params
from falcon_jax.train import weights as train_weights
from falcon_jax.train.forward import Forward, without_layers

NUM_STACKED = 2  # leading dimensions of a layer's leaves in a pipeline's state: stage, round


def layers_a_round(num_layers: int, num_stages: int, num_rounds: int) -> int:
    """P, the layers that a stage runs one after the other. Raises: ConfigError where they do not come out even."""
    if num_layers % (num_stages * num_rounds):
        raise ConfigError(
            f"{num_layers} layers do not fall into {num_stages} stages of {num_rounds} rounds: "
            f"stage * pipeline_rounds must divide {num_layers}"
        )
    return num_layers // (num_stages * num_rounds)


def stack(params: Params, num_stages: int, num_rounds: int) -> Params:
    """Params whose layers j = 0 .. P-1 have leaves [S, R, ...]: layer (r S + s) P + j at [s, r]."""
    size = layers_a_round(len(params["layers"]), num_stages, num_rounds)

    def together(*leaves: Array) -> Array:  # by number: r, then s
        whole = jnp.stack(leaves).reshape(num_rounds, num_stages, *leaves[0].shape)
        return whole.swapaxes(0, 1)

    layers = params["layers"]
    stacked = {j: jax.tree.map(together, *(layers[i] for i in range(j, len(layers), size))) for j in range(size)}
    return {**params, "layers": stacked}


def unstack(params: Params) -> Params:
    """What `stack` was given."""
    layers, size = {}, len(params["layers"])
    for j, layer in params["layers"].items():
        S, R = jax.tree.leaves(layer)[0].shape[:NUM_STACKED]
        for r in range(R):
            for s in range(S):
                layers[(r * S + s) * size + j] = jax.tree.map(lambda leaf, s=s, r=r: leaf[s, r], layer)
    return {**params, "layers": dict(sorted(layers.items()))}


def hidden(
    forward: Forward,
    weights: Params,
    sinks: Params,
    layout: Params,
    tokens: Integer[Array, "A R T"],
    keys: Key[Array, "A R"] | None,
    counts: Int[Array, "A R"] | None = None,
) -> Float[Array, "share R T D"]:
    """Hidden states before the final norm of this stage's share of the micro-batches: A / S of them, in their order.

    Run by each stage on the same tokens; weights and sinks are the stage's.
    """
    assert forward.mesh is not None
    S, axis = forward.mesh.shape[sharding.STAGE_AXIS], sharding.STAGE_AXIS
    A, rows, T = tokens.shape
    size = len(weights["layers"])
    rounds = jax.tree.leaves(weights["layers"])[0].shape[1]
    stage = jax.lax.axis_index(axis)
    inner = train_weights.unstacked_layout(layout["layers"], NUM_STACKED)
    ring = [(s, (s + 1) % S) for s in range(S)]

    def tick(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], None]:
        received, results = carry
        item = t - stage
        turn = item // S % rounds
        micro_batch = jnp.clip(item // (S * rounds) * S + item % S, 0, A - 1)
        mine, *more = jax.tree.map(
            lambda whole: jax.lax.dynamic_index_in_dim(whole, micro_batch, keepdims=False), (tokens, keys, counts)
        )

        ends = train_weights.all_computed(without_layers((weights, sinks)), without_layers(layout))
        x = jnp.where((stage == 0) & (turn == 0), forward.embed(ends, mine), received)
        step = forward.begin(mine, *more)
        for j in range(size):
            of_turn = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf[0], turn, keepdims=False) if rounds > 1 else leaf[0, 0],
                (weights["layers"][j], sinks["layers"][j]),
            )
            x = forward.layer(of_turn, inner[j], x, step, (turn * S + stage) * size + j)
        is_result = (stage == S - 1) & (turn == rounds - 1) & (item >= 0) & (item < A * rounds)
        # The slot after the last takes what is none.
        results = jax.lax.dynamic_update_index_in_dim(results, x, jnp.where(is_result, micro_batch, A), 0)
        return (jax.lax.ppermute(x, axis, ring), results), None

    if forward.options.remat != "none":  # else each tick keeps what its blocks need for their gradients
        tick = jax.checkpoint(tick, policy=jax.checkpoint_policies.nothing_saveable)
    nothing = jnp.zeros((rows, T, forward.config.width), jax.tree.leaves(weights)[0].dtype)
    results = jnp.zeros((A + 1, *nothing.shape), nothing.dtype)
    (_, results), _ = jax.lax.scan(tick, (nothing, results), jnp.arange(A * rounds + S - 1, dtype=jnp.int32))
    # The last stage has all of them. Each takes a share, so that none waits while the head and the loss are computed.
    results = jnp.where(stage == S - 1, results[:A], 0)
    return jax.lax.psum_scatter(results, axis, scatter_dimension=0, tiled=True)


def share(array: Array, num_stages: int) -> Array:
    """This stage's A / S of the micro-batches [A, ...], the ones that `hidden` gives."""
    size = array.shape[0] // num_stages
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(sharding.STAGE_AXIS) * size, size)
