"""How well a model predicts text: bits per byte and perplexity, by context length.

Owns the cutting of documents into windows and what of each window is counted. Knows nothing of files. The one trap:
every token of a document but its leading end-of-text is counted once, whatever the length and the stride, or the
numbers of two lengths could not be compared.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.model.params import Params
from falcon_jax.train.metrics import bits_per_byte
from falcon_jax.train.shards import Split, Tokens
from falcon_jax.train.step import StepOptions, make_eval_step

MAX_LOGIT_BYTES = 2**30  # of a batch, at once


@dataclasses.dataclass(frozen=True)
class Windows:
    """Stretches of one document each. Window w reads tokens[begins[w]:] and predicts counts[w] targets, of which the
    first skips[w] were counted in the window before. num_columns: the most targets that a window has."""

    tokens: Tokens
    begins: np.ndarray
    counts: Int32[np.ndarray, " W"]
    skips: Int32[np.ndarray, " W"]
    num_columns: int

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def num_targets(self) -> int:
        """Targets that are counted."""
        return int((self.counts - self.skips).sum())

    def batch(self, first: int, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows first, first + 1, ...: tokens [num_rows, num_columns + 1], right-padded with 0, counts and skips
        [num_rows]. Rows past the last window have no targets, so that all batches have one shape."""
        missing = max(0, first + num_rows - len(self))
        begins, counts, skips = (
            np.pad(array[first : first + num_rows], (0, missing)) for array in (self.begins, self.counts, self.skips)
        )
        columns = np.arange(self.num_columns + 1)
        tokens = self.tokens.rows(begins, len(columns))
        return np.where(columns <= counts[:, None], tokens, 0).astype(self.tokens.dtype), counts, skips


def cut_windows(split: Split, length: int, stride: int | None = None) -> Windows:
    """Windows of up to `length` inputs that begin every `stride` tokens of each document.

    A stride of `length` (the default) gives windows that do not overlap: the first targets of each see next to nothing.
    A shorter one slides: each target but a document's first sees at least length - stride + 1 tokens, or all that the
    document has before it, at length / stride times the work.

    Raises: ConfigError where the stride is not from 1 to length, or no document has a token.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(f"stride is {stride} and length {length}; the stride must be from 1 to the length")
    sizes = np.diff(split.starts, append=len(split.tokens)) - 1  # targets of each document
    starts, sizes = split.starts[sizes > 0], sizes[sizes > 0]
    if not len(sizes):
        raise ConfigError("the text is empty; give at least one byte of it")
    numbers = np.maximum(0, -(-(sizes - length) // stride)) + 1  # windows of each document
    firsts = np.cumsum(numbers) - numbers
    offsets = stride * (np.arange(numbers.sum()) - np.repeat(firsts, numbers))
    return Windows(
        split.tokens,
        np.repeat(starts, numbers) + offsets,
        np.minimum(length, np.repeat(sizes, numbers) - offsets).astype(np.int32),
        np.where(offsets > 0, length - stride, 0).astype(np.int32),
        int(min(length, sizes.max())),
    )


def total_nats(
    eval_step: Callable[[Params, Any, Any], jax.Array],
    params: Params,
    windows: Windows,
    num_rows: int,
    *,
    place: Callable[[np.ndarray], Any] = lambda array: array,
    advance: Callable[[int], Any] = lambda num_targets: None,
) -> float:
    """Nats of all counted targets, added up in float64.

    eval_step: from `make_eval_step`. num_rows: windows a batch. place: puts a host array where the step wants it.
    advance: told of each batch's counted targets when they are done.
    """
    total, pending = 0.0, collections.deque()

    def settle() -> None:
        nonlocal total
        nats, counts, skips = pending.popleft()
        host = np.asarray(nats)
        total += float(np.sum(host, where=np.arange(host.shape[1]) >= skips[:, None], dtype=np.float64))
        advance(int((counts - skips).sum()))

    for first in range(0, len(windows), num_rows):
        tokens, counts, skips = windows.batch(first, num_rows)
        pending.append((eval_step(params, place(tokens), place(counts)), counts, skips))
        if len(pending) > 2:  # the device has work while the host adds up
            settle()
    while pending:
        settle()
    return total


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of a text in windows of `length` tokens, one every `stride`."""

    length: int
    stride: int
    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def protocol(self) -> str:
        return "non-overlapping" if self.stride == self.length else "sliding"

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.num_bytes)

    @property
    def perplexity(self) -> float:
        """Of a token: comparable between models of one vocabulary alone. Infinite where it outgrows a float."""
        try:
            return math.exp(self.nats / self.num_tokens)
        except OverflowError:
            return math.inf

    def record(self) -> dict[str, Any]:
        """All of it as JSON has it; a number that is not finite is null."""
        values = {"nats_per_token": self.nats / self.num_tokens, "bits_per_byte": self.bits_per_byte}
        values["perplexity"] = self.perplexity
        return {
            "length": self.length,
            "stride": self.stride,
            "protocol": self.protocol,
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
        }


