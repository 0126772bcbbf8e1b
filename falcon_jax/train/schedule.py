"""The learning rate, and how many rows each step has. Plain arithmetic, no JAX.

Warm-up and the end of training are given in steps or in tokens; both are positions along the run, and the curve is the
same. The step takes rate and rows as arguments, so that neither a ramp nor a number of steps that is settled while the
run is under way (a time budget) compiles anything again. The one trap: warm-up must not depend on the run's length.
"""

import bisect
import dataclasses
import functools
import math

from falcon_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then a cosine down to `min_ratio` of it.

    warmup: what it takes to reach the peak, in the unit of the positions that `rate` is asked for: steps or tokens.
    """

    peak: float
    warmup: int
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf or self.warmup < 0 or not 0 <= self.min_ratio <= 1:
            raise ConfigError(
                f"learning rate {self.peak} must be a number above 0, warm-up {self.warmup} at least 0, "
                f"and the lowest share {self.min_ratio} between 0 and 1"
            )

    def rate(self, done: int, total: int | None) -> float:
        """Learning rate of the step at whose end `done` of `total` steps, or tokens, are done.

        So the first step's rate is above 0, warm-up's last step has the peak, and the last of all the lowest rate.
        total None: not settled yet; the peak is held after warm-up.
        """
        if done <= self.warmup:
            return self.peak * done / self.warmup
        if total is None:
            return self.peak
        progress = (done - self.warmup) / max(1, total - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * cosine)


@dataclasses.dataclass(frozen=True)
class BatchRamp:
    """Rows of each step: from `start_rows` to `full_rows`, `quantum` more at a time, over `ramp_tokens` tokens.

    The ramp's tokens are shared out evenly over the sizes below the full one; a size holds until its share and all
    before it are used up. So the rows follow a straight line over tokens, in whole steps, and no rounding adds up.
    ramp_tokens 0: all steps have `full_rows`. length: tokens a row.

    Source: the rule is that of `--rampup-batch-size` in Megatron-LM (megatron/core/num_microbatches_calculator.py).
    """

    full_rows: int
    length: int
    start_rows: int = 0
    quantum: int = 1
    ramp_tokens: int = 0

    def __post_init__(self) -> None:
        if self.ramp_tokens < 0:
            raise ConfigError(f"ramp of {self.ramp_tokens} tokens: it must be at least 0 (0: no ramp)")
        if not self.ramp_tokens:
            return
        if not 0 < self.start_rows < self.full_rows:
            raise ConfigError(
                f"a ramp from {self.start_rows} to {self.full_rows} rows: it must begin with at least 1 row, and fewer "
                "than the full batch has"
            )
        if self.start_rows % self.quantum or self.full_rows % self.quantum:
            raise ConfigError(
                f"a ramp from {self.start_rows} to {self.full_rows} rows: both must be multiples of a micro-batch, "
                f"which has {self.quantum} rows"
            )

    def rows(self, step: int) -> int:
        """Rows of step 0, 1, ..."""
        return self._size(self._stage(step))

    def rows_before(self, step: int) -> int:
        """Rows of all steps before `step`, which is the number of its first row."""
        starts, rows = self._starts
        stage = self._stage(step)
        return rows[stage] + (step - starts[stage]) * self._size(stage)

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before `step`."""
        return self.rows_before(step) * self.length

    def num_steps(self, total_tokens: int) -> int:
        """The fewest steps with at least so many tokens."""
        wanted = -(-total_tokens // self.length)  # rows
        starts, rows = self._starts
        # The last stage that begins with fewer rows behind it.
        stage = max(0, bisect.bisect_left(rows, wanted) - 1)
        return starts[stage] + max(0, -(-(wanted - rows[stage]) // self._size(stage)))

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._starts[0], step) - 1

    def _size(self, stage: int) -> int:
        if not self.ramp_tokens:
            return self.full_rows
        return self.start_rows + stage * self.quantum

    @functools.cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        """Each stage's first step, and the rows before it; the last stage is the full batch. Both ascend."""
        if not self.ramp_tokens:
            return [0], [0]
        num_stages = (self.full_rows - self.start_rows) // self.quantum
        steps, rows = [0], [0]
        for stage in range(num_stages):
            end = -(-(stage + 1) * self.ramp_tokens // (num_stages * self.length))  # rows, rounded up
            size = self._size(stage)
            num = max(0, -(-(end - rows[-1]) // size))  # 0 where the stage before went past this one's end too
            steps.append(steps[-1] + num)
            rows.append(rows[-1] + num * size)
        return steps, rows


def steps_in_budget(
    remaining_s: float, step_s: float, pauses: list[tuple[float, int]], reserve_fraction: float = 0.03
) -> int:
    """How many steps fit into a time. `pauses`: (seconds, every how many steps) of validations and checkpoints.

    A part of the time is held back: for the end, and because steps vary. Raises: ConfigError where no step fits.
    """
    per_step_s = step_s + sum(pause_s / every for pause_s, every in pauses)
    steps = int(remaining_s * (1 - reserve_fraction) / per_step_s)
    if steps < 1:
        raise ConfigError(
            f"time budget: {remaining_s:.0f} s are left after warm-up, and a step takes {per_step_s:.2f} s; "
            "raise --time-budget-s or shorten --warmup-steps"
        )
    return steps
