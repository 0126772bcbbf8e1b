"""Which tokens each row of a run holds, and rows made ahead of the reader.

Owns the order of training. Knows nothing of files, steps' sizes or devices. The one trap: a row is a function of the
seed and the row's number alone, so that a run may be interrupted, change its batch size or its number of processes,
and still see exactly the rows that it would have seen.

Rows take documents as they come, packed back to back: a row may begin and end inside of one, and documents within it
are told apart by the end-of-text token that each begins with. That is where the training step keeps attention apart.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Int64, Integer

from falcon_jax.errors import ConfigError
from falcon_jax.train.shards import Tokens

_NO_END = 2**62  # steps


class RowOrder:
    """The rows of a run, of `length + 1` tokens each: inputs are all but the last, targets all but the first.

    An epoch cuts the tokens, taken as a ring, into windows of `length` targets from a random phase, and visits them in
    a random permutation; so no token is trained on twice in an epoch, at most `length - 1` are left out, and the cuts
    fall elsewhere in each epoch. Rows run on across epochs. Nothing is held but the epoch's key: the permutation is
    Grain's, which finds each place's window by a cipher.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int = 0) -> None:
        """Raises: ConfigError where there are fewer tokens than a row has targets, or the seed is below 0."""
        if len(tokens) < length:
            raise ConfigError(
                f"length is {length}, but the train split has only {len(tokens)} tokens: shorten the length"
            )
        if seed < 0:
            raise ConfigError(f"seed is {seed}; it must be at least 0")
        self._tokens, self._length, self._seed = tokens, length, seed
        self._epoch = functools.lru_cache(maxsize=4)(self._new_epoch)

    @property
    def num_windows(self) -> int:
        """Rows in an epoch."""
        return len(self._tokens) // self._length

    def starts(self, first_row: int, num_rows: int) -> Int64[np.ndarray, " num_rows"]:
        """Where in the tokens the inputs of rows first_row, first_row + 1, ... begin."""
        starts = np.empty(num_rows, np.int64)
        for number in range(num_rows):
            epoch, place = divmod(first_row + number, self.num_windows)
            phase, windows = self._epoch(epoch)
            starts[number] = (phase + self._length * windows[place]) % len(self._tokens)
        return starts

    def rows(self, first_row: int, num_rows: int) -> Integer[np.ndarray, "num_rows columns"]:
        """Rows first_row, first_row + 1, ..., of a run that never ends."""
        return self._tokens.rows(self.starts(first_row, num_rows), self._length + 1)

    def _new_epoch(self, epoch: int) -> tuple[int, Any]:
        """The token that its first window begins at, and the window of each place."""
        phase_seed, order_seed = np.random.SeedSequence([self._seed, epoch]).spawn(2)
        phase = int(np.random.default_rng(phase_seed).integers(len(self._tokens)))
        windows = grain.MapDataset.range(self.num_windows)
        return phase, windows.shuffle(seed=int(order_seed.generate_state(1)[0]))


@contextlib.contextmanager
def batches[T](
    make: Callable[[int], T], first_step: int, *, num_threads: int = 2, num_ahead: int = 4
) -> Iterator[Iterator[T]]:
    """Gives an iterator of make(first_step), make(first_step + 1), ..., which ends never, or with an error of `make`.

    make: called in Grain's threads, for up to `num_ahead` steps that the reader has not come to; what it returns is not
    None. The threads end when the context does. Nothing has to be saved to resume: the step tells all.
    """
    steps = grain.MapDataset.range(first_step, _NO_END).map(make)
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_ahead)
    iterator = iter(steps.to_iter_dataset(reading))
    try:
        yield iterator
    finally:
        iterator.close()
