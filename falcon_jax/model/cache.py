"""The KV cache: K heads a layer, never N, with a length of its own for each row.

Row b's token at position p lives in slot p. What lies past `lengths[b]` is garbage that nobody reads: a later write
covers it before causality lets a query see it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from falcon_jax import sharding
from falcon_jax.config import FalconConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """Keys and values of all layers. Pass it through jit donated: every step returns a new one in the same memory."""

    keys: tuple[Float[Array, "B S K H"], ...]  # a layer each; before rotation under dynamic RoPE scaling
    values: tuple[Float[Array, "B S K H"], ...]
    lengths: Int[Array, " B"]  # tokens held by each row

    @classmethod
    def create(
        cls, config: FalconConfig, batch_size: int, capacity: int, dtype: DTypeLike, mesh: Mesh | None = None
    ) -> KVCache:
        """An empty cache of `capacity` slots a row, on the default device or laid out over `mesh`."""
        shape = (batch_size, capacity, config.num_kv_heads, config.head_dim)
        device = None if mesh is None else sharding.cache_sharding(shape, mesh)
        rows = None if mesh is None else sharding.batch_sharding((batch_size,), mesh)

        # Made by one call: as many calls as arrays would take longer than a short prompt does.
        keys, values = _zeros(config.num_layers, shape, jnp.dtype(dtype), device)()
        return cls(keys, values, jnp.zeros(batch_size, jnp.int32, device=rows))

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.keys[0].shape[1]

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    def repeat(self, num_copies: int) -> KVCache:
        """Each row `num_copies` times, copies side by side: for several samples of one prompt."""
        return jax.tree.map(lambda x: jnp.repeat(x, num_copies, axis=0), self)


@functools.lru_cache(maxsize=64)
def _zeros(num_layers: int, shape: tuple[int, ...], dtype: DTypeLike, layout: Any):
    """A compiled function that makes the keys and the values of an empty cache."""

    def make() -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        def layers() -> tuple[Array, ...]:
            return tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))

        return layers(), layers()

    return jax.jit(make, out_shardings=layout)


def write(
    slots: Float[Array, "B S K H"], new: Float[Array, "B T K H"], lengths: Int[Array, " B"]
) -> Float[Array, "B S K H"]:
    """Puts row b's T new entries into slots lengths[b] + t.

    Several entries a row: those past the capacity are dropped. A single one past it goes into the last slot: only a
    row that has ended, which nobody reads, is that full, and to look before writing costs two more launches a layer.
    """
    B, T = new.shape[:2]
    new = new.astype(slots.dtype)
    if B == T == 1:
        # Of a scatter XLA makes the same, with a look at the bounds before.
        written = jax.lax.dynamic_update_slice_in_dim(slots, new, lengths[0], axis=1)
    else:
        rows = jnp.arange(B, dtype=jnp.int32)[:, None]
        columns = lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        mode = "clip" if T == 1 else "drop"
        written = slots.at[rows, columns].set(new, mode=mode, unique_indices=True, indices_are_sorted=True)
    # Keeps the write apart from what reads it: merged with the attention it is no longer done in place, and every
    # step of decoding copies the whole cache (benchmarks/LOG.md).
    return jax.lax.optimization_barrier(written)


def places(lengths: Int[Array, " B"], num_columns: int, capacity: int) -> Int[Array, " tokens"]:
    """Where `write` puts T entries a row, counted over the slots of all rows; one past the last slot for none."""
    columns = lengths[:, None] + jnp.arange(num_columns, dtype=jnp.int32)[None, :]
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(columns < capacity, rows * capacity + columns, lengths.shape[0] * capacity).reshape(-1)


def cache_bytes(config: FalconConfig, batch_size: int, num_tokens: int, dtype: DTypeLike) -> int:
    """Bytes that keys and values of `batch_size` rows of `num_tokens` tokens take."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return batch_size * num_tokens * per_token
