"""Rows of documents that lie back to back, as tests need them."""

import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def spans(documents: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First position of each document of a row, and the one after its last."""
    return itertools.pairwise((0, *itertools.accumulate(documents)))


def starts_of(rows: Sequence[Sequence[int]]) -> Int[Array, "B T"]:
    """`starts` of attention, for rows of documents of these lengths."""
    table = [[first for first, end in spans(documents) for _ in range(end - first)] for documents in rows]
    return jnp.asarray(np.asarray(table), jnp.int32)
