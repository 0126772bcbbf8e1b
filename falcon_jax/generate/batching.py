"""Which few array shapes serve prompts of any length.

Owns the buckets, the plan of a prefill and the padding of rows. Plain Python and numpy: nothing here traces.
The trap: every distinct size is one more executable, and for a 40B model each takes seconds to compile.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

MIN_BUCKET = 32
MIN_CAPACITY = 128
# Above this, doubling would waste gigabytes of cache: four sizes to an octave there.
FINE_ABOVE = 2048
# One prefill call takes at most this many tokens of one row, which keeps the matrix products busy, and of all
# rows together, which bounds the activations.
MAX_CHUNK = 4096
MAX_CALL_TOKENS = 4096
# A remainder is cut in two where rounding it up would waste much: a quarter, or an eighth of a large one. Below the
# first of these a second call costs more than the waste.
MIN_SPLIT = 256
MIN_FINE_SPLIT = 2048


def round_up(size: int, smallest: int) -> int:
    """The bucket that holds `size`: powers of two from `smallest`, with quarter steps above 2048."""
    bucket = smallest
    while bucket < size:
        bucket *= 2
    if bucket > FINE_ABOVE:
        step = bucket // 8  # the octave below `bucket` in four steps
        bucket = -(-size // step) * step
    return bucket


def prefill_sizes(num_tokens: int, num_rows: int, *, whole: bool = False) -> list[int]:
    """The T of each prefill call for rows of up to `num_tokens` tokens; their sum is at least that.

    Each is a power of two from 32 to 4096, or to less where many rows run together. `whole` asks for one
    call, which positions that depend on the whole length (dynamic RoPE scaling) need.
    """
    if whole:
        return [round_up(num_tokens, MIN_BUCKET)]
    chunk = MAX_CHUNK
    while chunk > MIN_BUCKET and chunk * num_rows > MAX_CALL_TOKENS:
        chunk //= 2
    sizes = [chunk] * (num_tokens // chunk)
    left = num_tokens - sum(sizes)
    while left > 0:
        bucket = max(MIN_BUCKET, 1 << (left - 1).bit_length())
        most = bucket * 7 // 8 if bucket >= MIN_FINE_SPLIT else bucket * 3 // 4
        if bucket > MIN_SPLIT and left <= most:
            bucket //= 2
        sizes.append(bucket)
        left -= bucket
    return sizes


def cache_capacity(num_tokens: int, sizes: Sequence[int]) -> int:
    """Slots a row for a prompt and what follows, `num_tokens` together, prefilled in calls of `sizes`."""
    return round_up(max(num_tokens, sum(sizes)), MIN_CAPACITY)


def pad_rows(rows: Sequence[Sequence[int]], size: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Rows of ids right-padded with 0 to `size`, int32, and their true lengths, int32."""
    token_ids = np.zeros((len(rows), size), np.int32)
    for row, ids in enumerate(rows):
        token_ids[row, : len(ids)] = ids
    return token_ids, np.array([len(row) for row in rows], np.int32)


def seen_tokens(rows: Sequence[Sequence[int]], vocab_size: int) -> Bool[np.ndarray, "B V"]:
    """Which tokens each row holds, for the repetition penalty."""
    seen = np.zeros((len(rows), vocab_size), bool)
    for row, ids in enumerate(rows):
        seen[row, list(ids)] = True
    return seen
