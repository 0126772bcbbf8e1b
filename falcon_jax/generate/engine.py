"""Token ids in, token ids out: prefill, then decode in chunks.

Owns the jitted functions, the decode state and the host loop around them. Knows no text. Rows are
left-aligned: a row's token at position p lies in cache slot p, padding lies past a row's length and is never
attended to, so a row's result does not depend on its batch mates.

The trap: everything that changes from call to call (prompts, lengths, number of steps, sampling values,
seeds) is traced or padded to a bucket; a Python value that slips into a jitted function costs a compilation a
call.
Letters: B batch, T query tokens, S cache length, D width, V vocabulary, C tokens of a chunk, E end-of-text
tokens, P prompts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.generate import batching, limits
from falcon_jax.generate.sampling import Sampling, SamplingKind, SamplingValues, row_keys, sample
from falcon_jax.model.cache import KVCache
from falcon_jax.model.decoder import FalconDecoder
from falcon_jax.model.params import Params, bind
from falcon_jax.model.step import ForwardOptions

# C: the most steps that one call of `decode` makes. The host looks at the tokens only between calls.
CHUNK = 32


class Model(NamedTuple):
    """What is static in every jitted function here; engines with equal ones share executables."""

    config: FalconConfig
    options: ForwardOptions
    mesh: Mesh | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeState:
    """What a step reads and writes; donated to every call of `decode`.

    cache: all tokens but each row's last.
    tokens: each row's last token, which the next step feeds.
    done: rows that have ended; they write nothing and keep their length.
    seen: tokens in the prompt or generated; None without a repetition penalty.
    """

    cache: KVCache
    tokens: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None


class Chunk(NamedTuple):
    """What some steps made: row b's new tokens are its first counts[b] columns. Log probabilities float32."""

    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]
    counts: Int[Array, " B"]
    done: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames=("model", "is_first"), donate_argnames=("cache", "last"))
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


