"""Falcon: the user's handle, which ties configuration, checkpoint, tokenizer and engine together.

Owns what a request may hold and what comes back as text. Does no array work of its own: that is the engine's.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from falcon_jax import checkpoint, sharding
from falcon_jax.checkpoint import peft_files
from falcon_jax.config import FalconConfig
from falcon_jax.errors import RequestError
from falcon_jax.generate.engine import Engine
from falcon_jax.generate.programs import Program
from falcon_jax.generate.sampling import Sampling
from falcon_jax.generate.speculate import check_num_drafted
from falcon_jax.generate.state import CHUNK, Model
from falcon_jax.generate.stopping import RowText, check_stop_strings
from falcon_jax.generate.streaming import TextStream
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import cache_bytes
from falcon_jax.model.quantize import require_weights
from falcon_jax.model.step import ForwardOptions
from falcon_jax.tokenizer import Tokenizer

BUNDLED_MODEL = Path(__file__).parent / "assets" / "falcon-nano"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

Prompt = str | Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    Attributes:
      text: without the stop string and special tokens, after the prompt's own text if that was asked for;
        None where the model has no tokenizer.
      token_ids: the new tokens. They end with the end-of-text token, or the token that completed a stop
        string.
      logprobs: of each token, natural logarithm, under the model's own distribution (before penalty,
        temperature and filters); None unless asked for.
      finish_reason: "stop" (end-of-text token or stop string) or "length" (max_new_tokens).
      prompt_index: which prompt of the call it continues.
      sample_index: which of that prompt's num_samples it is.
      num_steps: passes of the model that it took part in after its prompt's, which gave the first token; with
        `speculate` fewer than its tokens. Says how it was made and not what it is: comparisons leave it out.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str
    prompt_index: int = 0
    sample_index: int = 0
    num_steps: int = dataclasses.field(default=0, compare=False)


class Falcon:
    """A model ready to run. Made by `from_checkpoint` or `from_config`.

    Attributes:
      config: what the model is.
      params: its parameters, a nested dict of arrays.
      tokenizer: None where the checkpoint has none; ids still work.
      engine: what runs it, in ids.
    """

    def __init__(
        self,
        config: FalconConfig,
        params: model_params.Params,
        tokenizer: Tokenizer | None = None,
        *,
        mesh: Mesh | None = None,
        alibi: str = "float32",
        sums: str | None = None,
        cuda_graphs: bool = True,
        max_cache_tokens: int | None = None,
        max_cache_bytes: int | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.engine = Engine(
            config,
            params,
            ForwardOptions(alibi=alibi, sums=sums),
            mesh,
            max_cache_tokens=max_cache_tokens,
            max_cache_bytes=max_cache_bytes,
            cuda_graphs=cuda_graphs,
        )

    @property
    def params(self) -> model_params.Params:
        """The parameters, a nested dict of arrays."""
        return self.engine.params

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | None = None,
        *,
        dtype: Any = "bfloat16",
        weights: str = "native",
        adapter: str | Path | None = None,
        mesh: Mesh | None = None,
        memory_budget: int | str | None = None,
        alibi: str = "float32",
        sums: str | None = None,
        cuda_graphs: bool = True,
        max_cache_tokens: int | None = None,
        verify: bool = True,
    ) -> "Falcon":
        """Loads a model straight to the device.

        Args:
          path: an orbax folder that `convert` made, a Hugging Face folder, or a hub id; None: the bundled
            falcon-nano.
          dtype: of parameters, activations and cache: "bfloat16", "float32" or "float16".
          weights: of the blocks' projections: "native", the `dtype`; or "int8" (a scale for each output) or "int4" (a
            scale for 128 inputs), with either of which embedding and head have 8 bits. Stored so by `convert` or
            rounded while they are loaded, each to the nearest: `convert` with calibration text keeps more of the
            model's quality.
          adapter: a folder with low-rank adapters in PEFT's format, as `scripts/train.py --lora` writes them, added to
            the weights as they are loaded.
          mesh: shards the parameters over it; None: the default device.
          memory_budget: the most that weights and cache may take on a device, in bytes or as in "68GiB".
            Weights and one row of the trained length must fit; requests get what is left.
          alibi: "float32", or "hf_bf16" for the rounding of transformers. Models with RoPE do not read it.
          sums: what adds up, in a step of decoding, what the GPUs of a mesh have made: "peers", our kernels in each
            other's memory; "xla", an all-reduce; None: the kernels where they can. The same but for rounding.
          cuda_graphs: on a GPU XLA captures kernels that follow one another in CUDA graphs. False launches each by
            itself, to look for a driver's fault or at single kernels; decoding may be slower, and gives the same but
            for rounding.
          max_cache_tokens: most tokens of a row, prompt and new ones; None: 8 times the trained length, at
            least 32768. The memory must hold them, whatever is said here.
          verify: compares an orbax checkpoint's arrays with their checksums.

        Raises:
          CheckpointError: the path is no checkpoint, or one that does not fit its configuration.
          ConfigError: its configuration cannot be read.
          ValueError: `weights`, `alibi`, `sums` or `memory_budget` is not one of the above, or the budget is too
            small.
        """
        require_weights(weights)
        options = ForwardOptions(alibi=alibi, sums=sums)  # before a long load: what is unknown raises here
        source = BUNDLED_MODEL if path is None else path
        cache_limit = None
        if memory_budget is not None:
            cache_limit = _left_for_cache(
                checkpoint.read_config(source), dtype, weights, mesh, parse_bytes(memory_budget)
            )
        load = checkpoint.load if adapter is None else functools.partial(peft_files.load_merged, adapter=adapter)
        config, params, tokenizer_folder = load(source, dtype=dtype, weights=weights, mesh=mesh, verify=verify)
        return cls(
            config,
            params,
            None if tokenizer_folder is None else Tokenizer.from_folder(tokenizer_folder),
            mesh=mesh,
            alibi=options.alibi,
            sums=options.sums,
            cuda_graphs=cuda_graphs,
            max_cache_tokens=max_cache_tokens,
            max_cache_bytes=cache_limit,
        )

    @classmethod
    def from_config(
        cls,
        config: FalconConfig,
        *,
        key: int | Array = 0,
        dtype: Any = "bfloat16",
        weights: str = "native",
        mesh: Mesh | None = None,
        tokenizer: Tokenizer | None = None,
        alibi: str = "float32",
        sums: str | None = None,
        cuda_graphs: bool = True,
        max_cache_tokens: int | None = None,
    ) -> "Falcon":
        """A model with random weights, for benchmarks and tests; `key` is a seed or a JAX random key.

        Other arguments as for `from_checkpoint`.
        """
        require_weights(weights)
        root = jax.random.key(key) if isinstance(key, int) else key
        params = model_params.init(config, root, jnp.dtype(dtype), mesh, weights)
        return cls(
            config,
            params,
            tokenizer,
            mesh=mesh,
            alibi=alibi,
            sums=sums,
            cuda_graphs=cuda_graphs,
            max_cache_tokens=max_cache_tokens,
        )

    def logits(
        self, token_ids: Sequence[Sequence[int]] | np.ndarray | Array, lengths: Sequence[int] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of every next token, float32.

        Args:
          token_ids: [B, T], rows padded on the right with any valid id; or rows of ids of different lengths.
          lengths: [B] tokens that count in each row, 1 .. T; None: all of them. Logits past a row's length
            mean nothing.

        Raises:
          RequestError: no rows, an empty row, an id outside the vocabulary, or lengths that do not fit.
        """
        given = np.asarray(token_ids) if isinstance(token_ids, jax.Array) else token_ids
        rows = [self._checked_ids(row, f"row {index}") for index, row in enumerate(given)]
        if not rows:
            raise RequestError("token_ids is empty: give at least one row of ids")
        longest = max(map(len, rows))
        counts = np.asarray([len(row) for row in rows] if lengths is None else lengths)
        fits = counts.shape == (len(rows),) and np.issubdtype(counts.dtype, np.integer)
        if not fits or any(not 1 <= count <= len(row) for count, row in zip(counts, rows, strict=True)):
            raise RequestError(f"lengths={lengths!r} does not fit: {len(rows)} integers from 1 to each row's size")
        padded = np.zeros((len(rows), longest), np.int32)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        return self.engine.logits(padded, counts.astype(np.int32))

    def attention_map(self, prompt: Prompt | Sequence[Prompt], layer: int) -> Float[Array, "N T T"]:
        """What each token of a prompt reads from which other in one layer, to look at: it takes 4 N T T bytes.

        Each T and layer compiles anew.

        Args:
          prompt: text or ids of T tokens.
          layer: 0 .. L - 1.

        Returns:
          Float32 [N, T, T]: head, query token, key token. Rows sum to 1, with zeros after the diagonal.

        Raises:
          RequestError: not one prompt, an empty one, or no such layer.
        """
        rows = self._prompt_ids(prompt)
        if len(rows) != 1:
            raise RequestError(f"attention_map takes one prompt and got {len(rows)}")
        if not isinstance(layer, (int, np.integer)) or not 0 <= layer < self.config.num_layers:
            raise RequestError(f"layer={layer!r} is out of range: layers go from 0 to {self.config.num_layers - 1}")
        token_ids = np.asarray(rows, np.int32)
        return _attention_map(self.params, token_ids, model=self.engine.model, layer=int(layer))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: int | float = 0.0,
        top_k: int | None = None,
        top_p: int | float | None = None,
        min_p: int | float | None = None,
        repetition_penalty: int | float = 1.0,
        stop: str | Sequence[str] = (),
        num_samples: int = 1,
        seed: int = 0,
        logprobs: bool = False,
        return_full_text: bool = False,
        speculate: int = 0,
    ) -> list[Completion]:
        """Continues prompts of any lengths, in one batch.

        Args:
          prompts: a string, a list of ids, or a list of such; at least one token each.
          max_new_tokens: most tokens a completion gets, at least 1.
          temperature: 0 takes the likeliest token each time; otherwise as for `top_k`, `top_p`, `min_p` and
            `repetition_penalty`, see `generate.sampling.Sampling`.
          stop: strings that end a completion where they appear in the new text, also across tokens.
          num_samples: completions a prompt.
          seed: the same seed gives the same samples, however prompts are batched.
          logprobs: fills in each completion's log probabilities.
          return_full_text: puts the prompt's text before the completion's.
          speculate: how many tokens to guess a step from what the text so far holds, 0 (none) to 16; one pass of
            the model checks them. Faster where text repeats itself, and the same text and samples, but for
            rounding, which in bfloat16 may decide between tokens that are as good as equal.

        Returns:
          Completions ordered by prompt, then by sample; none for an empty list of prompts.

        Raises:
          RequestError: an empty prompt, a value out of range, more tokens than the cache can hold, or `speculate`
            with dynamic RoPE scaling past the window that it starts from.
        """
        rows = self._prompt_ids(prompts)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        stops = self._checked(rows, max_new_tokens, num_samples, seed, stop, speculate)
        if not rows:
            return []
        run = self.engine.start(
            rows,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            num_samples=num_samples,
            seed=seed,
            num_drafted=speculate,
            ahead=not stops,  # of a row that a stop string ends a whole call would be in vain
        )
        texts = [RowText(self.tokenizer, stops, self.config.eos_token_ids) for _ in range(run.num_rows)]
        logprob_rows: list[list[float]] = [[] for _ in texts]
        while not run.finished:
            tokens, new_logprobs = run.next_chunk(CHUNK)
            for row, text in enumerate(texts):
                text.push(tokens[row])
                logprob_rows[row].extend(new_logprobs[row])
                if text.stopped:
                    run.stop(row)
        completions = []
        for row, text in enumerate(texts):
            text.finish()
            prompt_index, sample_index = divmod(row, num_samples)
            whole = text.text
            if return_full_text:
                whole = self._prompt_text(prompts, rows, prompt_index) + whole
            completions.append(
                Completion(
                    text=None if self.tokenizer is None else whole,
                    token_ids=text.token_ids,
                    logprobs=logprob_rows[row][: len(text.token_ids)] if logprobs else None,
                    finish_reason="stop" if text.stopped else "length",
                    prompt_index=prompt_index,
                    sample_index=sample_index,
                    num_steps=int(run.num_steps[row]),
                )
            )
        return completions

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: int | float = 0.0,
        top_k: int | None = None,
        top_p: int | float | None = None,
        min_p: int | float | None = None,
        repetition_penalty: int | float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        return_full_text: bool = False,
        speculate: int = 0,
    ) -> TextStream:
        """Yields the text of `generate(prompt, ...)` as it is made; the iterator counts its steps and tokens.

        Only whole characters, and nothing that a stop string would take back. Arguments as for `generate`;
        they are checked at once, before the first text is asked for.

        Raises:
          RequestError: as `generate`; also where there is no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer, so it cannot stream text: use generate, which returns ids")
        rows = self._prompt_ids(prompt)
        if len(rows) != 1:
            raise RequestError(f"stream takes one prompt and got {len(rows)}: use generate for several")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        stops = self._checked(rows, max_new_tokens, 1, seed, stop, speculate)
        start = functools.partial(
            self.engine.start,
            rows,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            num_drafted=speculate,
            ahead=not stops,
        )
        text = RowText(self.tokenizer, stops, self.config.eos_token_ids)
        return TextStream(start, text, self._prompt_text(prompt, rows, 0) if return_full_text else "")

    def _prompt_ids(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        """Each prompt as ids."""
        rows = []
        for index, prompt in enumerate(_as_list(prompts)):
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise RequestError("this model has no tokenizer: give prompts as lists of token ids")
                prompt = self.tokenizer.encode(prompt)
            rows.append(self._checked_ids(prompt, f"prompt {index}"))
        return rows

    def _checked_ids(self, ids: Sequence[int] | np.ndarray | Array, name: str) -> list[int]:
        array = np.asarray(ids)
        if array.size == 0:
            raise RequestError(f"{name} is empty: it must have at least one token")
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise RequestError(
                f"{name} is {type(ids).__name__} of {array.dtype}: it must be text or a list of token ids"
            )
        if array.min() < 0 or array.max() >= self.config.vocab_size:
            wrong = array.min() if array.min() < 0 else array.max()
            raise RequestError(f"{name} has the token id {wrong}: ids go from 0 to {self.config.vocab_size - 1}")
        return array.tolist()

    def _checked(
        self,
        rows: list[list[int]],
        max_new_tokens: int,
        num_samples: int,
        seed: int,
        stop: str | Sequence[str],
        speculate: int,
    ) -> tuple[str, ...]:
        """The stop strings, after a look at everything else that a request says."""
        _check_integer("max_new_tokens", max_new_tokens, 1)
        _check_integer("num_samples", num_samples, 1)
        _check_integer("seed", seed, 0)
        check_num_drafted(speculate)
        stops = check_stop_strings(stop)
        if stops and self.tokenizer is None:
            raise RequestError("stop needs a tokenizer, and this model has none")
        if rows:
            longest = max(map(len, rows))
            self.engine.check(longest, len(rows), num_samples, max_new_tokens, speculate)
            self._warn_of_length(longest + max_new_tokens)
        return stops

    def _warn_of_length(self, num_tokens: int) -> None:
        # ALiBi extrapolates, and dynamic scaling adapts to any length.
        rope = self.config.rope
        if rope is not None and rope.scaling != "dynamic" and num_tokens > self.config.max_tokens:
            warnings.warn(
                f"prompt and max_new_tokens come to {num_tokens} tokens; this model's RoPE was trained on "
                f"{self.config.max_tokens}, and text past that is likely to be poor",
                stacklevel=4,
            )

    def _prompt_text(self, prompts: Prompt | Sequence[Prompt], rows: list[list[int]], index: int) -> str:
        prompt = _as_list(prompts)[index]
        if isinstance(prompt, str):
            return prompt
        return "" if self.tokenizer is None else self.tokenizer.decode(rows[index])


@functools.partial(Program, static_argnames="layer")
def _attention_map(
    params: model_params.Params, token_ids: Int[Array, "1 T"], *, model: Model, layer: int
) -> Float[Array, "N T T"]:
    decoder = model_params.bind(model.config, params, model.options, model.mesh)
    return decoder.attention_probabilities(token_ids, layer)[0]


def parse_bytes(size: int | str) -> int:
    """Bytes of a number or of text such as "68GiB", "500 MB" or "1.5e9".

    Raises:
      ValueError: neither of these, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    if match and match[2].upper() in UNITS and match[1].count(".") <= 1 and match[1] != ".":
        num_bytes = int(float(match[1]) * UNITS[match[2].upper()])
        if num_bytes > 0:
            return num_bytes
    raise ValueError(
        f'memory_budget={size!r} is not a size: give bytes, or a number and a unit as in "68GiB" or "40GB"'
    )


