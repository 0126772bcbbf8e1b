"""A training step for low-rank adapters beside a frozen model.

The state is that of step.py with adapters where weights are: float32 adapters, their moments, the step's number. The
model is another argument, which is neither donated nor copied nor cast: bfloat16 or float32, its weights also in 8
or 4 bits (model/quantize.py). No product of the step has a frozen weight's gradient as its result.

Over a mesh the model lies as one that is served (sharding.PARAMETER_TABLE) and XLA splits all of the step. There is no
pipeline: what a pipeline saves, optimizer state and gradients of layers elsewhere, adapters hardly have.

The trap: the dtype of computing is the model's own, so `StepOptions.compute_dtype` must say the same.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Key

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import adapters as model_adapters
from falcon_jax.model import params as model_params
from falcon_jax.model.adapters import LoRA
from falcon_jax.model.decoder import FalconDecoder
from falcon_jax.model.params import Params
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import loss as train_loss
from falcon_jax.train import step as train_step
from falcon_jax.train.forward import POLICIES, Forward, row_keys
from falcon_jax.train.loss import LossSums
from falcon_jax.train.step import Metrics, State, StepOptions


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
    """A model with adapters as training runs it. Hashable: the key of what is compiled for it.

    options: of which ema_decay, the optimizer's and the loss's count; those of a pipeline do not.
    """

    config: FalconConfig
    lora: LoRA
    options: StepOptions
    forward: ForwardOptions
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if train_step.num_stages(self.mesh) > 1:
            raise ConfigError("LoRA has no pipeline: give the mesh's devices to data, fsdp or tensor, and stage=1")
        if self.forward.remat == "stage":
            raise ConfigError("remat 'stage' is for a pipeline; take 'block', 'products' or 'none' for LoRA")

    def bind(self, frozen: Params, adapters: Params) -> FalconDecoder:
        """The decoder with its adapters; inside jit.

        Raises:
          ConfigError: the frozen model's dtype is not the options' compute_dtype, or the adapters do not fit.
        """
        config = dataclasses.replace(self.config, hidden_dropout=self.options.dropout)
        decoder = model_params.bind(config, frozen, self.forward, self.mesh)
        found, asked = decoder.dtype, self.options.compute_dtype
        if found != jnp.dtype(asked):
            raise ConfigError(
                f"the frozen model is {found}, and compute_dtype {asked!r}: load it as the one to compute in"
            )
        return model_adapters.bind(decoder, adapters, self.lora)

    def hidden(
        self, decoder: FalconDecoder, tokens: Integer[Array, "R T"], keys: Key[Array, " R"] | None
    ) -> Float[Array, "R T D"]:
        """Normalized final hidden states. keys: each row's, for dropout."""
        run = Forward(decoder.config, self.forward, self.mesh, self.options.separator, splits_sequence=False)
        step, x = run.begin(tokens, keys), decoder.token_vectors(tokens)
        for number, block in enumerate(decoder.layers):
            if keys is not None:
                folded = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
                step = dataclasses.replace(step, dropout_keys=folded)

            def layer(x: Array, block=block, step=step) -> Array:
                return block(x, step, None)[0]

            limit, policy = self.forward.num_remat_layers, POLICIES[self.forward.remat]
            if policy is not None and (limit is None or number < limit):
                layer = jax.checkpoint(layer, policy=policy)
            with jax.named_scope(f"layer_{number}"):
                x = layer(x)
        return decoder.final_norm(x)


def init_state(model: AdaptedModel, seed: int, adapters: Params | None = None) -> State:
    """A fresh training state: new adapters (or `adapters`, float32, which are copied), empty moments, step 0."""
    if adapters is None:
        adapters = model_adapters.init(model.config, model.lora, jax.random.key(seed), model.mesh)
    placed = None if model.mesh is None else state_shardings(model)
    return jax.jit(lambda adapters: train_step.with_moments(adapters, model.options), out_shardings=placed)(adapters)


def abstract_state(model: AdaptedModel) -> State:
    """The state's shapes, dtypes and, with a mesh, shardings, without any data: what a checkpoint is restored into."""
    adapters = model_adapters.abstract(model.config, model.lora)
    abstract = jax.eval_shape(lambda adapters: train_step.with_moments(adapters, model.options), adapters)
    if model.mesh is None:
        return abstract
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        state_shardings(model),
    )


def state_shardings(model: AdaptedModel) -> State:
    """Where each leaf of the state lies: adapters as sharding.PARAMETER_TABLE says, the moments with them."""
    assert model.mesh is not None
    abstract = abstract_state(dataclasses.replace(model, mesh=None))
    leaves = model_params.flatten(abstract["params"])
    of_params = model_params.unflatten(sharding.params_sharding(leaves, model.mesh))
    return train_step.placed_like(abstract, of_params, model.options, model.mesh)