def evaluate(
    config: FalconConfig,
    params: Params,
    split: Split,
    shapes: Iterable[tuple[int, int]],
    *,
    dtype: str = "bfloat16",
    forward: ForwardOptions | None = None,
    batch_tokens: int = 16384,
    progress: bool = True,
) -> Iterator[Score]:
    """A score for each (length, stride), as it is done. Lengths may lie beyond the trained one.

    dtype: what the model computes in. batch_tokens: tokens a batch holds, at least one row.

    Raises: ConfigError where a shape is out of range, the text is empty or holds ids beyond the model's vocabulary.
    """
    for part in _plan(config, split, shapes, dtype, forward, batch_tokens):
        description = f"length {part.length}, stride {part.stride}"
        with tqdm(total=part.windows.num_targets, desc=description, unit="token", disable=not progress) as bar:
            nats = total_nats(part.step, params, part.windows, part.num_rows, advance=bar.update)
        yield Score(part.length, part.stride, nats, part.windows.num_targets, split.num_bytes)


def lower_ahead(
    config: FalconConfig,
    params: Params,
    split: Split,
    shapes: Iterable[tuple[int, int]],
    *,
    dtype: str = "bfloat16",
    forward: ForwardOptions | None = None,
    batch_tokens: int = 16384,
) -> Iterator[jax.stages.Lowered]:
    """The programs that `evaluate` runs with these arguments, in its order; `params` may be shapes with layouts.

    Each that is compiled is there already when `evaluate` calls it with arrays that lie as the shapes say.

    Raises: as `evaluate`.
    """
    lowered = set()
    for part in _plan(config, split, shapes, dtype, forward, batch_tokens):
        tokens = jax.ShapeDtypeStruct((part.num_rows, part.windows.num_columns + 1), split.tokens.dtype)
        if (tokens, part.step) not in lowered:  # a stride changes no shape
            lowered.add((tokens, part.step))
            yield part.step.lower(params, tokens, jax.ShapeDtypeStruct((part.num_rows,), np.int32))


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is measured of one (length, stride): windows, of which `step`, from `make_eval_step`, takes `num_rows`."""

    length: int
    stride: int
    windows: Windows
    num_rows: int
    step: Any


def _plan(
    config: FalconConfig,
    split: Split,
    shapes: Iterable[tuple[int, int]],
    dtype: str,
    forward: ForwardOptions | None,
    batch_tokens: int,
) -> list[_Part]:
    largest = split.tokens.max()
    if largest >= config.vocab_size:
        raise ConfigError(f"the text holds token {largest}, and the model has a vocab_size of {config.vocab_size}")
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    parts = []
    for length, stride in shapes:
        windows = cut_windows(split, length, stride)
        num_rows = min(max(1, batch_tokens // windows.num_columns), len(windows))
        logit_tokens = MAX_LOGIT_BYTES // (4 * config.vocab_size)
        options = StepOptions(compute_dtype=dtype, loss_chunk_tokens=max(16, logit_tokens))
        step = make_eval_step(config, options, forward or ForwardOptions())
        parts.append(_Part(length, stride, windows, num_rows, step))
    return parts