def _left_for_cache(config: FalconConfig, dtype: Any, weights: str, mesh: Mesh | None, budget: int) -> int:
    """Bytes of `budget` that the weights leave on a device, enough for a row of the trained length."""
    leaves = model_params.flatten(model_params.abstract(config, dtype, weights))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    cache = cache_bytes(config, 1, config.max_tokens, dtype)
    if mesh is not None:
        where = model_params.layouts(config, mesh, weights)
        shapes = {path: where[path].shard_shape(shape) for path, shape in shapes.items()}
        row = (1, config.max_tokens, config.num_kv_heads, config.head_dim)
        cache = cache * math.prod(sharding.cache_sharding(row, mesh).shard_shape(row)) // math.prod(row)
    held = sum(math.prod(shape) * leaves[path].dtype.itemsize for path, shape in shapes.items())
    if held + cache > budget:
        gib = 2**30
        raise ValueError(
            f"memory_budget of {budget / gib:.2f} GiB is too small: on each device the weights take "
            f"{held / gib:.2f} GiB and a cache of {config.max_tokens} tokens {cache / gib:.3f} GiB"
        )
    return budget - held


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """A single prompt, text or ids, becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    several: list[Any] = list(prompts)
    return [several] if several and all(isinstance(item, (int, np.integer)) for item in several) else several


def _check_integer(name: str, value: object, smallest: int) -> None:
    # Seeds and counts go through int32.
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not smallest <= value < 2**31:
        raise RequestError(f"{name}={value!r} is out of range: it must be an integer from {smallest} to {2**31 - 1}")