@functools.lru_cache(maxsize=8)
def make_train_step(model: AdaptedModel) -> Callable[..., tuple[State, Metrics]]:
    """train_step(state, frozen, tokens, learning_rate, num_used=None) -> (state, metrics); only the state is donated.

    frozen: the model's parameters, as `checkpoint.load` gives them. The rest as for step.make_train_step.
    """
    options = model.options

    def train(
        state: State,
        frozen: Params,
        tokens: Integer[Array, "B columns"] | Integer[Array, "A R columns"],
        learning_rate: Float[Array, ""],
        num_used: Integer[Array, ""] | None = None,
    ) -> tuple[State, Metrics]:
        tokens = train_step.micro_batches(tokens.astype(jnp.int32), options.num_micro_batches)
        key = train_step.dropout_key(options, state["step"])
        grads, sums = gradients(model, state["params"], frozen, tokens, key, num_used)
        z_loss = options.z_loss * sums.squares
        return train_step.updated(state, grads, sums.nats, z_loss, learning_rate, options)

    if model.mesh is None:
        return jax.jit(train, donate_argnums=0)
    placed = state_shardings(model), sharding.replicated(model.mesh)
    return jax.jit(train, donate_argnums=0, out_shardings=placed)


def gradients(
    model: AdaptedModel,
    adapters: Params,
    frozen: Params,
    tokens: Integer[Array, "A R columns"],
    key: Key[Array, ""] | None = None,
    num_used: Integer[Array, ""] | None = None,
) -> tuple[Params, LossSums]:
    """The adapters' gradients in float32, and the loss's sums, of the mean over all targets; inside jit.

    Args:
      tokens: A micro-batches, of which the first `num_used` (None: all) count.
      key: the step's, for dropout.
    """
    A, R, columns = tokens.shape
    num_targets = (A if num_used is None else num_used) * R * (columns - 1)

    def objective(adapters: Params, number: Array) -> tuple[Array, LossSums]:
        mine = jax.lax.dynamic_index_in_dim(tokens, number, keepdims=False)
        keys = None if key is None else row_keys(jax.random.fold_in(key, number), jnp.arange(R, dtype=jnp.int32))
        return loss_of(model, adapters, frozen, mine, keys)

    differentiate = jax.grad(objective, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    grads, sums = train_step.accumulated(lambda number: differentiate(adapters, number), zeros, A, num_used)
    return train_step.mean_of(grads, num_targets), LossSums(*(x / num_targets for x in sums))


def loss_of(
    model: AdaptedModel,
    adapters: Params,
    frozen: Params,
    tokens: Integer[Array, "R columns"],
    keys: Key[Array, " R"] | None = None,
) -> tuple[Float[Array, ""], LossSums]:
    """(nats plus z-loss, the sums apart) over the targets of some rows; inside jit. keys: each row's, for dropout."""
    decoder = model.bind(frozen, adapters)
    hidden, targets = model.hidden(decoder, tokens[:, :-1], keys), tokens[:, 1:]
    head, is_transposed = decoder.head()
    is_real = jnp.ones(targets.shape, bool)
    options = model.options
    return train_loss.loss_sums(
        hidden, head, is_transposed, targets, is_real, options.z_loss, options.loss_chunk_tokens
    )


@functools.lru_cache(maxsize=8)
def make_eval_step(model: AdaptedModel) -> Callable[..., jax.Array]:
    """eval_step(adapters, frozen, tokens [B, T+1], counts [B]) -> float32 [B, T]: nats of real targets, 0 elsewhere."""
    forward = dataclasses.replace(model.forward, remat="none", num_remat_layers=None)
    options = dataclasses.replace(model.options, dropout=0.0)
    model = dataclasses.replace(model, forward=forward, options=options)

    def evaluate(
        adapters: Params, frozen: Params, tokens: Integer[Array, "B columns"], counts: Integer[Array, " B"]
    ) -> Float[Array, "B T"]:
        tokens = tokens.astype(jnp.int32)
        decoder = model.bind(frozen, adapters)
        hidden = model.hidden(decoder, tokens[:, :-1], None)
        nats = train_loss.token_nats(hidden, *decoder.head(), tokens[:, 1:], options.loss_chunk_tokens)
        return jnp.where(jnp.arange(nats.shape[1]) < counts[:, None], nats, 0.0)

    return jax.jit(evaluate)
