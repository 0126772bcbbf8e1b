"""Something that a run trains in no time: one number, which each step moves by its tokens and rate."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.train import loop
from falcon_jax.train.loop import Trainer
from falcon_jax.train.settings import TrainConfig


class LostError(BaseException):
    """Nothing catches it, as nothing catches the end of a process."""


class Counting:
    """A trainee. lost_at: steps done when the process ends. exported: the weights that runs wrote at their ends."""

    def __init__(self) -> None:
        self.lost_at, self.exported, self.num_evaluated = -1, [], 0

    def init_state(self) -> dict[str, Any]:
        return {"params": {"w": jnp.zeros(())}, "step": jnp.zeros((), jnp.int32)}

    def abstract_state(self) -> dict[str, Any]:
        return jax.eval_shape(self.init_state)

    def step(self, state: dict[str, Any], tokens: Any, rate: Any) -> tuple[dict, dict]:
        if int(state["step"]) == self.lost_at:
            raise LostError
        w = state["params"]["w"] + rate * (1.0 + np.asarray(tokens).sum() % 7)
        metrics = {"loss": w, "z_loss": jnp.zeros(()), "grad_norm": w, "first_bad_step": jnp.asarray(-1)}
        return {"params": {"w": w}, "step": state["step"] + 1}, metrics

    def evaluate(self, params: dict[str, Any], tokens: Any, counts: Any) -> jax.Array:
        self.num_evaluated += 1
        return jnp.full((tokens.shape[0], tokens.shape[1] - 1), 1.0 + params["w"] % 1.0)

    def export(self, weights: dict[str, Any], output: Path) -> None:
        self.exported.append(float(weights["w"]))


def use(trainee: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has runs train this from now on."""
    monkeypatch.setattr(loop.trainee, "of_run", lambda *_: trainee)


def run(config: TrainConfig, nats: dict[int, float] | None = None) -> loop.Result:
    """nats: what validation gives after each step; a function of the weights if left out."""
    trainer = Trainer(config)
    if nats is not None:
        trainer.validation_nats = lambda _: nats[trainer.step]  # type: ignore[method-assign]
    return trainer.run()
