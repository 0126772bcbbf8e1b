"""What a run trains: all weights of a model, new or from a checkpoint, or low-rank adapters beside frozen ones.

Owns how a run begins, which step it takes and what it leaves behind. The loop (loop.py) knows only the methods here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_jax import checkpoint
from falcon_jax.checkpoint.peft_files import write_adapter
from falcon_jax.config import FalconConfig
from falcon_jax.model.params import Params
from falcon_jax.train import lora, processes
from falcon_jax.train import step as train_step
from falcon_jax.train.final import write_model
from falcon_jax.train.lora import AdaptedModel
from falcon_jax.train.settings import BUNDLED_NAME, TrainConfig
from falcon_jax.train.step import Metrics, State

EXPORT_DTYPE = "bfloat16"


@runtime_checkable
class Trainee(Protocol):
    """step: as step.make_train_step gives it; evaluate: as step.make_eval_step, over the state's "params"."""

    config: FalconConfig
    step: Callable[..., tuple[State, Metrics]]
    evaluate: Callable[[Params, Any, Any], jax.Array]

    def init_state(self) -> State: ...

    def abstract_state(self) -> State: ...

    def export(self, weights: Params, output: Path) -> None:
        """Writes what was trained into the run's folder, in place of an earlier one; called by all processes."""
        ...


def of_run(config: TrainConfig, mesh: Mesh | None) -> Trainee:
    """Raises: ConfigError or CheckpointError where `base` does not fit the settings."""
    return _Adapters(config, mesh) if config.lora else _WholeModel(config, mesh)


class _WholeModel:
    def __init__(self, run: TrainConfig, mesh: Mesh | None) -> None:
        self.config = run.model_config()
        self._run, self._mesh = run, mesh
        arguments = (self.config, run.step_options, run.forward, mesh)
        self.step = train_step.make_train_step(*arguments)
        self.evaluate = train_step.make_eval_step(*arguments)

    def init_state(self) -> State:
        run, params = self._run, None
        if run.base is not None:
            params = checkpoint.load(run.base_folder, dtype=jnp.float32, mesh=self._mesh).params
        return train_step.init_state(self.config, run.step_options, run.seed, self._mesh, params)

    def abstract_state(self) -> State:
        return train_step.abstract_state(self.config, self._run.step_options, self._mesh)

    def export(self, weights: Params, output: Path) -> None:
        # To the host before a pipeline's layers are taken apart, which on the devices would put all of them on each.
        whole = processes.on_main(weights, EXPORT_DTYPE)
        if processes.is_main():
            model = train_step.model_of(whole, self._mesh)
            write_model(self.config, model, output / "model", self._run.tokenizer_folder, EXPORT_DTYPE)


class _Adapters:
    def __init__(self, run: TrainConfig, mesh: Mesh | None) -> None:
        dtype = run.step.compute_dtype
        loaded = checkpoint.load(run.base_folder, dtype=dtype, weights=run.base_weights, mesh=mesh)
        self.config, self._frozen = loaded.config, loaded.params
        self._run = run
        self._model = AdaptedModel(self.config, run.adapters(), run.step_options, run.forward, mesh)
        step, evaluate = lora.make_train_step(self._model), lora.make_eval_step(self._model)
        self.step = lambda state, *rest: step(state, self._frozen, *rest)
        self.evaluate = lambda adapters, *rest: evaluate(adapters, self._frozen, *rest)

    def init_state(self) -> State:
        return lora.init_state(self._model, self._run.seed)

    def abstract_state(self) -> State:
        return lora.abstract_state(self._model)

    def export(self, weights: Params, output: Path) -> None:
        whole = processes.on_main(weights, "float32")
        if processes.is_main():
            base = str(self._run.base_folder if self._run.base == BUNDLED_NAME else self._run.base)
            write_adapter(output / "adapter", self.config, self._model.lora, whole, base_model=base)
