"""One training step: loss, gradient, clipped AdamW, all in one executable with a donated state.

Owns the training state and what becomes of it in a step. Knows nothing of files, schedules or time. float32: master
weights, loss, gradients, optimizer; the forward and backward products run in the compute dtype. Over a mesh each device
runs `_local_gradients` on its rows and layers (weights.py says what it exchanges), and XLA the optimizer on all of it.
The one trap: what is summed over devices must be scaled by the whole batch's targets, not by a device's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Integer, Key

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.model.params import Params
from falcon_jax.train import loss as train_loss
from falcon_jax.train import pipeline
from falcon_jax.train import weights as train_weights
from falcon_jax.train.forward import Forward, row_keys, without_layers
from falcon_jax.train.loss import LossSums

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
    max_grad_norm: float = 1.0  # 0: gradients are not clipped
    z_loss: float = 1e-4
    ema_decay: float = 0.0  # 0: no average is kept
    num_micro_batches: int = 1  # of a batch, one after the other; in a pipeline a multiple of its stages
    loss_chunk_tokens: int = 4096  # whose logits exist at once
    compute_dtype: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(COMPUTE_DTYPES)}}}")] = "bfloat16"
    dropout: float = 0.0  # of what blocks add to the residual; helps where the data is seen many times
    dropout_seed: int = 0
    separator: Annotated[int | None, tyro.conf.Suppress] = (
        None  # token that begins a document, which then sees no earlier one; None: they do
    )
    pipeline_rounds: int = 1  # times that a micro-batch goes around a pipeline's stages
    splits_sequence: bool = False  # between blocks tokens lie split over "tensor": less memory, the same traffic

    def __post_init__(self) -> None:
        for name in ("num_micro_batches", "loss_chunk_tokens", "pipeline_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ConfigError(f"compute_dtype is {self.compute_dtype!r}; it must be one of {', '.join(COMPUTE_DTYPES)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 < self.epsilon < math.inf:
            raise ConfigError(f"epsilon is {self.epsilon}; it must be a number above 0")
        for name in ("weight_decay", "max_grad_norm", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a number of at least 0 (0: none)")
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
        optax.clip_by_global_norm(options.max_grad_norm) if options.max_grad_norm else optax.identity(),
        optax.scale_by_adam(options.beta1, options.beta2, options.epsilon),
        optax.add_decayed_weights(
            options.weight_decay, mask=functools.partial(decay_mask, decay_embedding=options.decay_embedding)
        ),
    )


# The state.


def init_state(
    config: FalconConfig,
    options: StepOptions,
    seed: int,
    mesh: Mesh | None = None,
    params: Params | None = None,
) -> State:
    """A fresh training state: random float32 weights (or `params`, donated where there is no mesh), empty moments, step
    0; over `mesh`.

    On a mesh with a "stage" axis the layers of all leaves but scalars are those of `pipeline.stack`.
    """
    if params is None:
        params = model_params.init(config, jax.random.key(seed), jnp.float32, mesh)
    return _state_maker(config, options, mesh)(params)


@functools.lru_cache(maxsize=8)
def _state_maker(config: FalconConfig, options: StepOptions, mesh: Mesh | None) -> Callable[[Params], State]:
    placed = None if mesh is None else state_shardings(config, options, mesh)
    make = functools.partial(_with_moments, options=options, mesh=mesh)
    # Over a mesh weights lie otherwise than in a model that is served, so that their buffers could not be reused.
    return jax.jit(make, out_shardings=placed, donate_argnums=0 if mesh is None else ())


def _with_moments(params: Params, options: StepOptions, mesh: Mesh | None) -> State:
    if num_stages(mesh) > 1:
        params = pipeline.stack(params, num_stages(mesh), options.pipeline_rounds)
    return with_moments(params, options)


def with_moments(params: Params, options: StepOptions) -> State:
    """The state of a run that begins with these weights, whatever they are of."""
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


def num_stages(mesh: Mesh | None) -> int:
    """Stages of the pipeline, 1 where there is none."""
    return 1 if mesh is None else mesh.shape[sharding.STAGE_AXIS]


def abstract_state(config: FalconConfig, options: StepOptions, mesh: Mesh | None = None) -> State:
    """The state's shapes, dtypes and, with a mesh, shardings, without any data: what a checkpoint is restored into."""
    params = model_params.abstract(config, jnp.float32)
    abstract = jax.eval_shape(lambda params: _with_moments(params, options, mesh), params)
    if mesh is None:
        return abstract
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        state_shardings(config, options, mesh),
    )


