"""Prompt lookup: a text that repeats itself gives several tokens for one pass of the model, and never other ones.

Owns the draft (what followed the latest earlier place where a row's last tokens stood), its verification, and what of
it a row keeps. Knows the model as a function, and no loop. Each position's token is chosen from the model's own logits,
with the key that plain decoding has for that position; a drafted token counts as far as it equals the chosen one. So
drafts decide how many tokens a step makes, never which: not the distribution alone is kept but each sample.

The trap is rounding: T queries together may differ from one alone in a logit's last bits. Where two tokens come that
close the other may win; in bfloat16 that happens, in float32 hardly ever.
Letters: B batch, M drafted tokens of a step, T = M + 1 its queries, S tokens of a row's history (the cache's capacity),
V vocabulary, E end-of-text tokens, W columns.

Source: Saxena, Prompt Lookup Decoding (2023), for the draft; Leviathan et al., Fast Inference from Transformers via
Speculative Decoding (2023), for drafts checked by one pass.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from falcon_jax.config import FalconConfig
from falcon_jax.errors import RequestError
from falcon_jax.generate.sampling import SamplingKind, SamplingValues, sample_at
from falcon_jax.generate.state import Chunk, DecodeState, Rows
from falcon_jax.model.cache import KVCache

# Each takes float32 logits [B, V] of its own in every step, right or wrong.
MAX_DRAFTED = 16
# The most tokens that a match is asked for; among longer matches the latest would still be taken.
MAX_NGRAM = 3


def check_num_drafted(num_drafted: object) -> None:
    """Raises RequestError unless `num_drafted` (a user's `speculate`) is an integer from 0 to 16."""
    is_integer = isinstance(num_drafted, (int, np.integer)) and not isinstance(num_drafted, bool)
    if not is_integer or not 0 <= num_drafted <= MAX_DRAFTED:  # pyright: ignore[reportOperatorIssue]
        raise RequestError(
            f"speculate={num_drafted!r} is out of range: it must be an integer from 0 (off) to {MAX_DRAFTED}"
        )


def check_positions(config: FalconConfig, num_drafted: int, num_tokens: int) -> None:
    """Raises RequestError where a pass over several tokens would turn them otherwise than one token a pass does.

    Dynamic RoPE scaling rotates a whole row by the frequencies of its present length, which tokens read together share
    and tokens read one by one do not, unless all `num_tokens` of a row lie within the original window.
    """
    rope = config.rope
    if not num_drafted or rope is None or rope.scaling != "dynamic":
        return
    assert rope.original_max_tokens is not None  # dynamic scaling has one
    if num_tokens > rope.original_max_tokens:
        raise RequestError(
            f"speculate={num_drafted} would not give what plain decoding gives: prompt and max_new_tokens come to "
            f"{num_tokens} tokens, and past {rope.original_max_tokens} this model's dynamic RoPE scaling depends on "
            "how many are read together; use speculate=0, or fewer tokens"
        )


def advance(
    state: DecodeState,
    forward: Callable[[Array, KVCache, Array], tuple[Float[Array, "B T V"], KVCache]],
    keys: Key[Array, " B"] | None,
    values: SamplingValues,
    eos_token_ids: Int[Array, " E"],
    *,
    kind: SamplingKind,
    num_drafted: int,
) -> DecodeState:
    """One step: 1 to `num_drafted` + 1 more tokens in each row that is not done.

    Args:
      state: each row's last token in its history.
      forward: (token_ids [B, T], cache, num_tokens [B]) -> float32 logits after each token, and the cache with them.
    """
    rows, chunk = state.rows, state.chunk
    assert rows.history is not None
    start = state.cache.lengths
    room = jnp.where(rows.done, 0, rows.left)
    drafted = draft(rows.history, start + 1, num_drafted)
    token_ids = jnp.concatenate([rows.tokens[:, None], drafted], axis=1)
    # Near its limit a row has fewer tokens than queries; what the rest would write past the capacity is dropped.
    logits, cache = forward(token_ids, state.cache, jnp.minimum(room, num_drafted + 1))
    tokens, logprobs, num_right = verify(logits, drafted, keys, start + 1, rows.seen, values, kind)
    counts, ended = count_kept(tokens, num_right, room, eos_token_ids)
    last = jnp.take_along_axis(tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    chunk = Chunk(
        append(chunk.tokens, tokens, chunk.counts, counts),
        append(chunk.logprobs, logprobs, chunk.counts, counts),
        chunk.counts + counts,
        chunk.steps + (counts > 0).astype(jnp.int32),
    )
    rows = Rows(
        jnp.where(counts > 0, last, rows.tokens),
        rows.done | ended | (counts == room),
        rows.left - counts,
        mark_seen(rows.seen, tokens, counts),
        append(rows.history, tokens, start + 1, counts),
    )
    # Rejected tokens lie past the row's length: the next step writes over all of them before it reads.
    return DecodeState(dataclasses.replace(cache, lengths=start + counts), rows, chunk)


def draft(history: Int[Array, "B S"], lengths: Int[Array, " B"], num_drafted: int) -> Int[Array, "B M"]:
    """What may follow each row: what followed the latest earlier place where its last 3 tokens stood; or 2, or 1.

    Where that place is so near the end that too few tokens follow it, they repeat. A row without such a place gets any
    valid tokens.

    Args:
      history: row b's tokens in its first lengths[b] >= 1 columns; valid ids elsewhere.
      num_drafted: M.
    """
    S = history.shape[1]
    last = lengths[:, None] - 1  # [B, 1]
    columns = jnp.arange(S, dtype=jnp.int32)[None, :]
    # Of each column: whether the tokens up to it are the row's last ones, and how many of them.
    matches = columns < last
    num_matched = jnp.zeros_like(history)
    for back in range(MAX_NGRAM):
        wanted = jnp.take_along_axis(history, jnp.maximum(last - back, 0), axis=1)
        wanted = jnp.where(last >= back, wanted, -1)  # before a row's start nothing matches
        shifted = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-2)[:, :S]
        matches &= shifted == wanted
        num_matched += matches.astype(jnp.int32)
    # The longest match, of equally long ones the latest.
    rank = jnp.where(num_matched > 0, num_matched * S + columns, 0)
    place = jnp.argmax(rank, axis=1).astype(jnp.int32)[:, None]
    num_following = jnp.maximum(last - place, 1)
    steps = jnp.arange(num_drafted, dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(history, place + 1 + steps % num_following, axis=1)


def verify(
    logits: Float[Array, "B T V"],
    drafted: Int[Array, "B M"],
    keys: Key[Array, " B"] | None,
    positions: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    values: SamplingValues,
    kind: SamplingKind,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"], Int[Array, " B"]]:
    """Chooses the token after each of T queries, as plain decoding would if the drafted tokens before it were right.

    Args:
      logits: float32, after the row's last token and after each drafted one.
      keys: one a row; None for greedy.
      positions: of the first token chosen here.
      seen: the tokens before; None without a repetition penalty, which counts the drafted ones besides.

    Returns:
      tokens, logprobs: of each position, as `sample` gives them; they mean something up to the first drafted token that
        is wrong, and for the position of that one.
      num_right: how many drafted tokens came true before the first that did not, 0 .. M.
    """
    T = logits.shape[1]
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    masks = seen
    if seen is not None:
        before = [seen]
        for m in range(T - 1):
            before.append(before[-1].at[rows, drafted[:, m]].set(True))
        masks = jnp.stack(before, axis=1)  # [B, T, V]

    def choose(logits: Array, positions: Array, seen: Array | None) -> tuple[Array, Array]:
        return sample_at(logits, keys, positions, values, seen, kind)

    each_position = positions[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    tokens, logprobs = jax.vmap(choose, in_axes=1, out_axes=1)(logits, each_position, masks)
    right = (tokens[:, :-1] == drafted).astype(jnp.int32)
    return tokens, logprobs, jnp.sum(jnp.cumprod(right, axis=1), axis=1)


def count_kept(
    tokens: Int[Array, "B T"],
    num_right: Int[Array, " B"],
    room: Int[Array, " B"],
    eos_token_ids: Int[Array, " E"],
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """How many of the chosen tokens each row keeps, and whether an end-of-text token is the last of them.

    The right ones and the one after them, but at most `room`, and none after an end-of-text token.
    """
    T = tokens.shape[1]
    columns = jnp.arange(T, dtype=jnp.int32)[None, :]
    first_end = jnp.min(jnp.where(jnp.isin(tokens, eos_token_ids), columns, T), axis=1)
    counts = jnp.minimum(jnp.minimum(num_right, first_end) + 1, room)
    return counts, first_end < counts


def append(
    held: Shaped[Array, "B W"], new: Shaped[Array, "B T"], starts: Int[Array, " B"], counts: Int[Array, " B"]
) -> Shaped[Array, "B W"]:
    """`held` with row b's first counts[b] new entries in its columns from starts[b] on."""
    W, T = held.shape[1], new.shape[1]
    rows = jnp.arange(held.shape[0], dtype=jnp.int32)[:, None]
    steps = jnp.arange(T, dtype=jnp.int32)[None, :]
    # Beyond the last column, each in a place of its own, where they are dropped.
    columns = jnp.where(steps < counts[:, None], starts[:, None] + steps, W + steps)
    return held.at[rows, columns].set(new, mode="drop", unique_indices=True)


def mark_seen(
    seen: Bool[Array, "B V"] | None, tokens: Int[Array, "B T"], counts: Int[Array, " B"]
) -> Bool[Array, "B V"] | None:
    """`seen` with each row's first counts[b] tokens."""
    if seen is None:
        return None
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    return seen.at[rows, jnp.where(steps < counts[:, None], tokens, seen.shape[1])].set(True, mode="drop")
