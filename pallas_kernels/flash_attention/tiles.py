"""Which tiles of queries a block works on, and when: shared by the kernels of this folder."""

import dataclasses
import functools
import heapq

import numpy as np

# K and V of the heads in work at one time should stay in the second-level cache (50 MB on an H100).
SECTION_BYTES = 32 * 2**20


def padded_length(num_queries: int) -> int:
    """Entries that the log-sum-exp has for T queries: copies want multiples of 16 bytes, tiles of 128 rows."""
    return -(-num_queries // 128) * 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """All tiles of queries, [B, N, num_tiles] of them, and what each costs.

    key_tiles_before: K tiles that the first tile of queries reads besides its own; key_tiles_each: how many more each
    following one does.
    """

    batch: int
    kv_heads: int
    group: int
    num_tiles: int
    bytes_per_kv_head: int
    key_tiles_before: float
    key_tiles_each: float

    def order(self) -> np.ndarray:
        """(row, head, KV head, tile) of all, [total, 4], in the order in which they are begun.

        The later its queries, the more keys a causal tile reads. The most expensive come first, so that the cheap ones
        fill the gaps at the end. Query heads that share K and V come side by side, and no more heads are in work at
        once than have their K and V in the cache.
        """
        pairs = self.batch * self.kv_heads
        most = max(1, SECTION_BYTES // self.bytes_per_kv_head)
        section = max(size for size in range(1, pairs + 1) if pairs % size == 0 and size <= most)
        shape = (pairs // section, self.num_tiles, section, self.group)
        outer, descending, inner, member = (axis.ravel() for axis in np.indices(shape, dtype=np.int32))
        batch, kv_head = np.divmod(outer * section + inner, self.kv_heads)
        tile = self.num_tiles - 1 - descending
        return np.stack([batch, kv_head * self.group + member, kv_head, tile], axis=-1)

    @functools.lru_cache(maxsize=64)  # noqa: B019 (frozen and small)
    def schedule(self, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Each block's tiles [num_blocks, rounds, 4], and how many of them count, [num_blocks].

        Each tile in order goes to the block that will be free first: what a queue would do, but decided beforehand,
        so that a block knows its next tile early. Rows of unequal lengths are taken as equal.
        """
        order = self.order()
        # In K tiles; starting and ending a tile of queries takes about as long as one and a half.
        costs = 1.5 + self.key_tiles_before + self.key_tiles_each * (order[:, 3] + 1)
        free = [(0.0, block) for block in range(num_blocks)]
        taken: list[list[int]] = [[] for _ in range(num_blocks)]
        for number, cost in enumerate(costs.tolist()):
            time, block = free[0]
            taken[block].append(number)
            heapq.heapreplace(free, (time + cost, block))
        counts = np.array([len(numbers) for numbers in taken], np.int32)
        table = np.zeros((num_blocks, int(counts.max()), 4), np.int32)
        for block, numbers in enumerate(taken):
            table[block, : len(numbers)] = order[numbers]
        return table, counts