def state_shardings(config: FalconConfig, options: StepOptions, mesh: Mesh) -> State:
    """Where each leaf of the state lies."""
    params = model_params.abstract(config, jnp.float32)
    abstract = jax.eval_shape(lambda params: _with_moments(params, options, mesh), params)
    layout = _layout(abstract["params"], mesh)
    of_params = jax.tree.map(lambda place: jax.sharding.NamedSharding(mesh, place.spec), layout)
    return placed_like(abstract, of_params, options, mesh)


def placed_like(abstract: State, of_params: Params, options: StepOptions, mesh: Mesh) -> State:
    """A state's layout from that of what it trains: moments and average with it, scalars everywhere."""
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


def model_of(params: Params, mesh: Mesh | None) -> Params:
    """Weights of a state (or its average) as the model's own tree, for export and sampling."""
    return pipeline.unstack(params) if num_stages(mesh) > 1 else params


def _layout(params: Params, mesh: Mesh | None) -> Params:
    return train_weights.placements(params, mesh, pipeline.NUM_STACKED if num_stages(mesh) > 1 else 0)


# The step.


@functools.lru_cache(maxsize=8)  # one executable for all runs of one shape in a process
def make_train_step(
    config: FalconConfig, options: StepOptions, forward: ForwardOptions, mesh: Mesh | None = None
) -> Callable[..., tuple[State, Metrics]]:
    """train_step(state, tokens, learning_rate, num_used=None) -> (state, metrics); the state is donated.

    tokens: [A, R, T+1], A micro-batches of R rows, or [B, T+1], cut into options.num_micro_batches. num_used (int32
    scalar): only so many of the micro-batches count, the first ones, with no other compilation; not in a pipeline,
    whose A is another program each. Metrics are float32 scalars on the device: loss (nats a token), z_loss, grad_norm
    (before clipping), and first_bad_step (int32, -1 while every loss and gradient was finite). A step that is not
    finite changes no weight.

    Raises (when called): ConfigError where rows, layers or micro-batches do not fall evenly over the mesh.
    """
    gradients = make_gradients(config, options, forward, mesh)

    def train_step(
        state: State,
        tokens: Integer[Array, "B columns"] | Integer[Array, "A R columns"],
        learning_rate: Float[Array, ""],
        num_used: Integer[Array, ""] | None = None,
    ) -> tuple[State, Metrics]:
        tokens = micro_batches(tokens.astype(jnp.int32), options.num_micro_batches)
        key = dropout_key(options, state["step"])
        grads, (loss, z_loss) = gradients(state["params"], tokens, key, num_used)
        return updated(state, grads, loss, z_loss, learning_rate, options)

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    # Said outright: moments must stay where their weights are, whatever the compiler would like.
    placed = state_shardings(config, options, mesh), sharding.replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=placed)


