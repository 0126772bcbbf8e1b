"""One training step: loss, gradient, clipped AdamW, all in one executable with a donated state.

Owns the loss and the training state. Knows nothing of files, schedules or time. float32: master weights, loss,
optimizer; the forward and backward products run in the compute dtype. The one trap: logits are made a slice of T at a
time and made again in the backward pass, because float32 [B, T, V] would outgrow everything else on the device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Key

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import FalconDecoder, ForwardOptions
from falcon_jax.model.params import Params

State = dict[str, Any]  # step, params, optimizer, first_bad_step, and ema where it is kept
Metrics = dict[str, jax.Array]
COMPUTE_DTYPES = ("bfloat16", "float32", "float16")


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step is made of. Rates come from outside; see schedule.py."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_embedding: bool = True  # tied to the head in most models, whose logits decay keeps small
    max_grad_norm: float = 1.0
    z_loss: float = 1e-4
    ema_decay: float = 0.0  # 0: no average is kept
    num_micro_batches: int = 1
    loss_chunk_tokens: int = 512  # columns of T whose logits exist at once
    compute_dtype: str = "bfloat16"
    dropout: float = 0.0  # of what blocks add to the residual; helps where the data is seen many times
    dropout_seed: int = 0

    def __post_init__(self) -> None:
        if self.num_micro_batches < 1 or self.loss_chunk_tokens < 1:
            raise ConfigError(
                f"num_micro_batches is {self.num_micro_batches} and loss_chunk_tokens "
                f"{self.loss_chunk_tokens}; both must be at least 1"
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ConfigError(f"compute_dtype is {self.compute_dtype!r}; it must be one of {', '.join(COMPUTE_DTYPES)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1 (0: none)")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1 (0: no average)")


def decay_mask(params: Params, decay_embedding: bool) -> Params:
    """True where weight decay applies: matrices; never norms, biases or other vectors."""

    def decays(path: str) -> bool:
        if path.endswith(".bias") or "norm" in path:
            return False
        return decay_embedding or not path.startswith("embed.")

    return model_params.unflatten({path: decays(path) for path in model_params.flatten(params)})


def make_optimizer(options: StepOptions) -> optax.GradientTransformation:
    """Clipping, Adam, then weight decay; the updates still have to be scaled by minus the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.scale_by_adam(options.beta1, options.beta2, options.epsilon),
        optax.add_decayed_weights(
            options.weight_decay, mask=functools.partial(decay_mask, decay_embedding=options.decay_embedding)
        ),
    )


