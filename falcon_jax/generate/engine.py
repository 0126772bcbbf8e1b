"""Token ids in, token ids out: prefill, then decode in chunks.

Owns the host loop around the functions of `programs`. Knows no text. Rows are left-aligned: a row's token at position
p lies in cache slot p, padding lies past a row's length and is never attended to, so a row's result does not depend on
its batch mates.

The trap: everything that changes from call to call (prompts, lengths, number of steps, sampling values,
seeds) is traced or padded to a bucket; a Python value that slips into a jitted function costs a compilation a
call.
Letters: B batch, T query tokens, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import RequestError
from falcon_jax.generate import batching, limits, speculate
from falcon_jax.generate.programs import all_logits, decode, decode_drafted, first_token, prefill, repeat_rows
from falcon_jax.generate.sampling import Sampling, row_keys
from falcon_jax.generate.state import CHUNK, Chunk, DecodeState, Model
from falcon_jax.model import peers
from falcon_jax.model.cache import KVCache
from falcon_jax.model.params import Params
from falcon_jax.model.peers import Peers
from falcon_jax.model.step import ForwardOptions
from pallas_kernels.quantized_matmul.product import ROWS_AT_ONCE


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
        self.dtype: jnp.dtype = params["embed"]["weight"].dtype
        self._memories: dict[int, peers.Memory] = {}  # by the rows that they have room for
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
    ) -> "Generation":
        """Prefills the prompts, each once, and returns the run, which has `num_samples` rows a prompt.

        `num_drafted` tokens a step are guessed and checked (see `speculate`); 0 decodes one by one.

        Raises:
          RequestError: the cache cannot hold that many tokens, or `num_drafted` does not fit.
        """
        return Generation(self, prompts, max_new_tokens, sampling, num_samples, seed, num_drafted)

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
        self, longest_prompt: int, max_new_tokens: int, sampling: Sampling, num_samples: int = 1, num_drafted: int = 0
    ) -> Iterator[jax.stages.Lowered]:
        """The programs of a run of one prompt in the order of its calls, from shapes alone: `params` may be abstract.

        Each that is compiled is there already when `start` calls it with arrays that lie as the shapes say. On one
        device; the last program is the one that decodes.

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
        begin = (self.params, last, cache.lengths, keys, seen, history)
        yield (lowered := first_token.lower(*begin, *fixed, **static, kind=kind))
        if max_new_tokens == 1:
            return
        seen, history, first = results(lowered)
        begin = (self.params, DecodeState(cache, cache.lengths, first.done, seen, history), np.int32(0))
        done, left = np.zeros(num_samples, bool), np.zeros(num_samples, np.int32)
        options = static | {"kind": kind, "peers": None}  # by name and as `_decode` gives them, or they compile again
        if num_drafted:
            yield decode_drafted.lower(*begin, done, left, keys, *fixed, num_drafted=num_drafted, **options)
        else:
            yield decode.lower(*begin, done, keys, *fixed, **options)

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


class Generation:
    """One run: rows ordered by prompt, then by sample, each growing until it ends or has max_new_tokens.

    `next_chunk` blocks until its tokens are there: with chunks of up to 32 steps the gap between calls, in
    which the host turns ids into text, is under a hundredth of a call, and stop strings take effect in the
    very next one.

    Attributes:
      num_rows: B.
      left: [B] tokens that each row may still get.
      done: [B] rows that get no more.
      num_steps: [B] passes of the model that each row took part in, its prompt's not counted. Plain decoding makes one
        token in each.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        num_samples: int,
        seed: int,
        num_drafted: int,
    ):
        num_rows = len(prompts) * num_samples
        engine.check(max(map(len, prompts)), len(prompts), num_samples, max_new_tokens, num_drafted)
        self.num_rows = num_rows
        self.left = np.full(num_rows, max_new_tokens, np.int32)
        self.done = np.zeros(num_rows, bool)
        self.num_steps = np.zeros(num_rows, np.int32)
        self._engine = engine
        self._num_drafted = num_drafted
        self._kind = sampling.kind
        self._keys = None if self._kind.greedy else row_keys(seed, len(prompts), num_samples)
        if self._keys is not None and engine.model.mesh is not None:
            self._keys = jax.device_put(self._keys, sharding.replicated(engine.model.mesh))
        self._fixed = (sampling.values, engine.eos_token_ids)

        cache, last = engine._prefill(prompts, max_new_tokens, num_samples)
        seen = history = None
        if self._kind.repetition:
            mask = batching.seen_tokens(prompts, engine.model.config.vocab_size)
            (seen,) = engine._rows(np.repeat(mask, num_samples, axis=0))
        if num_drafted:
            token_ids, _ = batching.pad_rows(prompts, cache.capacity)
            (history,) = engine._rows(np.repeat(token_ids, num_samples, axis=0))
        seen, history, self._first = first_token(
            engine.params,
            last,
            cache.lengths,
            self._keys,
            seen,
            history,
            *self._fixed,
            model=engine.model,
            kind=self._kind,
        )
        self._state = DecodeState(cache, self._first.tokens[:, 0], self._first.done, seen, history)

    @property
    def finished(self) -> bool:
        """Whether no row will get another token."""
        return bool((self.done | (self.left == 0)).all())

    def stop(self, row: int) -> None:
        """Ends a row from outside (a stop string): it gets no more tokens from the next chunk on."""
        self.done[row] = True

    def next_chunk(self, max_steps: int = CHUNK) -> tuple[list[list[int]], list[list[float]]]:
        """The new ids a row of up to `max_steps` (at most 32) steps, and their log probabilities.

        A step makes one token a row, with drafts up to `num_drafted` more. The first call returns one a row: it comes
        from the prefill.

        Rows that have ended get none. An end-of-text token is returned, as its row's last.
        """
        if self._first is not None:
            chunk, self._first = self._first, None
        else:
            self._state, chunk = self._decode(min(max_steps, CHUNK))
        tokens, logprobs, counts, steps, done = jax.device_get(chunk)
        self.left = self.left - counts
        self.num_steps = self.num_steps + steps
        self.done = self.done | done
        return (
            [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)],
            [row[:count].tolist() for row, count in zip(logprobs, counts, strict=True)],
        )

    def _decode(self, max_steps: int) -> tuple[DecodeState, Chunk]:
        # A step makes at least one token in each row that goes on.
        num_steps = np.int32(min(max_steps, int(self.left.max(where=~self.done, initial=0))))
        peers = self._engine.peers(self.num_rows * (1 + self._num_drafted))
        options = {"model": self._engine.model, "kind": self._kind, "peers": peers}
        begin = (self._engine.params, self._state, num_steps, self.done)
        if self._num_drafted == 0:
            return decode(*begin, self._keys, *self._fixed, **options)
        return decode_drafted(*begin, self.left, self._keys, *self._fixed, num_drafted=self._num_drafted, **options)
