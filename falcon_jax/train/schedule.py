"""The learning rate by step: linear warm-up, then a cosine down to a share of the peak. Plain arithmetic, no JAX.

The step takes the rate as an argument, so that the number of steps can be settled while a run is already under way (a
time budget) without compiling anything again. The one trap: warm-up must not depend on the number of steps.
"""

import dataclasses
import math

from falcon_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """peak: highest learning rate; warmup_steps: steps to reach it; min_ratio: share of it that the last step has."""

    peak: float
    warmup_steps: int
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.warmup_steps < 0 or not 0 <= self.min_ratio <= 1:
            raise ConfigError(
                f"learning rate {self.peak} must be above 0, warm-up {self.warmup_steps} at least 0 steps, "
                f"and the lowest share {self.min_ratio} between 0 and 1"
            )

    def rate(self, step: int, total_steps: int | None) -> float:
        """Learning rate of step 0, 1, ..., total_steps - 1.

        total_steps None: not settled yet; the peak is held after warm-up.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if total_steps is None:
            return self.peak
        progress = (step - self.warmup_steps + 1) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * cosine)


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
