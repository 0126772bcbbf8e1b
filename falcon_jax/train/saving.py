"""What a run keeps: its last states, to go on from, and its best weights.

The one trap: everything that a later step depends on must be in the checkpoint or a function of the step number, or a
resumed run would differ. And what is said of a step (metrics) must be on disk before the checkpoint of that step.
"""

import dataclasses
import math
from pathlib import Path

from falcon_jax.checkpoint.store import TrainCheckpoints
from falcon_jax.model.params import Params
from falcon_jax.train.step import State


@dataclasses.dataclass(frozen=True)
class Progress:
    """What goes with a state. total_steps: None while a time budget has not settled them. spent_s: by the run so far.
    validated_step: the last one after which it was validated, -1 if none."""

    total_steps: int | None
    spent_s: float
    validated_step: int


class RunCheckpoints:
    """Two folders of checkpoints in a run's output. Every process calls each method; they save in the background."""

    def __init__(self, output: Path) -> None:
        self._last = TrainCheckpoints(output / "checkpoints")
        self._best = TrainCheckpoints(output / "best", max_to_keep=1)
        self.best_step, self.best_nats = -1, math.inf
        best_step = self._best.latest_step()
        if best_step is not None:
            # Asked of the weights themselves: a lost process may have kept better ones after its last checkpoint.
            self.best_step, self.best_nats = best_step, self._best.metadata()["nats"]

    def restore(self, abstract_state: State) -> tuple[int, State, Progress] | None:
        """The newest state and its step; None in a new run. Raises: CheckpointError where it is damaged."""
        step = self._last.latest_step()
        if step is None:
            return None
        state, progress = self._last.restore(abstract_state, step=step)
        return step, state, Progress(**progress)

    def save(self, step: int, state: State, progress: Progress) -> None:
        self._last.save(step, state, dataclasses.asdict(progress))

    def offer(self, step: int, weights: Params, nats: float) -> bool:
        """Keeps the weights if they are the best yet, or are those already kept. Returns whether they are.

        nats: on the validation split.
        """
        if nats < self.best_nats:
            self.best_nats, self.best_step = nats, step
            self._best.save(step, weights, {"nats": nats})
        return self.best_step == step

    def best_weights(self, abstract_weights: Params) -> Params:
        """Raises: CheckpointError where there are none, or they are damaged."""
        self._best.wait()
        return self._best.restore(abstract_weights)[0]

    def close(self) -> None:
        """Waits for what is being written."""
        self._best.close()
        self._last.close()
