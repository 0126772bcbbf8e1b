"""What is compiled: the functions that read a prompt, choose tokens and decode, as pure functions of arrays.

Owns how they are jitted. Knows no request and keeps nothing between calls: that is the engine's.
Letters: B batch, T query tokens, S cache length, D width, V vocabulary, E end-of-text tokens, P prompts.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from falcon_jax import sharding
from falcon_jax.generate import speculate
from falcon_jax.generate.sampling import SamplingKind, SamplingValues, sample_at
from falcon_jax.generate.state import CHUNK, Chunk, DecodeState, Model, Request, Rows
from falcon_jax.model.cache import KVCache
from falcon_jax.model.decoder import FalconDecoder
from falcon_jax.model.params import Params, bind, bind_block
from falcon_jax.model.peers import Peers
from falcon_jax.model.stages import NormSums, norm_sums

# Kinds of operations that XLA captures in CUDA graphs, which it calls command buffers, five or more to a graph. Its own
# choice leaves loops out, so that between two steps the GPU waits for the host, 40 to 200 us (benchmarks/LOG.md).
# And a loop counts as one operation, with what comes before it often four, so that a graph may have as few as it likes.
WITH_LOOPS_IN_CUDA_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
# In such a graph one thing follows the other, by XLA's choice. Here what reads nothing of one another runs at the same
# time: small operations around the layers, and attention (model/beside.py). Not measured with jax 0.12.
AT_THE_SAME_TIME = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"} if jax.__version_info__ < (0, 12) else {}
WITHOUT_CUDA_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
# What XLA sends from device to device is in no graph, by its choice. Where a layer ends in such a sum, there are four
# launches between two of them, and XLA makes no graph of fewer than five.
WITH_SMALL_CUDA_GRAPHS = {"xla_gpu_graph_min_graph_size": 2}


class Program[**P, R]:
    """A jitted function of a model, whose `cuda_graphs` decides how it is compiled.

    Args:
      function: takes its `model`, which is static, by keyword.
      loops: whether it is a loop, which on one device, or over several whose kernels reach each other's memory
        (`peers`), belongs into a CUDA graph as a whole; else, where a loop around what XLA sends from one to another
        cannot, in graphs as small as its parts are. A choice in XLA_FLAGS stands.
      concurrent: whether, in a loop's graph, what can run at the same time does.
      options: of jax.jit, without "model" among the static arguments.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        static_argnames: str | tuple[str, ...] = (),
        loops: bool = False,
        concurrent: bool = False,
        **options: Any,
    ):
        names = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
        # jax.jit takes XLA's options where it wraps and not where it is called.
        wrap = functools.partial(jax.jit, function, static_argnames=("model", *names), **options)
        self._default = wrap()
        flags = os.environ.get("XLA_FLAGS", "")

        def unless_chosen(options: dict[str, Any]) -> Any:
            return self._default if any(name in flags for name in options) else wrap(compiler_options=options)

        in_one_graph = WITH_LOOPS_IN_CUDA_GRAPHS | (AT_THE_SAME_TIME if concurrent else {})
        self._whole = unless_chosen(in_one_graph) if loops else self._default
        self._concurrent = concurrent and bool(AT_THE_SAME_TIME) and self._whole is not self._default
        self._over_mesh = unless_chosen(WITH_SMALL_CUDA_GRAPHS) if loops else self._default
        self._without_cuda_graphs = wrap(compiler_options=WITHOUT_CUDA_GRAPHS)
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._wrapped(kwargs)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As the method of what jax.jit returns: arguments may be shapes."""
        return self._wrapped(kwargs).lower(*args, **kwargs)

    def is_concurrent(self, model: Model, peers: Peers | None = None) -> bool:
        """Whether what can run at the same time does, as this is compiled for a model."""
        return self._concurrent and self._wrapped({"model": model, "peers": peers}) is self._whole

    def _wrapped(self, keywords: Any) -> Any:
        model: Model = keywords["model"]
        if not model.cuda_graphs:
            return self._without_cuda_graphs
        has_collectives = model.mesh is not None and keywords.get("peers") is None
        return self._over_mesh if has_collectives else self._whole


@functools.partial(Program, static_argnames="is_first", donate_argnames=("cache", "last"))
def prefill(
    params: Params,
    token_ids: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, " B"],
    cache: KVCache,
    last: Float[Array, "B D"],
    *,
    model: Model,
    is_first: bool,
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Reads columns start .. start + T of the prompts; `last` collects the state of each row's last token.

    The first call, with start = 0, attends to its own T keys alone instead of the whole empty cache.
    """
    T = token_ids.shape[1]
    num_tokens = jnp.clip(lengths - start, 0, T)
    hidden, cache = _read(_decoder(params, model), token_ids, cache, num_tokens, cache_is_empty=is_first)
    column = lengths - 1 - start
    picked = jnp.take_along_axis(hidden, jnp.clip(column, 0, T - 1)[:, None, None], axis=1)[:, 0]
    last = jnp.where(((column >= 0) & (column < T))[:, None], picked, last)
    return _lay_out((cache, last), model.mesh)


