"""Token ids in, token ids out: prefill, then decode in chunks.

Owns the host loop around the functions of `programs`. Knows no text. Rows are left-aligned: a row's token at position
p lies in cache slot p, padding lies past a row's length and is never attended to, so a row's result does not depend on
its batch mates.

The trap: everything that changes from call to call (prompts, lengths, number of steps, sampling values,
seeds) is traced or padded to a bucket; a Python value that slips into a jitted function costs a compilation a
call.
Letters: B batch, T query tokens, D width, V vocabulary, E end-of-text tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import RequestError
from falcon_jax.generate import batching, limits, speculate
from falcon_jax.generate.programs import (
    all_logits,
    ask,
    copy_made,
    decode,
    decode_drafted,
    first_token,
    norm_sums_of_layer,
    prefill,
    repeat_rows,
)
from falcon_jax.generate.sampling import Sampling, SamplingKind, SamplingValues, row_keys
from falcon_jax.generate.state import CHUNK, Chunk, DecodeState, Model, Request
from falcon_jax.model import peers, stages
from falcon_jax.model.cache import KVCache
from falcon_jax.model.params import Params, weights_of
from falcon_jax.model.peers import Peers
from falcon_jax.model.stages import NormSums
from falcon_jax.model.step import ForwardOptions
from pallas_kernels.quantized_matmul.product import ROWS_AT_ONCE

# Of a call of `decode`: its chunk, and which rows are done.
type Made = tuple[Chunk, Bool[Array, " B"]]
type Fixed = tuple[Key[Array, " B"] | None, SamplingValues, Int[Array, " E"]]


class Engine:
    """The jitted functions with one model's parameters, and the memory it may use.

    Args:
      config, params, options: the model. Params may be sharded over `mesh`; rows are then split over its
        "data" and "fsdp" axes where they divide.
      max_cache_tokens: most tokens of a row, prompt and new ones; None: 8 times the trained length, at least
        32768.
      max_cache_bytes: most bytes of cache on a device; None: what is free.
      cuda_graphs: False keeps XLA from capturing kernels in CUDA graphs, as it does by default on a GPU.
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
        cuda_graphs: bool = True,
    ):
        on_gpu = any(device.platform == "gpu" for device in jax.tree.leaves(params)[0].sharding.device_set)
        self.model = Model(config, options or ForwardOptions(), mesh, cuda_graphs or not on_gpu)
        self.params = params
        self.max_cache_tokens = max_cache_tokens
        self.max_cache_bytes = max_cache_bytes
        self.dtype: jnp.dtype = params["final_norm"]["scale"].dtype
        self._memories: dict[int, peers.Memory] = {}  # by the rows that they have room for
        self._norm_sums: list[NormSums] | None = None
        self._weights = weights_of(params)
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
        num_drafted: int = 0,
        ahead: bool = False,
    ) -> "Generation":
        """Prefills the prompts, each once, and returns the run, which has `num_samples` rows a prompt.

        Args:
          num_drafted: tokens a step that are guessed and checked (see `speculate`); 0 decodes one by one.
          ahead: begins each call before the last one's tokens are read, so that the devices do not wait for the host
            between them. The same tokens; where the host ends a row, what is under way for it was in vain.

        Raises:
          RequestError: the cache cannot hold that many tokens, or `num_drafted` does not fit.
        """
        num_prompts, kind = len(prompts), sampling.kind
        self.check(max(map(len, prompts)), num_prompts, num_samples, max_new_tokens, num_drafted)
        cache, last = self._prefill(prompts, max_new_tokens, num_samples)
        keys = None if kind.greedy else row_keys(seed, num_prompts, num_samples)
        fixed = self.everywhere((keys, sampling.values, self.eos_token_ids))
        seen = history = None
        if kind.repetition:
            mask = batching.seen_tokens(prompts, self.model.config.vocab_size)
            (seen,) = self._rows(np.repeat(mask, num_samples, axis=0))
        if num_drafted:
            token_ids, _ = batching.pad_rows(prompts, cache.capacity)
            (history,) = self._rows(np.repeat(token_ids, num_samples, axis=0))
        begin = (self.params, last, cache.lengths, np.int32(max_new_tokens), seen, history, *fixed)
        rows, chunk, request = first_token(*begin, model=self.model, kind=kind, num_drafted=num_drafted)
        options = Options(max_new_tokens, kind, num_drafted, ahead and max_new_tokens > 1)
        return Generation(self, DecodeState(cache, rows, chunk), request, fixed, options)

    def check(
        self, longest_prompt: int, num_prompts: int, num_samples: int, max_new_tokens: int, num_drafted: int = 0
    ) -> None:
        """Raises RequestError where a run of this size would not fit the cache, or drafts not the model."""
        speculate.check_num_drafted(num_drafted)
        speculate.check_positions(self.model.config, num_drafted, longest_prompt + max_new_tokens)
        limits.check_cache(
            self.model.config,
            num_rows=num_prompts * num_samples,
            num_tokens=longest_prompt + max_new_tokens,
            capacity=self.plan(longest_prompt, num_prompts, max_new_tokens)[1],
            dtype=self.dtype,
            mesh=self.model.mesh,
            max_cache_tokens=self.max_cache_tokens,
            max_cache_bytes=self.max_cache_bytes,
        )

    def lower_ahead(
        self,
        longest_prompt: int,
        max_new_tokens: int,
        sampling: Sampling,
        num_samples: int = 1,
        num_drafted: int = 0,
        ahead: bool = False,
        asks_anew: bool = False,
    ) -> Iterator[jax.stages.Lowered]:
        """The programs of a run of one prompt in the order of its calls, from shapes alone: `params` may be abstract.

        Each that is compiled is there already when `start` calls it with arrays that lie as the shapes say. On one
        device; the last program is the one that decodes.

        Args:
          longest_prompt: its tokens. ahead, and the rest: as for `start`.
          asks_anew: the run's calls are for fewer steps than a whole chunk, or may go on after `Generation.stop`.

        Raises:
          RequestError: as `start`.
        """
        self.check(longest_prompt, 1, num_samples, max_new_tokens, num_drafted)
        sizes, capacity = self.plan(longest_prompt, 1, max_new_tokens)
        config, static, kind = self.model.config, {"model": self.model}, sampling.kind
        shape = jax.ShapeDtypeStruct
        on_device = jax.tree.leaves(self.params)[0].sharding

        def results(lowered: jax.stages.Lowered):
            return jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype, sharding=on_device), lowered.out_info)

        # What is made without parameters is tied to no device, which to JAX is another program's argument.
        cache = jax.eval_shape(lambda: KVCache.create(config, 1, capacity, self.dtype))
        last, lengths = shape((1, config.width), self.dtype), shape((1,), jnp.int32)
        for size, is_first in dict.fromkeys((size, index == 0) for index, size in enumerate(sizes)):
            begin = (self.params, shape((1, size), jnp.int32), np.int32(0), lengths, cache, last)
            yield (lowered := prefill.lower(*begin, **static, is_first=is_first))
            cache, last = results(lowered)
        if num_samples > 1:
            yield (lowered := repeat_rows.lower(cache, last, **static, num_copies=num_samples))
            cache, last = results(lowered)
        keys = None if kind.greedy else jax.eval_shape(lambda: row_keys(0, 1, num_samples))
        seen = shape((num_samples, config.vocab_size), jnp.bool) if kind.repetition else None
        history = shape((num_samples, capacity), jnp.int32) if num_drafted else None
        fixed = (sampling.values, self.eos_token_ids)
        begin = (self.params, last, cache.lengths, np.int32(max_new_tokens), seen, history, keys, *fixed)
        yield (lowered := first_token.lower(*begin, **static, kind=kind, num_drafted=num_drafted))
        if max_new_tokens == 1:
            return
        rows, chunk, request = results(lowered)
        state = DecodeState(cache, rows, chunk)
        if asks_anew:
            yield ask.lower(request, np.int32(1), np.zeros(num_samples, bool), **static)
        if ahead:
            yield copy_made.lower(state, **static)
        arguments = (self.params, state, request, keys, *fixed)
        norm_sums = None
        if self._reads_norm_sums(num_samples * (1 + num_drafted)):
            layers = self.params["layers"]
            yield (lowered := norm_sums_of_layer.lower(layers[0], **static))
            norm_sums = [results(lowered)] * len(layers)
        # By name and as `_begin` gives them, or they compile again.
        options = static | {"kind": kind, "peers": None, "norm_sums": norm_sums}
        if num_drafted:
            yield decode_drafted.lower(*arguments, num_drafted=num_drafted, **options)
        else:
            yield decode.lower(*arguments, **options)

    def plan(self, longest_prompt: int, num_prompts: int, max_new_tokens: int) -> tuple[list[int], int]:
        """The sizes of the prefill calls, and the cache's capacity."""
        rope = self.model.config.rope
        whole = rope is not None and rope.scaling == "dynamic"
        sizes = batching.prefill_sizes(longest_prompt, num_prompts, whole=whole)
        return sizes, batching.cache_capacity(longest_prompt + max_new_tokens, sizes)

    def peers(self, num_tokens: int) -> Peers | None:
        """How kernels on the mesh's devices reach each other's memory in steps of so many tokens, of all rows.

        None: they do not, and XLA adds up what devices make.

        Raises:
          RequestError: the options ask for it, and it cannot be had here.
        """
        mesh, sums = self.model.mesh, self.model.options.sums
        if sums == "xla" or mesh is None:
            return None
        if (reason := peers.reason_against(self.model.config, self.dtype, mesh, num_tokens)) is not None:
            if sums is not None:
                raise RequestError(f"sums={sums!r} is not possible here: {reason}")
            return None
        num_rows = batching.round_up(num_tokens, ROWS_AT_ONCE)
        if num_rows not in self._memories:
            self._memories[num_rows] = peers.Memory(self.model.config, mesh, num_rows)
        return self._memories[num_rows].peers

    def norm_sums(self, num_tokens: int) -> list[NormSums] | None:
        """What steps of so many tokens, of all rows, read beside the parameters, made the first time; None: nothing."""
        if not self._reads_norm_sums(num_tokens):
            return None
        if self._norm_sums is None:
            layers = self.params["layers"]
            self._norm_sums = [norm_sums_of_layer(layers[i], model=self.model) for i in range(len(layers))]
        return self._norm_sums

    def _reads_norm_sums(self, num_tokens: int) -> bool:
        config, options, mesh = self.model.config, self.model.options, self.model.mesh
        return options.stages != "xla" and stages.reads_norm_sums(config, self._weights, self.dtype, num_tokens, mesh)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_samples: int
    ) -> tuple[KVCache, Float[Array, "B D"]]:
        """A cache of the prompts, with room for `max_new_tokens` more, and each last token's hidden state."""
        config, num_rows = self.model.config, len(prompts)
        sizes, capacity = self.plan(max(map(len, prompts)), num_rows, max_new_tokens)
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

    def everywhere(self, tree):
        """Arrays on the device, or whole on each of the mesh."""
        return jax.device_put(tree, None if self.model.mesh is None else sharding.replicated(self.model.mesh))


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a run: the most tokens that each row gets, and the rest as for `Engine.start`."""

    max_new_tokens: int
    kind: SamplingKind
    num_drafted: int
    ahead: bool


class Generation:
    """One run: rows ordered by prompt, then by sample, each growing until it ends or has max_new_tokens.

    `next_chunk` blocks until its tokens are there. Between two calls of up to 32 steps the host takes some milliseconds
    to read the tokens and to begin the next, in which devices do nothing, unless the run goes `ahead`.

    Args:
      state: with the tokens to begin with in its chunk.
      request: for a whole chunk.
      fixed: keys, values and end-of-text tokens, as for `decode`. On the device once and for all: what each call would
        bring there anew might lie elsewhere each time.

    Attributes:
      num_rows: B.
      left: [B] tokens that each row may still get.
      done: [B] rows that get no more.
      num_steps: [B] passes of the model that each row took part in, its prompt's not counted. Plain decoding makes one
        token in each.
    """

    def __init__(self, engine: Engine, state: DecodeState, request: Request, fixed: Fixed, options: Options):
        self.num_rows = num_rows = len(request.stopped)
        self.left = np.full(num_rows, options.max_new_tokens, np.int32)
        self.done = np.zeros(num_rows, bool)
        self.num_steps = np.zeros(num_rows, np.int32)
        self._engine = engine
        self._options = options
        self._fixed = fixed
        num_tokens = num_rows * (1 + options.num_drafted)
        self._beside = {"peers": engine.peers(num_tokens), "norm_sums": engine.norm_sums(num_tokens)}
        self._stopped: set[int] = set()
        self._request, self._asked = request, (CHUNK, frozenset[int]())
        self._state = state
        self._begun: tuple[Made, int] | None = self._made(), 0  # what has not been read

    @property
    def finished(self) -> bool:
        """Whether no row will get another token."""
        return bool((self.done | (self.left == 0)).all())

    def stop(self, row: int) -> None:
        """Ends a row from outside (a stop string): it gets no more tokens."""
        self.done[row] = True
        self._stopped.add(row)

    def next_chunk(self, max_steps: int = CHUNK) -> tuple[list[list[int]], list[list[float]]]:
        """The new ids a row of up to `max_steps` (at most 32) steps, and their log probabilities.

        A step makes one token a row, with drafts up to `num_drafted` more. The first call returns one a row: it comes
        from the prefill. A run that goes ahead began these steps before the last ones were read, and `max_steps` is for
        the next; who asks for one step first gets the first token before anything else begins.

        Rows that have ended get none. An end-of-text token is returned, as its row's last.
        """
        (made, num_steps), self._begun = self._begun or self._begin(max_steps), None
        num_tokens = max(num_steps, 1)  # that a row which goes on has at least of this call, or of its prompt's
        goes_on = num_tokens < self.left.max(where=~self.done, initial=0)
        if self._options.ahead and goes_on and (num_steps or max_steps > 1):
            self._begun = self._begin(max_steps)
        (tokens, logprobs, counts, steps), done = jax.device_get(made)
        counts, steps = (np.where(self.done, 0, numbers) for numbers in (counts, steps))
        self.left = self.left - counts
        self.num_steps = self.num_steps + steps
        self.done = self.done | done
        return (
            [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)],
            [row[:count].tolist() for row, count in zip(logprobs, counts, strict=True)],
        )

    def _begin(self, max_steps: int) -> tuple[Made, int]:
        """Begins a call of up to so many steps. Returns what it makes, and how many steps that is at most."""
        model, num_steps = self._engine.model, min(max_steps, CHUNK)
        asked = (num_steps, frozenset(self._stopped))
        if asked != self._asked:
            stopped = np.isin(np.arange(self.num_rows), list(self._stopped))
            self._request = ask(self._request, np.int32(num_steps), stopped, model=model)
            self._asked = asked
        arguments = (self._engine.params, self._state, self._request, *self._fixed)
        options: dict[str, Any] = {"model": model, "kind": self._options.kind, **self._beside}
        if num_drafted := self._options.num_drafted:
            self._state = decode_drafted(*arguments, num_drafted=num_drafted, **options)
        else:
            self._state = decode(*arguments, **options)
        return self._made(), num_steps

    def _made(self) -> Made:
        """What the latest call makes: the next one writes over it, after it has been read or beside a copy of it."""
        if self._options.ahead:
            return copy_made(self._state, model=self._engine.model)
        return self._state.chunk, self._state.rows.done
