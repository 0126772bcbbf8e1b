"""How the next token is chosen from the logits.

Owns the filters (repetition penalty, temperature, top-k, top-p, min-p, in the order of transformers), the
choice, its log probability, and the random keys. Knows no model and no loop. The trap: which filters are on
is static (`SamplingKind`), their values are traced, so one executable serves every temperature; keep it that
way.
Letters: B batch, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from falcon_jax.errors import RequestError

# Below this the lesser of two different logits is never drawn; 0 says so without a division.
MIN_TEMPERATURE = 1e-6
_PART = 128  # logits that are added up first


class SamplingKind(NamedTuple):
    """Which steps are compiled in: the static part of a `Sampling`."""

    greedy: bool
    repetition: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False


class SamplingValues(NamedTuple):
    """The traced part of a `Sampling`: float32 (top_k int32) scalars, or [B] for a value a row."""

    temperature: jax.typing.ArrayLike
    top_k: jax.typing.ArrayLike
    top_p: jax.typing.ArrayLike
    min_p: jax.typing.ArrayLike
    repetition_penalty: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What to do with the logits, checked.

    Attributes:
      temperature: 0 picks the likeliest token (the filters then change nothing); else at least 1e-6.
      top_k: keep the k likeliest tokens, ties with the last one included; None keeps all.
      top_p: keep the likeliest tokens whose probabilities reach p, the one that crosses it included; above
        0, at most 1.
      min_p: keep tokens with at least this share of the likeliest one's probability; in [0, 1].
      repetition_penalty: logits of tokens in the prompt or generated already are divided by it where
        positive, multiplied where negative; above 0, 1 does nothing. It acts on greedy choices too.

    Raises:
      RequestError: a value out of its range; the message names it and the range.
    """

    temperature: int | float = 0.0
    top_k: int | None = None
    top_p: int | float | None = None
    min_p: int | float | None = None
    repetition_penalty: int | float = 1.0

    def __post_init__(self):
        least = f"0 (greedy) or at least {MIN_TEMPERATURE:g}"
        _check("temperature", self.temperature, lambda t: t == 0 or t >= MIN_TEMPERATURE, least)
        if self.top_k is not None:  # int32 on the device; a k past the vocabulary keeps everything
            _check(
                "top_k",
                self.top_k,
                lambda k: k == int(k) and 1 <= k < 2**31,
                "an integer of at least 1, or None",
            )
        if self.top_p is not None:
            _check("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1, or None")
        if self.min_p is not None:
            _check("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 to 1, or None")
        _check("repetition_penalty", self.repetition_penalty, lambda r: r > 0, "above 0 (1 is off)")

    @property
    def kind(self) -> SamplingKind:
        """Which steps this needs. Greedy needs no filter: none of them removes the likeliest token."""
        repetition = self.repetition_penalty != 1
        if self.temperature == 0:
            return SamplingKind(greedy=True, repetition=repetition)
        return SamplingKind(
            greedy=False,
            repetition=repetition,
            top_k=self.top_k is not None,
            top_p=self.top_p is not None and self.top_p < 1,
            min_p=self.min_p is not None and self.min_p > 0,
        )

    @property
    def values(self) -> SamplingValues:
        """The numbers, as numpy scalars of fixed types: passing them to a jitted function never retraces."""
        return SamplingValues(
            temperature=np.float32(self.temperature),
            top_k=np.int32(self.top_k or 0),
            top_p=np.float32(1.0 if self.top_p is None else self.top_p),
            min_p=np.float32(self.min_p or 0.0),
            repetition_penalty=np.float32(self.repetition_penalty),
        )


def _check(name: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not fits(value):
        raise RequestError(f"{name}={value!r} is out of range: it must be {expected}")


def row_keys(seed: int, num_prompts: int, num_samples: int) -> Key[Array, " B"]:
    """One random key a row, rows ordered by prompt and then by sample.

    A row's key depends on the seed, the prompt's index and the sample's index alone, so how many rows run
    together never changes a sample.
    """
    rows = np.arange(num_prompts * num_samples, dtype=np.int32)
    return _fold_keys(np.int32(seed), rows // num_samples, rows % num_samples)


@jax.jit
def _fold_keys(seed: Array, prompts: Int[Array, " B"], samples: Int[Array, " B"]) -> Key[Array, " B"]:
    root = jax.random.key(seed)
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(root, prompt), sample))(
        prompts, samples
    )


