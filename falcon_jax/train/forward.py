"""The model as training runs it: blocks one after the other, computed again where memory asks for it.

Owns what a block's backward pass keeps, which weights are gathered when, and that packed documents do not see each
other. The blocks themselves are the model's own (model/decoder.py); what comes before and after them too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Integer, Key

from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model.params import Params
from falcon_jax.model.step import ForwardOptions, Step, spans
from falcon_jax.train import weights as train_weights
from pallas_kernels.sharded import HEAD_AXIS

# What the backward pass of a block finds of its forward pass, besides the block's input.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "stage": None,  # of the tick of a pipeline all is computed again
    "block": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Forward:
    """How blocks run in training.

    separator: the token that begins a document; tokens do not see documents before their own. None: all one text.
    splits_sequence: between blocks the residual's tokens are split over "tensor", which holds all of them otherwise.
    """

    config: FalconConfig
    options: ForwardOptions
    mesh: Mesh | None
    separator: int | None
    splits_sequence: bool

    def begin(
        self, tokens: Integer[Array, "R T"], keys: Key[Array, " R"] | None, counts: Int[Array, " R"] | None = None
    ) -> Step:
        """What all blocks share. keys: each row's, for dropout; counts: its real tokens, None: all are."""
        R, T = tokens.shape
        offsets, ends = spans(None, R, T, counts)
        step = Step.begin(self.config, self.options, T, offsets, ends, mesh=self.mesh)
        starts = None if self.separator is None else document_starts(tokens, self.separator)
        return dataclasses.replace(step, starts=starts, dropout_keys=keys)

    def embed(self, ends: Params, tokens: Integer[Array, "R T"]) -> Float[Array, "R T D"]:
        return self.spread(model_params.bind_ends(self.config, ends, self.mesh).token_vectors(tokens))

    def layer(
        self,
        pair: tuple[Params, Params],
        layout: Params,
        x: Float[Array, "R T D"],
        step: Step,
        number: int | Int[Array, ""],
    ) -> Float[Array, "R T D"]:
        """Block `number` over its (weights, sinks)."""
        if step.dropout_keys is not None:
            folded = jax.vmap(jax.random.fold_in, (0, None))(step.dropout_keys, number)
            step = dataclasses.replace(step, dropout_keys=folded)

        def run(pair: tuple[Params, Params], x: Array) -> Array:
            whole = train_weights.all_computed(pair, layout)
            out, _ = model_params.bind_block(self.config, whole)(x, step, None)
            return self.spread(out)

        policy = self._policy(number)
        run = run if policy is None else jax.checkpoint(run, policy=policy)
        with jax.named_scope("layer" if isinstance(number, jax.Array) else f"layer_{number}"):
            return run(pair, x)

    def _policy(self, number: int | Int[Array, ""]) -> Callable[..., bool] | None:
        limit = self.options.num_remat_layers
        if limit is not None and isinstance(number, int) and number >= limit:
            return None
        return POLICIES[self.options.remat]

    def hidden(
        self,
        weights: Params,
        sinks: Params,
        layout: Params,
        tokens: Integer[Array, "R T"],
        keys: Key[Array, " R"] | None,
        counts: Int[Array, " R"] | None = None,
    ) -> Float[Array, "R T D"]:
        """Hidden states before the final norm, of a model whose layers are all on each device. As `begin` has it."""
        step = self.begin(tokens, keys, counts)
        ends = train_weights.all_computed(without_layers((weights, sinks)), without_layers(layout))
        x = self.embed(ends, tokens)
        for number in range(self.config.num_layers):
            pair = weights["layers"][number], sinks["layers"][number]
            x = self.layer(pair, layout["layers"][number], x, step, number)
        return x

    def spread(self, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        """The residual between blocks: this device's rows, all of their tokens or this device's part of them."""
        if self.mesh is None or self.mesh.shape[HEAD_AXIS] == 1:
            return x
        return jax.lax.with_sharding_constraint(
            x, PartitionSpec(None, HEAD_AXIS if self.splits_sequence else None, None)
        )


def without_layers(tree: Any) -> Any:
    """Params, or a pair of them, without their layers."""
    if isinstance(tree, tuple):
        return tuple(map(without_layers, tree))
    return {name: part for name, part in tree.items() if name != "layers"}


def document_starts(tokens: Integer[Array, "R T"], separator: int) -> Int[Array, "R T"]:
    """Position at which each token's document begins: at the last `separator` at or before it, or the row's start."""
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(tokens == separator, position, 0), axis=1)


def row_keys(key: Key[Array, ""], rows: Int[Array, " R"]) -> Key[Array, " R"]:
    """A key for each row, by its number in the whole micro-batch: a function of neither mesh nor device."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