def cross_entropy(
    logits: Float[Array, "... V"], targets: Integer[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Nats of each target, and the log of each softmax denominator (for the z-loss), both float32."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_total - chosen, log_total


def loss_sums(
    decoder: FalconDecoder,
    tokens: Integer[Array, "B columns"],
    counts: Integer[Array, " B"] | None,
    chunk_tokens: int,
    dropout_key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "B T"]]:
    """(sum of nats, sum of squared log denominators, nats of each target [B, T]) over the real targets.

    counts: how many of a row's T targets are real; the rest, on the right, are left out (None: all are real).
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden, _ = decoder(inputs, num_tokens=counts, dropout_key=dropout_key)  # [B, T, D]
    num_rows, length = targets.shape
    is_real = jnp.ones((num_rows, length), bool)
    if counts is not None:
        is_real = jnp.arange(length)[None, :] < counts[:, None]

    chunk = min(chunk_tokens, length)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length

    def split(array: Array) -> Array:  # [B, T, ...] -> [num_chunks, B, chunk, ...]
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, widths)
        return jnp.moveaxis(padded.reshape(num_rows, num_chunks, chunk, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(hidden: Array, targets: Array, is_real: Array) -> tuple[Array, Array, Array]:
        nats, log_total = cross_entropy(decoder.logits(hidden), targets)
        nats = jnp.where(is_real, nats, 0.0)
        return nats.sum(), jnp.where(is_real, log_total**2, 0.0).sum(), nats

    def add(sums: tuple[Array, Array], pieces: tuple[Array, Array, Array]):
        nats_sum, squares_sum, nats = of_chunk(*pieces)
        return (sums[0] + nats_sum, sums[1] + squares_sum), nats

    zero = jnp.zeros((), jnp.float32)
    (nats_sum, squares_sum), nats = jax.lax.scan(add, (zero, zero), (split(hidden), split(targets), split(is_real)))
    nats = jnp.moveaxis(nats, 0, 1).reshape(num_rows, num_chunks * chunk)[:, :length]
    return nats_sum, squares_sum, nats


def init_state(
    config: FalconConfig,
    options: StepOptions,
    seed: int,
    mesh: Mesh | None = None,
    params: Params | None = None,
) -> State:
    """A fresh training state: random float32 weights (or `params`, donated), empty moments, step 0; over `mesh`."""

    if params is None:
        params = model_params.init(config, jax.random.key(seed), jnp.float32, mesh)
    return _state_maker(config, options, mesh)(params)


@functools.lru_cache(maxsize=8)
def _state_maker(config: FalconConfig, options: StepOptions, mesh: Mesh | None) -> Callable[[Params], State]:
    placed = None if mesh is None else state_shardings(config, options, mesh)
    return jax.jit(lambda params: _with_moments(params, options), out_shardings=placed, donate_argnums=0)


def _with_moments(params: Params, options: StepOptions) -> State:
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "optimizer": make_optimizer(options).init(params),
        "first_bad_step": jnp.full((), -1, jnp.int32),
    }
    if options.ema_decay:
        # A copy: two leaves of a donated state must not share a buffer.
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def abstract_state(config: FalconConfig, options: StepOptions, mesh: Mesh | None = None) -> State:
    """The state's shapes, dtypes and, with a mesh, shardings, without any data: what a checkpoint is restored into."""
    params = model_params.abstract(config, jnp.float32)
    abstract = jax.eval_shape(lambda params: _with_moments(params, options), params)
    if mesh is None:
        return abstract
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        state_shardings(config, options, mesh),
    )


def state_shardings(config: FalconConfig, options: StepOptions, mesh: Mesh) -> State:
    """Where each leaf of the state lies: moments and average with their weights, scalars everywhere."""
    abstract = abstract_state(config, options)
    table = sharding.params_sharding(model_params.flatten(abstract["params"]), mesh)
    of_params = model_params.unflatten(table)
    everywhere = sharding.replicated(mesh)
    placed = jax.tree.map(lambda _: everywhere, abstract)
    placed["params"] = of_params
    placed["optimizer"] = optax.tree_map_params(
        make_optimizer(options),
        lambda _, where: where,
        abstract["optimizer"],
        of_params,
        transform_non_params=lambda _: everywhere,
    )
    if "ema" in placed:
        placed["ema"] = of_params
    return placed


