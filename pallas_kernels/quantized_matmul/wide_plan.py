"""How the kernels for many rows divide their work, decided before anything is traced. See wide_tiles.py."""

import dataclasses
import math
from collections.abc import Sequence

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.formats import GROUP
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE

CONSUMERS = 2  # warpgroups of a block that multiply
MOST_ROWS = 256  # of the matrix instruction
# Bytes of 16 weights.
_WEIGHT_BYTES = {"native": 32, "int8": 16, "int4": 8}
# Bytes that a multiprocessor gets in a cycle; cycles to unpack 16 inputs of a tile, and to meet at barriers in between.
_SHARED_BYTES, _CACHE_BYTES = 128, 32
_UNPACKING = {"native": 0, "int8": 80, "int4": 60}
_LOST = 10
# What the compiler lays out beside the plan's own: barriers, what reductions want, gaps.
_RESERVED_BYTES = 3072


@dataclasses.dataclass(frozen=True)
class WidePlan:
    """How a block works.

    outputs: of a tile: 128, of which each of two warpgroups has 64, or 64, of which each has half the rows.
    rows: of a tile, a multiple of 32, at most 256.
    stages: chunks in flight. chunk: its inputs, 64, or 128 where weights are native.
    cluster: neighbouring blocks, 1 or 2, that have the same rows and read every chunk of x once.
    group: tiles of rows that blocks go through before they come to the next outputs.
    """

    outputs: int = 128
    rows: int = 256
    stages: int = 4
    chunk: int = 64
    cluster: int = 1
    group: int = 8

    def check(self, form: str) -> None:
        """Raises ValueError where the kernels cannot work so."""
        good = self.outputs in (TILE, 2 * TILE) and 0 < self.rows <= MOST_ROWS and self.rows % 32 == 0
        good = good and self.chunk in ((64, 128) if form == "native" else (64,)) and self.cluster in (1, 2)
        if not good or self.stages < 2 or self.group < 1:
            raise ValueError(f"{self} does not suit weights that are {form}")
        if self.smem_bytes(form) > compat.MAX_SMEM_BYTES:
            raise ValueError(f"{self} takes {self.smem_bytes(form)} bytes of shared memory, of {compat.MAX_SMEM_BYTES}")

    @property
    def weight_parts(self) -> int:
        """Parts of a tile's outputs, 64 each. With `row_parts` of its rows they make one part for each warpgroup."""
        return self.outputs // TILE

    @property
    def row_parts(self) -> int:
        return CONSUMERS // self.weight_parts

    @property
    def rows_each(self) -> int:
        """Of a warpgroup."""
        return self.rows // self.row_parts

    @property
    def rows_out(self) -> int:
        """Rows that a warpgroup sends to device memory at a time."""
        return math.gcd(self.rows_each, 64)

    def smem_bytes(self, form: str) -> int:
        scales = 0 if form == "native" else self.outputs * {"int8": 4, "int4": 2}[form]
        chunk = self.chunk * (2 * self.rows + self.outputs * _WEIGHT_BYTES[form] // 16) + scales
        return self.stages * chunk + CONSUMERS * 2 * self.rows_out * TILE * 2 + _RESERVED_BYTES

    def cycles(self, form: str) -> float:
        """For 16 inputs of a tile, a guess: the longest of what goes on at the same time, and what is lost."""
        products = self.rows_each * CONSUMERS / 2
        left = TILE * 32 if form == "native" else 0  # in registers else
        read = CONSUMERS * (left + 32 * self.rows_each)
        weights = _WEIGHT_BYTES[form] * self.outputs
        shared_memory = (read + 32 * self.rows + weights) / _SHARED_BYTES
        cache = (32 * self.rows / self.cluster + weights) / _CACHE_BYTES
        return float(max(products, shared_memory, cache, _UNPACKING[form]) + _LOST)


@dataclasses.dataclass(frozen=True)
class WideLaunch:
    """What a launch makes: products side by side, or one sum of several.

    num_inputs: of each term. num_outputs: of each product; of a sum there is one number.
    """

    form: str
    num_rows: int
    num_inputs: tuple[int, ...]
    num_outputs: tuple[int, ...]
    plan: WidePlan
    num_sms: int

    @property
    def row_tiles(self) -> int:
        return -(-self.num_rows // self.plan.rows)

    @property
    def units(self) -> list[int]:
        """Of each product: as many outputs as a cluster makes at a time."""
        return units(self.num_outputs, self.plan)

    @property
    def num_positions(self) -> int:
        return sum(self.units) * self.row_tiles

    @property
    def num_clusters(self) -> int:
        return min(self.num_sms // self.plan.cluster, self.num_positions)

    @property
    def num_blocks(self) -> int:
        return self.num_clusters * self.plan.cluster

    @property
    def num_chunks(self) -> list[int]:
        """Of each term. Weights of 8 and 4 bits come in whole groups."""
        whole = self.plan.chunk if self.form == "native" else GROUP
        return [-(-size // whole) * whole // self.plan.chunk for size in self.num_inputs]


def units(num_outputs: Sequence[int], plan: WidePlan) -> list[int]:
    return [-(-size // (plan.outputs * plan.cluster)) for size in num_outputs]


def default_plan(form: str, num_rows: int, num_outputs: Sequence[int], num_sms: int) -> WidePlan:
    """The plan whose blocks are done first, by a count of cycles; not yet by measurement.

    Args:
      num_outputs: of each product of a launch.
      num_sms: multiprocessors. An odd number, or one, lets blocks work on their own.
    """
    cluster = 2 if num_sms % 2 == 0 else 1
    plans = [
        WidePlan(outputs, rows, cluster=cluster) for outputs in (2 * TILE, TILE) for rows in range(MOST_ROWS, 32, -32)
    ]

    def cycles(plan: WidePlan) -> float:
        num_tiles = sum(units(num_outputs, plan)) * -(-num_rows // plan.rows)
        return -(-num_tiles // (num_sms // plan.cluster)) * plan.cycles(form)

    best = min(plans, key=cycles)  # of equal ones the largest tile
    stages = max(
        n for n in range(2, 9) if dataclasses.replace(best, stages=n).smem_bytes(form) <= compat.MAX_SMEM_BYTES
    )
    return dataclasses.replace(best, stages=stages)