@functools.partial(jax.jit, static_argnames=("model", "num_copies"))
def repeat_rows(
    cache: KVCache, last: Float[Array, "P D"], *, model: Model, num_copies: int
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Each row `num_copies` times, copies side by side."""
    return _lay_out((cache.repeat(num_copies), jnp.repeat(last, num_copies, axis=0)), model.mesh)


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def first_token(
    params: Params,
    last: Float[Array, "B D"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"] | None,
    seen: Bool[Array, "B V"] | None,
    values: SamplingValues,
    eos_token_ids: Int[Array, " E"],
    *,
    model: Model,
    kind: SamplingKind,
) -> tuple[Bool[Array, "B V"] | None, Chunk]:
    """Chooses the token after each prompt, as a chunk of one column."""
    logits = _decoder(params, model).logits(last)
    tokens, logprobs, seen = _choose(logits, keys, lengths, seen, values, kind)
    done = jnp.isin(tokens, eos_token_ids)
    seen, tokens, done, logprobs = _lay_out((seen, tokens, done, logprobs), model.mesh)
    return seen, Chunk(tokens[:, None], logprobs[:, None], jnp.ones_like(tokens), done)


@functools.partial(jax.jit, static_argnames=("model", "kind"), donate_argnames="state")
def decode(
    params: Params,
    state: DecodeState,
    num_steps: Int[Array, ""],
    stopped: Bool[Array, " B"],
    keys: Key[Array, " B"] | None,
    values: SamplingValues,
    eos_token_ids: Int[Array, " E"],
    *,
    model: Model,
    kind: SamplingKind,
) -> tuple[DecodeState, Chunk]:
    """Makes up to min(num_steps, C) tokens a row; ends early once all rows are done.

    Args:
      state: donated.
      num_steps: traced, so that streaming by the token and generating by the chunk run the same executable.
      stopped: rows that the host has ended since the last call.
      keys: one a row, into which each step folds the position; None for greedy.
      eos_token_ids: a row that makes one of them is done, that token being its last. No logit is masked.
    """
    decoder = _decoder(params, model)
    B = state.tokens.shape[0]
    state = dataclasses.replace(state, done=state.done | stopped)
    empty = Chunk(jnp.zeros((B, CHUNK), jnp.int32), jnp.zeros((B, CHUNK)), jnp.zeros(B, jnp.int32), state.done)

    def unfinished(carry: tuple[Array, DecodeState, Chunk]) -> Bool[Array, ""]:
        step, state, _ = carry
        return (step < jnp.minimum(num_steps, CHUNK)) & ~jnp.all(state.done)

    def advance(carry: tuple[Array, DecodeState, Chunk]) -> tuple[Array, DecodeState, Chunk]:
        step, state, chunk = carry
        active = ~state.done
        hidden, cache = _read(decoder, state.tokens[:, None], state.cache, active.astype(jnp.int32))
        logits = decoder.logits(hidden[:, 0])
        tokens, logprobs, seen = _choose(logits, keys, cache.lengths, state.seen, values, kind)
        tokens = jnp.where(active, tokens, state.tokens)
        chunk = Chunk(
            jax.lax.dynamic_update_slice(chunk.tokens, tokens[:, None], (0, step)),
            jax.lax.dynamic_update_slice(chunk.logprobs, logprobs[:, None], (0, step)),
            chunk.counts + active.astype(jnp.int32),
            state.done | jnp.isin(tokens, eos_token_ids),
        )
        return step + 1, _lay_out(DecodeState(cache, tokens, chunk.done, seen), model.mesh), chunk

    _, state, chunk = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state, empty))
    return _lay_out(state, model.mesh), chunk


@functools.partial(jax.jit, static_argnames="model")
def all_logits(
    params: Params, token_ids: Int[Array, "B T"], lengths: Int[Array, " B"], *, model: Model
) -> Float[Array, "B T V"]:
    """Float32 logits at every position, without a cache."""
    decoder = _decoder(params, model)
    hidden, _ = decoder(token_ids, num_tokens=lengths)
    return decoder.logits(hidden)


class Engine:
    """The jitted functions with one model's parameters, and the memory it may use.

    Args:
      config, params, options: the model. Params may be sharded over `mesh`; rows are then split over its
        "data" and "fsdp" axes where they divide.
      max_cache_tokens: most tokens of a row, prompt and new ones; None: 8 times the trained length, at least
        32768.
      max_cache_bytes: most bytes of cache on a device; None: what is free.
    """

    def __init__(
        self,
        config: FalconConfig,
        params: Params,
        options: ForwardOptions | None = None,
        mesh: Mesh | None = None,
        *,
        max_cache_tokens: int | None = None,
        max_cache_bytes: int | None = None,
    ):
        self.model = Model(config, options or ForwardOptions(), mesh)
        self.params = params
        self.max_cache_tokens = max_cache_tokens
        self.max_cache_bytes = max_cache_bytes
        self.dtype: jnp.dtype = params["embed"]["weight"].dtype
        # Never empty, so that a model without an end-of-text token needs no code of its own.
        self.eos_token_ids = np.array(config.eos_token_ids or (-1,), np.int32)

    def logits(self, token_ids: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"]) -> Float[Array, "B T V"]:
        """Float32 logits of right-padded rows. Inside, T is padded to a bucket: lengths share executables."""
        num_columns = token_ids.shape[1]
        size = batching.round_up(num_columns, batching.MIN_BUCKET)
        padded = np.pad(token_ids, ((0, 0), (0, size - num_columns)))
        logits = all_logits(self.params, *self._rows(padded, lengths), model=self.model)
        return logits[:, :num_columns]

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        num_samples: int = 1,
        seed: int = 0,
    ) -> "Generation":
        """Prefills the prompts, each once, and returns the run, which has `num_samples` rows a prompt.

        Raises:
          RequestError: the cache cannot hold that many tokens.
        """
        return Generation(self, prompts, max_new_tokens, sampling, num_samples, seed)

    def check(self, longest_prompt: int, num_prompts: int, num_samples: int, max_new_tokens: int) -> None:
        """Raises RequestError where a run of this size would not fit the cache."""
        limits.check_cache(
            self.model.config,
            num_rows=num_prompts * num_samples,
            num_tokens=longest_prompt + max_new_tokens,
            capacity=self._plan(longest_prompt, num_prompts, max_new_tokens)[1],
            dtype=self.dtype,
            mesh=self.model.mesh,
            max_cache_tokens=self.max_cache_tokens,
            max_cache_bytes=self.max_cache_bytes,
        )

    def _plan(self, longest_prompt: int, num_prompts: int, max_new_tokens: int) -> tuple[list[int], int]:
        """The sizes of the prefill calls, and the cache's capacity."""
        rope = self.model.config.rope
        whole = rope is not None and rope.scaling == "dynamic"
        sizes = batching.prefill_sizes(longest_prompt, num_prompts, whole=whole)
        return sizes, batching.cache_capacity(longest_prompt + max_new_tokens, sizes)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_samples: int
    ) -> tuple[KVCache, Float[Array, "B D"]]:
        """A cache of the prompts, with room for `max_new_tokens` more, and each last token's hidden state."""
        config, num_rows = self.model.config, len(prompts)
        sizes, capacity = self._plan(max(map(len, prompts)), num_rows, max_new_tokens)
        token_ids, lengths = batching.pad_rows(prompts, sum(sizes))
        (lengths,) = self._rows(lengths)
        cache = KVCache.create(config, num_rows, capacity, self.dtype, self.model.mesh)
        (last,) = self._rows(np.zeros((num_rows, config.width), self.dtype))
        start = 0
        for size in sizes:
            (columns,) = self._rows(token_ids[:, start : start + size])
            cache, last = prefill(
                self.params, columns, np.int32(start), lengths, cache, last, model=self.model, is_first=start == 0
            )
            start += size
        if num_samples > 1:
            return repeat_rows(cache, last, model=self.model, num_copies=num_samples)
        return cache, last

    def _rows(self, *arrays: np.ndarray) -> tuple[Array, ...]:
        """Arrays of rows on the device, split over the mesh where there is one."""
        mesh = self.model.mesh
        if mesh is None:
            return tuple(jax.device_put(array) for array in arrays)
        return tuple(jax.device_put(array, sharding.batch_sharding(array.shape, mesh)) for array in arrays)


