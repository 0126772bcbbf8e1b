"""How the work on a cache is divided among the blocks of a launch: sizes, and the rule that picks them."""

import dataclasses

from pallas_kernels import compat

PAGE = 64  # slots of a page
MAX_HEADS = {64: 80, 128: 64}  # query heads a block can hold in registers, by head dim
MAX_CLUSTER = 8  # blocks of a cluster that every Hopper GPU takes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one launch.

    keys: of a tile, 64 or 128.
    stages: tiles of K, and as many of V, that a block holds or waits for.
    splits: blocks that share the keys of one row and KV head.
    meeting: how these wait for each other before they combine. "cluster": they are one thread block cluster, at most 8.
      "grid": through a semaphore in memory, any number, as long as all blocks of the launch fit the GPU at once.
    """

    keys: int
    stages: int
    splits: int
    meeting: str = "cluster"

    def __post_init__(self) -> None:
        if self.keys not in (64, 128) or self.stages < 1 or self.splits < 1:
            raise ValueError(f"{self}: keys must be 64 or 128, stages and splits positive")
        if self.meeting not in ("cluster", "grid"):
            raise ValueError(f"{self}: meeting must be 'cluster' or 'grid'")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for: B rows of `capacity` slots, K KV heads, G query heads on each, head dim H."""

    B: int
    K: int
    G: int
    H: int
    capacity: int

    @property
    def head_blocks(self) -> int:
        """Blocks among which the query heads of a KV head are divided: more than one only beyond MAX_HEADS."""
        return -(-self.G // MAX_HEADS[self.H])

    @property
    def heads(self) -> int:
        """Query heads of a block, padded to the 8 columns that the matrix instruction works in: 71 are 72."""
        return -(-self.G // (8 * self.head_blocks)) * 8

    @property
    def pairs(self) -> int:
        """Independent pieces of work: rows times KV heads (times blocks of query heads)."""
        return self.B * self.K * self.head_blocks

    def smem_bytes(self, plan: Plan) -> int:
        """Shared memory of a block, but for some KiB of scratch."""
        ring = 2 * plan.stages * plan.keys * self.H
        passing = self.heads * max(self.H, plan.keys)
        return 2 * (ring + self.heads * self.H + passing) + 1024 * (self.heads // 8 + 2)

    def blocks_per_sm(self, plan: Plan) -> int:
        """Blocks that a multiprocessor holds for sure: by shared memory, and by registers, at most 255 a thread."""
        return min(2, compat.MAX_SMEM_BYTES // self.smem_bytes(plan))

    def check(self, plan: Plan, num_sms: int) -> None:
        """Raises ValueError where the plan cannot run: blocks would wait for others that never start."""
        room = num_sms * self.blocks_per_sm(plan)
        if plan.meeting == "grid" and self.pairs * plan.splits > room:
            raise ValueError(f"{plan}: {self.pairs * plan.splits} blocks must run at once, and the GPU holds {room}")


def default_plan(shape: Shape, num_sms: int) -> Plan:
    """The plan for a GPU with that many multiprocessors: blocks enough to fill it (benchmarks/LOG.md has timings)."""
    keys = 64
    stages = 4 if shape.H == 64 else 2
    tiles = -(-shape.capacity // keys)
    resident = num_sms * shape.blocks_per_sm(Plan(keys, stages, 1))
    wanted = min(tiles, resident // shape.pairs)
    if wanted <= MAX_CLUSTER:
        return Plan(keys, stages, max(1, wanted))
    return Plan(keys, stages, wanted, "grid")