@functools.lru_cache(maxsize=8)  # one executable for all runs of one shape in a process
def make_train_step(
    config: FalconConfig, options: StepOptions, forward: ForwardOptions, mesh: Mesh | None = None
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """train_step(state, tokens [B, T+1], learning_rate) -> (state, metrics); the state is donated.

    Metrics are float32 scalars on the device: loss (nats a token), z_loss, grad_norm (before clipping), and
    first_bad_step (int32, -1 while every loss and gradient was finite). A step that is not finite changes no weight.
    """
    optimizer = make_optimizer(options)
    compute_dtype = jnp.dtype(options.compute_dtype)
    config = dataclasses.replace(config, hidden_dropout=options.dropout)

    def loss_of(
        params: Params, tokens: Integer[Array, "B columns"], key: Key[Array, ""] | None
    ) -> tuple[Array, tuple[Array, Array]]:
        # Inside the gradient, so that it comes back in float32.
        computed = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        decoder = model_params.bind(config, computed, forward, mesh)
        nats_sum, squares_sum, nats = loss_sums(decoder, tokens, None, options.loss_chunk_tokens, key)
        loss, z_loss = nats_sum / nats.size, options.z_loss * squares_sum / nats.size
        return loss + z_loss, (loss, z_loss)

    def gradients(
        params: Params, tokens: Integer[Array, "B columns"], step: Integer[Array, ""], part: Integer[Array, ""]
    ) -> tuple[Params, tuple[Array, Array]]:
        return jax.grad(loss_of, has_aux=True)(params, tokens, dropout_key(step, part))

    def dropout_key(step: Integer[Array, ""], part: Integer[Array, ""]) -> Key[Array, ""] | None:
        """A function of the step's number, so that a resumed run drops what the uninterrupted one does."""
        if options.dropout == 0:
            return None
        # The hardware's generator: threefry would take longer than the blocks' products at small widths.
        key = jax.random.key(options.dropout_seed, impl="rbg")
        return jax.random.fold_in(jax.random.fold_in(key, step), part)

    def accumulated(
        params: Params, tokens: Integer[Array, "B columns"], step: Integer[Array, ""]
    ) -> tuple[Params, tuple[Array, Array]]:
        num, num_rows = options.num_micro_batches, tokens.shape[0]
        if num == 1:
            return gradients(params, tokens, step, jnp.zeros((), jnp.int32))
        if num_rows % num:
            raise ConfigError(f"num_micro_batches is {num}, which does not divide the {num_rows} rows of a batch")
        # Every num-th row, so that each micro-batch is spread over all devices that the rows are spread over.
        parts = jnp.moveaxis(tokens.reshape(num_rows // num, num, tokens.shape[1]), 1, 0)
        shapes = jax.eval_shape(gradients, params, parts[0], step, step)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(sums: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
            number, rows = part
            return jax.tree.map(jnp.add, sums, gradients(params, rows, step, number)), None

        sums, _ = jax.lax.scan(add, zeros, (jnp.arange(num, dtype=jnp.int32), parts))
        return jax.tree.map(lambda leaf: leaf / num, sums)

    def train_step(state: State, tokens: Integer[Array, "B columns"], learning_rate: Float[Array, ""]):
        tokens = tokens.astype(jnp.int32)
        params = state["params"]
        grads, (loss, z_loss) = accumulated(params, tokens, state["step"])
        grad_norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, moments = optimizer.update(grads, state["optimizer"], params)
        updated = jax.tree.map(lambda leaf, update: leaf - learning_rate * update, params, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, old)

        is_first_bad = ~is_finite & (state["first_bad_step"] < 0)
        result = {
            "step": state["step"] + 1,
            "params": keep(updated, params),
            "optimizer": keep(moments, state["optimizer"]),
            "first_bad_step": jnp.where(is_first_bad, state["step"], state["first_bad_step"]),
        }
        if options.ema_decay:
            # Early on the average forgets faster, or the random start would stay in it for 1 / (1 - decay) steps.
            decay = jnp.minimum(options.ema_decay, (1.0 + state["step"]) / (10.0 + state["step"]))
            result["ema"] = jax.tree.map(
                lambda average, leaf: average + (1 - decay) * (leaf - average), state["ema"], result["params"]
            )
        metrics = {
            "loss": loss,
            "z_loss": z_loss,
            "grad_norm": grad_norm,
            "first_bad_step": result["first_bad_step"],
        }
        return result, metrics

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    # Said outright: moments must stay where their weights are, whatever the compiler would like.
    placed = state_shardings(config, options, mesh), sharding.replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=placed)


@functools.lru_cache(maxsize=8)
def make_eval_step(
    config: FalconConfig, options: StepOptions, forward: ForwardOptions, mesh: Mesh | None = None
) -> Callable[[Params, Any, Any], jax.Array]:
    """eval_step(params, tokens [B, T+1], counts [B]) -> float32 [B, T]: nats of each real target, 0 elsewhere."""
    compute_dtype = jnp.dtype(options.compute_dtype)

    def eval_step(
        params: Params, tokens: Integer[Array, "B columns"], counts: Integer[Array, " B"]
    ) -> Float[Array, "B T"]:
        decoder = model_params.bind(config, model_params.cast(params, compute_dtype), forward, mesh)
        return loss_sums(decoder, tokens.astype(jnp.int32), counts, options.loss_chunk_tokens)[2]

    return jax.jit(eval_step)