def filter_logits(
    logits: Float[Array, "B V"], values: SamplingValues, seen: Bool[Array, "B V"] | None, kind: SamplingKind
) -> tuple[Float[Array, "B V"], Int[Array, "B V"] | None]:
    """The distribution to draw from, as unnormalised log probabilities whose greatest is 0.

    Args:
      logits: float32, the model's own.
      values: the filters' values; those that `kind` leaves out are not read.
      seen: which tokens the prompt or the text so far holds; None unless `kind.repetition`.
      kind: which filters act.

    Returns:
      scores: float32, -inf for a token that is filtered out.
      token_ids: int32, which token each column is (ascending scores); None where columns are in vocabulary
        order.

    Source: the order of transformers' `_get_logits_processor` and the rule of each of its classes. Of equal
    scores at top-p's edge, whose fate torch leaves to its sort, those with the greater token ids stay.
    """
    scores = penalise(logits, values, seen, kind)
    # The greatest score becomes 0 before the division, so that no temperature overflows; softmax does not see
    # it.
    scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) / _column(values.temperature)
    token_ids = None
    if kind.top_k or kind.top_p:  # the one sort; min-p needs none
        columns = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores, token_ids = jax.lax.sort((scores, columns), num_keys=1, is_stable=True)
    if kind.top_k:
        last_kept = jnp.maximum(scores.shape[-1] - _column(values.top_k), 0)  # [B, 1] or [1, 1]
        last_kept = jnp.broadcast_to(last_kept, (scores.shape[0], 1))
        scores = jnp.where(scores < jnp.take_along_axis(scores, last_kept, axis=-1), -jnp.inf, scores)
    if kind.top_p:
        # Summed from the unlikely end: a token goes if it and all below it weigh no more than 1 - p.
        mass = jnp.cumsum(jax.nn.softmax(scores, axis=-1), axis=-1)
        likeliest = jnp.arange(scores.shape[-1]) == scores.shape[-1] - 1
        scores = jnp.where((mass > 1 - _column(values.top_p)) | likeliest, scores, -jnp.inf)
    if kind.min_p:
        # exp(score) is the ratio to the greatest probability: the greatest score is 0.
        scores = jnp.where(jnp.exp(scores) < _column(values.min_p), -jnp.inf, scores)
    return scores, token_ids


def penalise(
    logits: Float[Array, "B V"], values: SamplingValues, seen: Bool[Array, "B V"] | None, kind: SamplingKind
) -> Float[Array, "B V"]:
    """The logits with the repetition penalty on the tokens in `seen` (Keskar et al. 2019, section 4.1)."""
    if not kind.repetition:
        return logits
    if seen is None:
        raise ValueError("seen=None: a repetition penalty needs the [B, V] mask of tokens seen so far")
    penalty = _column(values.repetition_penalty)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"] | None,
    values: SamplingValues,
    seen: Bool[Array, "B V"] | None,
    kind: SamplingKind,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Chooses one token a row.

    Args:
      logits: float32.
      keys: one key a row, already specific to the position; None will do for greedy.
      values, seen, kind: as for `filter_logits`.

    Returns:
      tokens: int32.
      logprobs: float32, of the chosen token under the model's own distribution (log-softmax of the raw
        logits: before penalty, temperature and filters, so that they compare across sampling settings).
    """
    if kind.greedy and not kind.repetition:
        return _likeliest(logits)
    if kind.greedy:
        tokens = jnp.argmax(penalise(logits, values, seen, kind), axis=-1).astype(jnp.int32)
    elif keys is None:
        raise ValueError("keys=None: drawing a token needs a random key a row")
    else:
        scores, token_ids = filter_logits(logits, values, seen, kind)
        # Noise belongs to token ids, not to ranks: two near-equal logits that swap ranks change no sample.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[-1:], jnp.float32))(keys)
        if token_ids is None:
            tokens = jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)
        else:
            choice = jnp.argmax(scores + jnp.take_along_axis(noise, token_ids, axis=-1), axis=-1)
            tokens = jnp.take_along_axis(token_ids, choice[:, None], axis=-1)[:, 0]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _likeliest(logits: Float[Array, "B V"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first of the likeliest tokens, and its log probability, in one pass: on a GPU two launches, not seven."""

    def merge(some: tuple[Array, Array, Array], other: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Of two parts of a row, each with its greatest logit, where that is, and the sum of exp(logit - greatest)."""
        (top, at, total), (other_top, other_at, other_total) = some, other
        is_other = (other_top > top) | ((other_top == top) & (other_at < at))
        greatest = jnp.maximum(top, other_top)
        total = total * jnp.exp(top - greatest) + other_total * jnp.exp(other_top - greatest)
        return greatest, jnp.where(is_other, other_at, at), total

    # Of nothing: the least number there is, since infinity less infinity is none.
    least = jnp.finfo(logits.dtype).min
    nothing = tuple(map(jnp.asarray, (least, jnp.int32(logits.shape[-1] - 1), jnp.zeros((), logits.dtype))))
    missing = -logits.shape[-1] % _PART
    logits = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=least)
    parts = logits, jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1), jnp.ones_like(logits)
    # In two stages, as a GPU does it in any case: a CPU adds up one by one, and many small numbers would be lost.
    parts = jax.lax.reduce(tuple(x.reshape(x.shape[0], -1, _PART) for x in parts), nothing, merge, (2,))
    _, tokens, totals = jax.lax.reduce(parts, nothing, merge, (1,))
    return tokens, -jnp.log(totals)


def sample_at(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"] | None,
    positions: Int[Array, " B"],
    values: SamplingValues,
    seen: Bool[Array, "B V"] | None,
    kind: SamplingKind,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """`sample` for the tokens at `positions`, with each row's key made specific to its position.

    So a sample depends on where its token stands alone, not on how many steps or chunks led there.
    """
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return sample(logits, keys, values, seen, kind)


def _column(value: jax.typing.ArrayLike) -> Array:
    """A scalar or [B] as [1, 1] or [B, 1], to meet [B, V]."""
    return jnp.reshape(jnp.asarray(value), (-1, 1))
