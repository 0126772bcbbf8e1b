"""How the work on a cache is divided among the blocks of a launch: sizes, and the rule that picks them."""

import dataclasses

from pallas_kernels import compat
from pallas_kernels.decode_attention.cluster import Exchange

MAX_HEADS = {64: 80, 128: 64}  # query heads a block can hold in registers, by head dim
MAX_CLUSTER = 16  # blocks of a cluster
MAX_LARGE_CLUSTERS = 4  # of 16 blocks: eight took nearly twice the time of four, as if they did not all run at once
MAX_GRID_SPLITS = 128  # results that are combined in one go
REDUCTION_BYTES = 16384  # for sums over results that lie in memory: with less they wait for one another
SCRATCH_BYTES = 10240  # barriers, slopes, pieces of the result and room to align them


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one launch.

    keys: of a tile, 64 or 128.
    warpgroups: of a block, each with tiles of its own.
    stages: tiles of K, and as many of V, that a warpgroup holds or waits for.
    splits: blocks that share the keys of one row and KV head.
    meeting: how these combine their results. "cluster": as one thread block cluster, at most 16, through each other's
      shared memory. "grid": through the GPU's memory and a counter, any number, as long as all blocks of the launch
      fit the GPU at once.
    max_heads: of a block; query heads of a KV head beyond that are shared out among several blocks, each of which reads
      all keys. None: as many as a block can hold.
    """

    keys: int
    warpgroups: int
    stages: int
    splits: int
    meeting: str = "cluster"
    max_heads: int | None = None

    def __post_init__(self) -> None:
        if self.keys not in (64, 128) or min(self.warpgroups, self.stages, self.splits) < 1:
            raise ValueError(f"{self}: keys must be 64 or 128; warpgroups, stages and splits positive")
        if self.meeting not in ("cluster", "grid"):
            raise ValueError(f"{self}: meeting must be 'cluster' or 'grid'")
        if self.meeting == "cluster" and self.splits > MAX_CLUSTER:
            raise ValueError(f"{self}: a cluster has at most {MAX_CLUSTER} blocks")

    @property
    def num_streams(self) -> int:
        """Warpgroups that share the keys of one row and KV head, and then combine."""
        return self.splits * self.warpgroups

    @property
    def through_memory(self) -> bool:
        """Whether they combine in the GPU's memory."""
        return self.meeting == "grid" and self.splits > 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for: B rows of `capacity` slots, K KV heads, G query heads on each, head dim H."""

    B: int
    K: int
    G: int
    H: int
    capacity: int

    def head_blocks(self, plan: Plan) -> int:
        """Blocks among which the query heads of a KV head are divided."""
        return -(-self.G // min(MAX_HEADS[self.H], plan.max_heads or self.G))

    def heads(self, plan: Plan) -> int:
        """Query heads of a block, padded to the 8 columns that the matrix instruction works in: 71 are 72."""
        return -(-self.G // (8 * self.head_blocks(plan))) * 8

    def pairs(self, plan: Plan) -> int:
        """Independent pieces of work: rows times KV heads (times blocks of query heads)."""
        return self.B * self.K * self.head_blocks(plan)

    @property
    def heads_fill_tiles(self) -> bool:
        """Whether copies can put queries into the order that the matrix instruction reads: 8 heads at a time."""
        return self.G % 8 == 0

    def exchange(self, plan: Plan) -> Exchange | None:
        """What warpgroups and blocks send each other; None where there is one, or where they combine in memory."""
        if plan.num_streams == 1 or plan.through_memory:
            return None
        return Exchange(self.H, self.heads(plan), plan.warpgroups, plan.splits)

    def smem_bytes(self, plan: Plan) -> int:
        """Shared memory of a block at most."""
        W, heads, exchange = plan.warpgroups, self.heads(plan), self.exchange(plan)
        ring = 2 * W * plan.stages * plan.keys * self.H
        passing = heads * ((1 if self.heads_fill_tiles else 2) * self.H + W * plan.keys)
        exchanged = exchange.smem_bytes() if exchange else REDUCTION_BYTES * plan.through_memory
        return 2 * (ring + passing) + exchanged + 32 * W * heads + SCRATCH_BYTES

    def blocks_per_sm(self, plan: Plan) -> int:
        """Blocks that a multiprocessor holds for sure: by shared memory, and by registers, at most 255 a thread."""
        return min(max(1, 2 // plan.warpgroups), compat.MAX_SMEM_BYTES // self.smem_bytes(plan))

    def blocks_at_once(self, plan: Plan, num_sms: int) -> int:
        """Blocks that a GPU with that many multiprocessors holds for sure."""
        return num_sms * self.blocks_per_sm(plan)

    def check(self, plan: Plan, num_sms: int) -> None:
        """Raises ValueError where the plan cannot run: blocks would wait for others that never start."""
        if (asked := self.smem_bytes(plan)) > compat.MAX_SMEM_BYTES:
            raise ValueError(f"{plan}: {asked} bytes of shared memory, and a block can have {compat.MAX_SMEM_BYTES}")
        room, num_blocks = self.blocks_at_once(plan, num_sms), self.pairs(plan) * plan.splits
        if plan.through_memory and num_blocks > room:
            raise ValueError(f"{plan}: {num_blocks} blocks must run at once, and the GPU holds {room}")


def default_plan(shape: Shape, num_sms: int) -> Plan:
    """The plan for a GPU with that many multiprocessors."""
    plan = _plan_as_measured(shape, num_sms)
    # More query heads on a KV head than any published model has take more shared memory and more blocks.
    while shape.smem_bytes(plan) > compat.MAX_SMEM_BYTES:
        less = {"stages": plan.stages - 1} if plan.stages > 2 else {"warpgroups": plan.warpgroups - 1}
        plan = dataclasses.replace(plan, **less)
    splits = shape.blocks_at_once(plan, num_sms) // shape.pairs(plan)
    if not plan.through_memory or plan.splits <= splits:
        return plan
    if splits > 1:
        return dataclasses.replace(plan, splits=splits)
    # One warpgroup a block: several would send each other results, for which there may be no room.
    return dataclasses.replace(plan, splits=1, warpgroups=1)


def _plan_as_measured(shape: Shape, num_sms: int) -> Plan:
    """By what was found on a GPU of 132 multiprocessors (benchmarks/LOG.md).

    Short caches of few rows, up to 8,192 keys, are a matter of latency: clusters, with the query heads shared out too,
    since what blocks send each other grows with their heads and is slower than reading keys twice. Long ones are a
    matter of bandwidth: each block takes all heads, and the KV heads of the same keys are read at the same time, which
    the order of blocks in a grid does better than that of clusters.
    """
    keys, stages = 64, 4 if shape.H == 64 else 2
    tiles, rows = -(-shape.capacity // keys), shape.B * shape.K
    room = num_sms // rows  # blocks of a row, one on each multiprocessor
    many_heads = shape.G > 32
    is_short = tiles <= 16 * (8 if room >= 4 and not many_heads else min(8, room))
    if tiles == 1:
        return Plan(keys, 1, 1, 1)
    if room == 0:
        warpgroups = 1 if many_heads else 2 if shape.H == 128 else 4
        return Plan(keys, warpgroups, 2, 1)
    if is_short and room >= (64 if many_heads else 8):
        return _short_plan(shape, keys, stages, tiles, room, num_sms)
    if is_short and many_heads and room >= 32:  # heads in two: in four was slower (falcon-40b-alibi, four rows)
        return Plan(keys, 2, stages, min(8, -(-tiles // 2)), max_heads=-(-shape.G // 2))
    if many_heads or not is_short:
        warpgroups = 1 if many_heads and (shape.H == 128 or room == 1) else 2
        splits = min(tiles, room, MAX_GRID_SPLITS)
        return Plan(keys, warpgroups, stages, splits, "grid" if many_heads or splits > 2 else "cluster")
    resident = num_sms * shape.blocks_per_sm(Plan(keys, 1, stages, 1)) // rows
    return Plan(keys, 1, stages, min(tiles, room if room >= 4 else resident, 8))


def _short_plan(shape: Shape, keys: int, stages: int, tiles: int, room: int, num_sms: int) -> Plan:
    """With clusters of 16 where a GPU holds so many: each has to find room in one part of it (GPC)."""
    head_blocks = min(room // 8, -(-shape.G // (24 if shape.H == 64 else 16)))
    clusters = shape.B * shape.K * head_blocks
    most = MAX_CLUSTER if num_sms >= compat.NUM_SMS and clusters <= MAX_LARGE_CLUSTERS else 8
    return Plan(keys, 2, stages, min(most, -(-tiles // 2)), max_heads=-(-shape.G // head_blocks))