def micro_batches(tokens: Integer[Array, "..."], count: int) -> Integer[Array, "A R columns"]:
    """A batch's rows in `count` micro-batches; what has three dimensions is that already."""
    if tokens.ndim == 3:
        return tokens
    num_rows, columns = tokens.shape
    if num_rows % count:
        raise ConfigError(f"num_micro_batches is {count}, which does not divide the {num_rows} rows of a batch")
    # Every count-th row, so that each micro-batch is spread over all devices that the rows are spread over.
    return jnp.moveaxis(tokens.reshape(num_rows // count, count, columns), 1, 0)


def dropout_key(options: StepOptions, step: Integer[Array, ""]) -> Key[Array, ""] | None:
    """A function of the step's number, so that a resumed run drops what the uninterrupted one does."""
    if options.dropout == 0:
        return None
    # The hardware's generator: threefry would take longer than the blocks' products at small widths.
    return jax.random.fold_in(jax.random.key(options.dropout_seed, impl="rbg"), step)


def updated(
    state: State, grads: Params, loss: Array, z_loss: Array, learning_rate: Array, options: StepOptions
) -> tuple[State, Metrics]:
    """The state after a step with these gradients, unless they or the loss are not finite; and the step's metrics."""
    params = state["params"]
    grad_norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, moments = make_optimizer(options).update(grads, state["optimizer"], params)
    stepped = jax.tree.map(lambda leaf, update: leaf - learning_rate * update, params, updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, old)

    is_first_bad = ~is_finite & (state["first_bad_step"] < 0)
    result = {
        "step": state["step"] + 1,
        "params": keep(stepped, params),
        "optimizer": keep(moments, state["optimizer"]),
        "first_bad_step": jnp.where(is_first_bad, state["step"], state["first_bad_step"]),
    }
    if options.ema_decay:
        # Early on the average forgets faster, or the random start would stay in it for 1 / (1 - decay) steps.
        decay = jnp.minimum(options.ema_decay, (1.0 + state["step"]) / (10.0 + state["step"]))
        result["ema"] = jax.tree.map(
            lambda average, leaf: average + (1 - decay) * (leaf - average), state["ema"], result["params"]
        )
    metrics = {"loss": loss, "z_loss": z_loss, "grad_norm": grad_norm, "first_bad_step": result["first_bad_step"]}
    return result, metrics


def make_gradients(
    config: FalconConfig, options: StepOptions, forward: ForwardOptions, mesh: Mesh | None
) -> Callable[..., tuple[Params, tuple[Array, Array]]]:
    """gradients(params, tokens [A, R, T+1], key, num_used) -> (float32 gradients, (loss, z_loss)), over the mesh."""
    config = dataclasses.replace(config, hidden_dropout=options.dropout)
    run = Forward(config, forward, mesh, options.separator, options.splits_sequence)

    def gradients(params: Params, tokens: Array, key: Array | None, num_used: Array | None):
        A, R, columns = tokens.shape
        _check_rows(A, R, num_used, forward, mesh)
        layout = _layout(params, mesh)

        def local(params: Params, tokens: Array, rows: Array, key: Array | None, num_used: Array | None):
            num_targets = (A if num_used is None else num_used) * R * (columns - 1)
            grads, sums = _local_gradients(run, options, layout, params, tokens, rows, key, num_used)
            sums = train_weights.total(LossSums(*(x / num_targets for x in sums)), mesh)
            return mean_of(train_weights.reduced(grads, layout), num_targets), sums

        arguments = (params, tokens, jnp.arange(R, dtype=jnp.int32), key, num_used)
        if mesh is not None:
            specs = jax.tree.map(train_weights.Placement.manual_spec, layout)
            rows = PartitionSpec(sharding.BATCH_AXES)
            everywhere = PartitionSpec()
            inputs = (specs, PartitionSpec(None, sharding.BATCH_AXES), rows, everywhere, everywhere)
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=inputs,
                out_specs=(specs, everywhere),
                axis_names=set(sharding.MANUAL_AXES),
                check_vma=False,  # kernels' results do not say over which axes they vary
            )
        grads, sums = local(*arguments)
        return grads, (sums.nats, options.z_loss * sums.squares)

    return gradients


def _check_rows(A: int, R: int, num_used: Array | None, forward: ForwardOptions, mesh: Mesh | None) -> None:
    shards, stages = train_weights.num_row_shards(mesh), num_stages(mesh)
    if R % shards:
        raise ConfigError(f"a micro-batch has {R} rows; data * fsdp = {shards} must divide them")
    if stages > 1 and (A % stages or num_used is not None or forward.num_remat_layers is not None):
        raise ConfigError(
            f"a pipeline of {stages} stages takes micro-batches in a multiple of {stages} (these are {A}), all of them "
            "used, and num_remat_layers=None"
        )
    if stages == 1 and forward.remat == "stage":
        raise ConfigError("remat 'stage' is for a pipeline (stage above 1); take 'block'")


def _local_gradients(
    run: Forward,
    options: StepOptions,
    layout: Params,
    params: Params,
    tokens: Integer[Array, "A R columns"],
    rows: Integer[Array, " R"],
    key: Key[Array, ""] | None,
    num_used: Integer[Array, ""] | None,
) -> tuple[Params, LossSums]:
    """What one device's rows (and layers) give: its part of the gradients of the loss's sum over all targets, as the
    sinks have them, and of the sums.

    rows: each row's number in its whole micro-batch.
    """
    weights = train_weights.prepared(params, layout, jnp.dtype(options.compute_dtype))
    sinks = train_weights.sinks(weights, layout)
    A = tokens.shape[0]

    def keys_of(numbers: Array) -> Array | None:  # [n] -> [n, R]
        if key is None:
            return None
        return jax.vmap(lambda number, key=key: row_keys(jax.random.fold_in(key, number), rows))(numbers)

    def objective(sinks: Params, tokens: Array, hidden_of: Callable[[Params], Array]) -> tuple[Array, LossSums]:
        return _loss(run, weights, sinks, layout, hidden_of(sinks), tokens[..., 1:], options)

    if num_stages(run.mesh) > 1:
        keys = keys_of(jnp.arange(A, dtype=jnp.int32))

        def through_pipeline(sinks: Params) -> Array:
            return pipeline.hidden(run, weights, sinks, layout, tokens[..., :-1], keys)

        mine = pipeline.share(tokens, num_stages(run.mesh))
        return jax.grad(objective, has_aux=True)(sinks, mine, through_pipeline)

    def of_micro_batch(number: Array) -> tuple[Params, LossSums]:
        mine = jax.lax.dynamic_index_in_dim(tokens, number, keepdims=False)
        keys = keys_of(number[None])

        def forward(sinks: Params) -> Array:
            return run.hidden(weights, sinks, layout, mine[:, :-1], None if keys is None else keys[0])

        return jax.grad(objective, has_aux=True)(sinks, mine, forward)

    return accumulated(of_micro_batch, sinks, A, num_used)


def mean_of(gradients: Params, num_targets: int | Array) -> Params:
    """From the gradients of a sum over all targets to those of the mean.

    Divided at last, and in float32: of a batch of millions of targets each one's share of the mean is less than float16
    can tell from nothing.
    """
    return jax.tree.map(lambda leaf: leaf / num_targets, gradients)


def accumulated(
    of_micro_batch: Callable[[Array], tuple[Params, LossSums]],
    zeros: Params,
    count: int,
    num_used: Integer[Array, ""] | None,
) -> tuple[Params, LossSums]:
    """The sums of what the micro-batches 0 .. count-1 give, of which the first `num_used` count (None: all)."""
    if count == 1:
        return of_micro_batch(jnp.zeros((), jnp.int32))

    def add(number: Array, sums: Any) -> Any:
        return jax.tree.map(jnp.add, sums, of_micro_batch(number))

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.fori_loop(0, count if num_used is None else num_used, add, (zeros, LossSums(zero, zero)))


def _loss(
    run: Forward,
    weights: Params,
    sinks: Params,
    layout: Params,
    hidden: Float[Array, "... T D"],
    targets: Integer[Array, "... T"],
    options: StepOptions,
) -> tuple[Array, LossSums]:
    """Summed over the targets, from hidden states before the final norm."""
    ends = _ends(run, weights, sinks, layout)
    head, is_transposed = ends.head()
    hidden = ends.final_norm(hidden.reshape(-1, *hidden.shape[-2:]))
    targets = targets.reshape(-1, targets.shape[-1])
    is_real = jnp.ones(targets.shape, bool)
    return train_loss.loss_sums(
        hidden, head, is_transposed, targets, is_real, options.z_loss, options.loss_chunk_tokens
    )


def _ends(run: Forward, weights: Params, sinks: Params, layout: Params):
    whole = train_weights.all_computed(without_layers((weights, sinks)), without_layers(layout))
    return model_params.bind_ends(run.config, whole, run.mesh)


@functools.lru_cache(maxsize=8)
def make_eval_step(
    config: FalconConfig, options: StepOptions, forward: ForwardOptions, mesh: Mesh | None = None
) -> Callable[[Params, Any, Any], jax.Array]:
    """eval_step(params, tokens [B, T+1], counts [B]) -> float32 [B, T]: nats of each real target, 0 elsewhere.

    params: of a training state on the same mesh. counts: how many of a row's targets are real, the first ones.
    """
    forward = dataclasses.replace(forward, remat="none", num_remat_layers=None)
    run = Forward(config, forward, mesh, options.separator, options.splits_sequence)
    stages = num_stages(mesh)

    def eval_step(
        params: Params, tokens: Integer[Array, "B columns"], counts: Integer[Array, " B"]
    ) -> Float[Array, "B T"]:
        layout = _layout(params, mesh)
        num_rows, T = tokens.shape[0], tokens.shape[1] - 1
        padding = -num_rows % (train_weights.num_row_shards(mesh) * stages)
        padded = jnp.pad(tokens.astype(jnp.int32), ((0, padding), (0, 0)))
        padded_counts = jnp.pad(counts.astype(jnp.int32), (0, padding))

        def local(params: Params, tokens: Array, counts: Array) -> Array:
            weights = train_weights.prepared(params, layout, jnp.dtype(options.compute_dtype))
            sinks = train_weights.sinks(weights, layout)  # never read, so never made
            targets = tokens[:, 1:]
            if stages > 1:
                by_stage, counts = tokens.reshape(stages, -1, tokens.shape[1]), counts.reshape(stages, -1)
                hidden = pipeline.hidden(run, weights, sinks, layout, by_stage[..., :-1], None, counts)[0]
                targets = pipeline.share(by_stage, stages)[0, :, 1:]
            else:
                hidden = run.hidden(weights, sinks, layout, tokens[:, :-1], None, counts)
            ends = _ends(run, weights, sinks, layout)
            head, is_transposed = ends.head()
            return train_loss.token_nats(
                ends.final_norm(hidden), head, is_transposed, targets, options.loss_chunk_tokens
            )

        if mesh is not None:
            specs = jax.tree.map(train_weights.Placement.manual_spec, layout)
            rows = PartitionSpec(sharding.BATCH_AXES)
            # A stage's share of a device's rows comes after its rows' place over data and fsdp.
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(specs, rows, rows),
                out_specs=PartitionSpec((*sharding.BATCH_AXES, sharding.STAGE_AXIS)),
                axis_names=set(sharding.MANUAL_AXES),
                check_vma=False,
            )
        nats = local(params, padded, padded_counts)[:num_rows]
        return jnp.where(jnp.arange(T) < counts[:, None], nats, 0.0)

    return jax.jit(eval_step)