@functools.partial(Program, static_argnames="num_copies")
def repeat_rows(
    cache: KVCache, last: Float[Array, "P D"], *, model: Model, num_copies: int
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Each row `num_copies` times, copies side by side."""
    return _lay_out((cache.repeat(num_copies), jnp.repeat(last, num_copies, axis=0)), model.mesh)


@functools.partial(Program, static_argnames=("kind", "num_drafted"))
def first_token(
    params: Params,
    last: Float[Array, "B D"],
    lengths: Int[Array, " B"],
    max_new_tokens: Int[Array, ""],
    seen: Bool[Array, "B V"] | None,
    history: Int[Array, "B S"] | None,
    keys: Key[Array, " B"] | None,
    values: SamplingValues,
    eos_token_ids: Int[Array, " E"],
    *,
    model: Model,
    kind: SamplingKind,
    num_drafted: int,
) -> tuple[Rows, Chunk, Request]:
    """Chooses the token after each prompt; notes it in `seen` and `history`.

    Returns all that decoding begins with but the cache, and the request for a whole chunk: made here it lies where the
    parameters do. An array that the host made is tied to no device, and what decodes would be compiled once for such a
    one and again for its own results.
    """
    logits = _decoder(params, model).logits(last)
    tokens, logprobs, seen = _choose(logits, keys, lengths, seen, values, kind)
    if history is not None:
        history = speculate.append(history, tokens[:, None], lengths, jnp.ones_like(lengths))
    empty = Chunk.empty(tokens.shape[0], num_drafted)
    one = jnp.ones_like(tokens)
    chunk = Chunk(empty.tokens.at[:, 0].set(tokens), empty.logprobs.at[:, 0].set(logprobs), one, empty.steps)
    left = jnp.full_like(tokens, max_new_tokens - 1)
    rows = Rows(tokens, jnp.isin(tokens, eos_token_ids) | (left == 0), left, seen, history)
    request = Request(jnp.int32(CHUNK), jnp.zeros_like(rows.done))
    return _lay_out((rows, chunk, request), model.mesh)


# Kept where nothing reads it, what is donated is memory for what is returned.
@functools.partial(Program, donate_argnames="request", keep_unused=True)
def ask(request: Request, num_steps: Int[Array, ""], stopped: Bool[Array, " B"], *, model: Model) -> Request:
    """Another request in the same memory: arrays that lie elsewhere cost a CUDA graph tens of milliseconds."""
    return _lay_out(jax.tree.map(jnp.copy, Request(num_steps, stopped)), model.mesh)  # uncopied they come back as given


@Program
def copy_made(state: DecodeState, *, model: Model) -> tuple[Chunk, Bool[Array, " B"]]:
    """A chunk and which rows are done, to be read while the next call writes over both."""
    return _lay_out(jax.tree.map(jnp.copy, (state.chunk, state.rows.done)), model.mesh)


@functools.partial(
    Program, static_argnames="kind", donate_argnames="state", keep_unused=True, loops=True, concurrent=True
)
def decode(
    params: Params,
    state: DecodeState,
    request: Request,
    keys: Key[Array, " B"] | None,
    values: SamplingValues,
    eos_token_ids: Int[Array, " E"],
    *,
    peers: Peers | None = None,
    norm_sums: list[NormSums] | None = None,
    model: Model,
    kind: SamplingKind,
) -> DecodeState:
    """Makes up to min(num_steps, 32) tokens a row; ends early once all rows are done.

    Args:
      state: donated; its chunk is emptied first.
      request: traced, so that streaming by the token and generating by the chunk run the same executable.
      keys: one a row, into which each step folds the position; None for greedy.
      eos_token_ids: a row that makes one of them is done, that token being its last. No logit is masked.
      peers: how kernels on the devices of the model's mesh reach each other's memory; None: XLA adds up and gathers
        what the devices make.
      norm_sums: each layer's, where steps of so many tokens read them (model/stages.py); or None.
    """
    decoder = _decoder(params, model, concurrent=decode.is_concurrent(model, peers))

    def advance(step: Array, state: DecodeState) -> DecodeState:
        rows, chunk = state.rows, state.chunk
        active = (~rows.done).astype(jnp.int32)
        hidden, cache = _read(decoder, rows.tokens[:, None], state.cache, active, peers=peers, norm_sums=norm_sums)
        logits = decoder.logits(hidden[:, 0], peers)
        tokens, logprobs, seen = _choose(logits, keys, cache.lengths, rows.seen, values, kind)
        tokens = jnp.where(rows.done, rows.tokens, tokens)
        chunk = Chunk(
            jax.lax.dynamic_update_slice(chunk.tokens, tokens[:, None], (0, step)),
            jax.lax.dynamic_update_slice(chunk.logprobs, logprobs[:, None], (0, step)),
            chunk.counts + active,
            chunk.steps + active,
        )
        left = rows.left - active
        done = rows.done | jnp.isin(tokens, eos_token_ids) | (left == 0)
        return DecodeState(cache, Rows(tokens, done, left, seen), chunk)

    return _repeat(advance, request, state, model.mesh)


# Not concurrent: that has not run on a GPU.
@functools.partial(
    Program, static_argnames=("num_drafted", "kind"), donate_argnames="state", keep_unused=True, loops=True
)
def decode_drafted(
    params: Params,
    state: DecodeState,
    request: Request,
    keys: Key[Array, " B"] | None,
    values: SamplingValues,
    eos_token_ids: Int[Array, " E"],
    *,
    peers: Peers | None = None,
    norm_sums: list[NormSums] | None = None,
    num_drafted: int,
    model: Model,
    kind: SamplingKind,
) -> DecodeState:
    """`decode` with 1 to 1 + `num_drafted` tokens a row and step, the same tokens (see `speculate`).

    Args:
      state: donated; with a history, and a chunk that has room for so many.
      num_drafted: at least 1; static, as it decides the shapes.
      request, keys, eos_token_ids, peers, norm_sums: as in `decode`.
    """
    decoder = _decoder(params, model)

    def forward(token_ids: Array, cache: KVCache, num_tokens: Array) -> tuple[Float[Array, "B T V"], KVCache]:
        hidden, cache = _read(decoder, token_ids, cache, num_tokens, peers=peers, norm_sums=norm_sums)
        return decoder.logits(hidden, peers), cache

    def advance(step: Array, state: DecodeState) -> DecodeState:
        return speculate.advance(state, forward, keys, values, eos_token_ids, kind=kind, num_drafted=num_drafted)

    return _repeat(advance, request, state, model.mesh)


@Program
def all_logits(
    params: Params, token_ids: Int[Array, "B T"], lengths: Int[Array, " B"], *, model: Model
) -> Float[Array, "B T V"]:
    """Float32 logits at every position, without a cache."""
    decoder = _decoder(params, model)
    hidden, _ = decoder(token_ids, num_tokens=lengths)
    return decoder.logits(hidden)


@Program
def norm_sums_of_layer(layer: Params, *, model: Model) -> NormSums:
    """What decoding is given of each layer as `norm_sums`."""
    return norm_sums(bind_block(model.config, layer), model.options.stages)


def _decoder(params: Params, model: Model, *, concurrent: bool = False) -> FalconDecoder:
    options = dataclasses.replace(model.options, concurrent=concurrent)
    return bind(model.config, params, options, model.mesh)


def _read(
    decoder: FalconDecoder,
    token_ids: Int[Array, "B T"],
    cache: KVCache,
    num_tokens: Int[Array, " B"],
    *,
    cache_is_empty: bool = False,
    peers: Peers | None = None,
    norm_sums: list[NormSums] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    options = {"cache_is_empty": cache_is_empty, "peers": peers, "norm_sums": norm_sums}
    hidden, filled = decoder(token_ids, cache=cache, num_tokens=num_tokens, **options)
    assert filled is not None  # a cache came in
    return hidden, filled


def _choose(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"] | None,
    positions: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    values: SamplingValues,
    kind: SamplingKind,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Bool[Array, "B V"] | None]:
    """Samples the token at each row's position, and notes it as seen where a penalty asks for that."""
    tokens, logprobs = sample_at(logits, keys, positions, values, seen, kind)
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    return tokens, logprobs, seen


def _repeat(
    advance: Callable[[Array, DecodeState], DecodeState], request: Request, state: DecodeState, mesh: Mesh | None
) -> DecodeState:
    """advance(step, state), over and over: up to min(num_steps, 32) times, or until all rows are done."""
    rows = dataclasses.replace(state.rows, done=state.rows.done | request.stopped)
    state = DecodeState(state.cache, rows, state.chunk.emptied())

    def unfinished(carry: tuple[Array, DecodeState]) -> Bool[Array, ""]:
        step, state = carry
        return (step < jnp.minimum(request.num_steps, CHUNK)) & ~jnp.all(state.rows.done)

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        step, state = carry
        return step + 1, _lay_out(advance(step, state), mesh)

    return _lay_out(jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1], mesh)


def _lay_out(tree, mesh: Mesh | None):
    """Pins arrays of rows to their layout on the mesh, so that results fit the next call without a copy."""
    if mesh is None:
        return tree

    def pin(array: Array) -> Array:
        return jax.lax.with_sharding_constraint(array, sharding.rows_sharding(array.shape, mesh))

    return jax.tree.map(pin, tree)