class Generation:
    """One run: rows ordered by prompt, then by sample, each growing until it ends or has max_new_tokens.

    `next_chunk` blocks until its tokens are there: with chunks of up to 32 steps the gap between calls, in
    which the host turns ids into text, is under a hundredth of a call, and stop strings take effect in the
    very next one.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        num_samples: int,
        seed: int,
    ):
        num_rows = len(prompts) * num_samples
        engine.check(max(map(len, prompts)), len(prompts), num_samples, max_new_tokens)
        self.num_rows = num_rows
        self.num_left = max_new_tokens
        self.done = np.zeros(num_rows, bool)
        self._engine = engine
        self._kind = sampling.kind
        self._keys = None if self._kind.greedy else row_keys(seed, len(prompts), num_samples)
        if self._keys is not None and engine.model.mesh is not None:
            self._keys = jax.device_put(self._keys, sharding.replicated(engine.model.mesh))
        self._fixed = (sampling.values, engine.eos_token_ids)

        cache, last = engine._prefill(prompts, max_new_tokens, num_samples)
        seen = None
        if self._kind.repetition:
            mask = batching.seen_tokens(prompts, engine.model.config.vocab_size)
            (seen,) = engine._rows(np.repeat(mask, num_samples, axis=0))
        seen, self._first = first_token(
            engine.params,
            last,
            cache.lengths,
            self._keys,
            seen,
            *self._fixed,
            model=engine.model,
            kind=self._kind,
        )
        self._state = DecodeState(cache, self._first.tokens[:, 0], self._first.done, seen)

    @property
    def finished(self) -> bool:
        """Whether no row will get another token."""
        return self.num_left == 0 or bool(self.done.all())

    def stop(self, row: int) -> None:
        """Ends a row from outside (a stop string): it gets no more tokens from the next chunk on."""
        self.done[row] = True

    def next_chunk(self, max_tokens: int = CHUNK) -> tuple[list[list[int]], list[list[float]]]:
        """Up to `max_tokens` (at most 32) new ids a row, and their log probabilities.

        The first call returns one a row: it comes from the prefill.

        Rows that have ended get none. An end-of-text token is returned, as its row's last.
        """
        if self._first is not None:
            chunk, self._first = self._first, None
            num_steps = 1
        else:
            num_steps = min(max_tokens, self.num_left, CHUNK)
            self._state, chunk = decode(
                self._engine.params,
                self._state,
                np.int32(num_steps),
                self.done,
                self._keys,
                *self._fixed,
                model=self._engine.model,
                kind=self._kind,
            )
        tokens, logprobs, counts, done = jax.device_get(chunk)
        self.num_left -= num_steps
        self.done = self.done | done
        return (
            [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)],
            [row[:count].tolist() for row, count in zip(logprobs, counts, strict=True)],
        )


def _decoder(params: Params, model: Model) -> FalconDecoder:
    return bind(model.config, params, model.options, model.mesh)


def _read(
    decoder: FalconDecoder,
    token_ids: Int[Array, "B T"],
    cache: KVCache,
    num_tokens: Int[Array, " B"],
    *,
    cache_is_empty: bool = False,
) -> tuple[Float[Array, "B T D"], KVCache]:
    hidden, filled = decoder(token_ids, cache=cache, num_tokens=num_tokens, cache_is_empty=cache_is_empty)
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
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, positions)
    tokens, logprobs = sample(logits, keys, values, seen, kind)
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    return tokens, logprobs, seen


def _lay_out(tree, mesh: Mesh | None):
    """Pins arrays of rows to their layout on the mesh, so that results fit the next call without a copy."""
    if mesh is None:
        return tree

    def pin(array: Array) -> Array:
        # Cache arrays alone have four axes.
        rule = sharding.cache_sharding if array.ndim == 4 else sharding.batch_sharding
        return jax.lax.with_sharding_constraint(array, rule(array.shape, mesh))

    return jax.tree.map(pin, tree)
