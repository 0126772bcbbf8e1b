"""What a run keeps: its last states, to go on from, and its best weights.

The one trap: everything that a later step depends on must be in the checkpoint or a function of the step number, or a
resumed run would differ. So a checkpoint names the best weights as of its step: a run that goes on from it does not
know those of the steps after it, which the lost run may have kept. And what is said of a step (metrics) must be on
disk before the checkpoint of that step.
"""

import dataclasses
from pathlib import Path

from falcon_jax.checkpoint.store import DamagedCheckpointError, TrainCheckpoints
from falcon_jax.errors import CheckpointError
from falcon_jax.model.params import Params
from falcon_jax.train import processes
from falcon_jax.train.step import State

_MAX_LAST = 2  # states that are kept


@dataclasses.dataclass(frozen=True)
class Progress:
    """What goes with a state. total_steps: None while a time budget has not settled them. spent_s: by the run so far.
    validated_step: the last one after which it was validated, -1 if none."""

    total_steps: int | None
    spent_s: float
    validated_step: int


@dataclasses.dataclass(frozen=True)
class Best:
    """Weights that are kept under a number of their own, since a resumed run may come to their step again. step: after
    which they were the best. nats: on the validation split."""

    number: int
    step: int
    nats: float


class RunCheckpoints:
    """Two folders of checkpoints in a run's output. Every process calls each method; they save in the background.

    best: None while nothing was validated, or where somebody deleted the weights.
    """

    def __init__(self, output: Path) -> None:
        self._last = TrainCheckpoints(output / "checkpoints", max_to_keep=_MAX_LAST)
        self._best = TrainCheckpoints(output / "best", max_to_keep=None)
        self.best: Best | None = None
        self._next_number = 0
        self._named: dict[int, int | None] = {}  # numbers of the best weights that the last checkpoints name, by step

    def restore(self, abstract_state: State) -> tuple[int, State, Progress] | None:
        """The newest state and its step; None in a new run.

        Raises: CheckpointError where it is damaged, which says from where the run can go on.
        """
        self._next_number = _of_main(max(self._best.all_steps(), default=-1)) + 1
        step = _of_main(max(self._last.all_steps(), default=-1))
        found = None if step < 0 else (step, *self._restore(abstract_state, step))
        if processes.is_main():
            self._best.sweep()
        self._drop_unnamed()
        return found

    def _restore(self, abstract_state: State, step: int) -> tuple[State, Progress]:
        # Also from process 0: to read a checkpoint's description, too, all processes wait for each other.
        earlier = _of_main(max((found for found in self._last.all_steps() if found < step), default=-1))
        is_readable = earlier >= 0 and self._note(earlier)
        try:
            state, progress = self._last.restore(abstract_state, step=step)
        except DamagedCheckpointError as error:
            then = f"goes on from step {earlier}" if is_readable else "begins the run anew"
            folder = self._last.folder / str(step)
            raise CheckpointError(
                f"{error}: if it stays so, delete the folder {folder}; the same command then {then}"
            ) from error
        best = progress.pop("best", None)
        if best is not None:
            self.best = Best(**best)
            if not _of_main(self.best.number in self._best.all_steps()):
                # Lost before they were on disk. Of the checkpoint's own step they are in it; others were deleted.
                self.best = self._keep(weights_of(state), step, self.best.nats) if self.best.step == step else None
        self._named[step] = None if self.best is None else self.best.number
        return state, Progress(**progress)

    def _note(self, step: int) -> bool:
        """Remembers which best weights a checkpoint names. Returns whether it can be read, as far as that tells."""
        try:
            best = self._last.metadata(step=step).get("best")
        except DamagedCheckpointError:
            return False
        self._named[step] = None if best is None else best["number"]
        return True

    def save(self, step: int, state: State, progress: Progress) -> None:
        if self.best is not None and self.best.step < step:
            self._best.wait()  # a checkpoint that counts must find the weights that it names, or have them itself
        best = None if self.best is None else dataclasses.asdict(self.best)
        self._last.save(step, state, {**dataclasses.asdict(progress), "best": best})
        self._named[step] = None if self.best is None else self.best.number
        self._named = dict(sorted(self._named.items())[-_MAX_LAST:])
        self._drop_unnamed()

    def offer(self, step: int, weights: Params, nats: float) -> bool:
        """Keeps the weights if they are the best yet, or are those already kept. Returns whether they are.

        nats: on the validation split.
        """
        if self.best is None or nats < self.best.nats:
            self.best = self._keep(weights, step, nats)
            self._drop_unnamed()
        return self.best.step == step

    def best_weights(self, abstract_weights: Params) -> Params:
        """Raises: CheckpointError where they are damaged."""
        assert self.best is not None
        self._best.wait()
        try:
            return self._best.restore(abstract_weights, step=self.best.number)[0]
        except DamagedCheckpointError as error:
            raise CheckpointError(
                f"{error}: if it stays so, delete the folder {self._best.folder / str(self.best.number)}; the same "
                "command then takes the last weights"
            ) from error

    def _keep(self, weights: Params, step: int, nats: float) -> Best:
        best = Best(self._next_number, step, nats)
        self._next_number += 1
        self._best.save(best.number, weights, {"step": step, "nats": nats})
        return best

    def _drop_unnamed(self) -> None:
        """Deletes weights that none can ask for: neither this process, nor one that goes on from a checkpoint."""
        if not processes.is_main():
            return
        named = {*self._named.values(), None if self.best is None else self.best.number}
        for number in self._best.all_steps():
            if number not in named:
                self._best.delete(number)

    def close(self) -> None:
        """Waits for what is being written."""
        self._best.close()
        self._last.close()


def weights_of(state: State) -> Params:
    """What of a state is validated, and written in the end."""
    return state.get("ema", state["params"])


def _of_main(number: int) -> int:
    """Process 0's number, from -1 on, in all of them: a disk of the network may not show all the same at once."""
    high, low = processes.as_main(divmod(float(number), 2**20))  # each of which a float32 holds
    return int(high) * 2**20 + int(low)
