"""Which blocks of keys concern which tiles of queries, and in which order the backward kernel takes them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

KEYS = 128  # of a block: two warpgroups with 64 each


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of one call. T and S have been padded to multiples of 8; `queries` is those of a tile."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    queries: int

    @property
    def group(self) -> int:
        return self.N // self.K

    @property
    def num_query_tiles(self) -> int:
        return -(-self.T // self.queries)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.S // KEYS)

    def first_query_tile(self, key_block: Any, offset: Any, length: Any) -> Any:
        """The first tile of queries that a block of keys concerns; `num_query_tiles` where none does.

        Block 0 concerns every tile, so that each tile of dQ has somebody to write it.
        """
        first = lax.div(jnp.maximum(key_block * KEYS - offset, 0), jnp.int32(self.queries))
        concerned = (key_block * KEYS < length) | (key_block == 0)
        return jnp.where(concerned, jnp.minimum(first, self.num_query_tiles), self.num_query_tiles)

    def num_key_blocks_of(self, tile: Any, offset: Any, length: Any) -> Any:
        """How many blocks, from block 0 on, concern a tile of queries: the same rule from the other side."""
        end = jnp.minimum(offset + (tile + 1) * self.queries, jnp.maximum(length, 1))
        return jnp.minimum(lax.div(end + (KEYS - 1), jnp.int32(KEYS)), self.num_key_blocks)

    def first_key_block_of(self, first_start: Any, num_key_blocks: Any) -> Any:
        """The first block that concerns a tile of queries, where documents lie back to back in a row.

        The last of `num_key_blocks` concerns it in any case, so that each tile of dQ has somebody to write it.

        Args:
          first_start: of the tile's first query; those of later ones are no lower.
          num_key_blocks: what `num_key_blocks_of` says of the tile.
        """
        return jnp.minimum(lax.div(first_start, jnp.int32(KEYS)), num_key_blocks - 1)

    def tile_ends(
        self, starts: Int[Array, "B padded"], offsets: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> Int[Array, "B 2 key_blocks"]:
        """Of each block of keys, the first tile of queries past those it concerns, and the first that it is cut for.

        For the latter a query's document begins past the first of the keys. `starts` is filled up to whole tiles.
        """
        tile = jnp.arange(self.num_query_tiles, dtype=jnp.int32)
        count = self.num_key_blocks_of(tile, offsets[:, None], lengths[:, None])
        first, last = starts[:, :: self.queries], starts[:, self.queries - 1 :: self.queries]
        bounds = jnp.stack([self.first_key_block_of(first, count) * KEYS, last], axis=1)  # [B, 2, num_query_tiles]
        keys = jnp.arange(self.num_key_blocks, dtype=jnp.int32) * KEYS
        return jnp.sum(bounds[:, :, None] <= keys[:, None], axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class KeyOrder:
    """The order in which blocks of keys start: balanced, and such that dQ can be added up in a fixed order.

    A block of keys costs as many steps as there are tiles of queries after it. A group is all blocks for one chunk of
    the query heads that share K and V. Groups come in sections that fill the GPU. In the first section the short blocks
    start first, in the next the long ones, and so on: what took a short block then takes a long one, and all end
    together.

    Each tile of dQ is added up in the order in which the blocks of its group start, so a block only ever waits for
    blocks that started before it, however many the GPU runs at a time. And it hardly ever waits. Where the short ones
    start first, all walk from their diagonal to the last query, and block j reaches a tile a step after block j + 1.
    Where the long ones do, they walk backwards from the last query, and have started some steps apart, each in place
    of a block that took one step longer than the one before.
    """

    batch: int
    kv_heads: int
    chunks: int
    num_key_blocks: int
    num_sms: int

    def section_sizes(self) -> list[int]:
        """Groups of each section; the first takes what is left over for their number to be even."""
        groups = self.batch * self.kv_heads * self.chunks
        size = max(1, self.num_sms // self.num_key_blocks)
        if groups <= size:
            return [groups]
        num_sections = 2 * max(1, groups // (2 * size))
        return [groups - (num_sections - 1) * size] + [size] * (num_sections - 1)

    def table(self) -> np.ndarray:
        """(row, KV head, chunk, block of keys, 1 if it walks forwards) in the order of starting, int32 [total, 5]."""
        units, first = [], 0
        for section, size in enumerate(self.section_sizes()):
            forwards = section % 2 == 0
            rank, member = (axis.ravel() for axis in np.indices((self.num_key_blocks, size)))
            pair, chunk = np.divmod(first + member, self.chunks)
            row, kv_head = np.divmod(pair, self.kv_heads)
            key_block = self.num_key_blocks - 1 - rank if forwards else rank
            units.append(np.stack([row, kv_head, chunk, key_block, np.full_like(rank, forwards)], axis=-1))
            first += size
        return np.concatenate(units).astype(np.int32)


def heads_per_block(problem: Problem, num_sms: int) -> int:
    """How many of the query heads that share K and V one block works through.

    dK and dV of all of them are summed in registers, so the more the better, as long as there are two sections that
    fill the GPU.
    """
    groups = 2 * max(1, num_sms // problem.num_key_blocks)
    chunks = min(problem.group, max(1, groups // (problem.B * problem.K)))
    return -(-problem.group // chunks)
