"""falcon_jax as a contestant of benchmarks/training.py: the very step that scripts/train.py takes, on random tokens.

All weights, or adapters beside frozen ones, made on the device. Tokens come as train/batches.py hands them out, the
state is donated, and the loss stays on the device until the end, as in train/loop.py.
"""

import dataclasses
import gc
import time
from typing import Any, ClassVar

import jax
import numpy as np

from benchmarks import hardware, measure
from benchmarks.measure import Peak
from benchmarks.training_cases import Variant, Work
from benchmarks.training_measure import LEARNING_RATE, SEED, Contestant
from falcon_jax.model import params as model_params
from falcon_jax.train import lora
from falcon_jax.train import step as train_step
from falcon_jax.train.lora import AdaptedModel


@dataclasses.dataclass(frozen=True)
class Ours(Contestant):
    """falcon_jax with one variant's settings."""

    name: ClassVar[str] = measure.Ours.name
    ours: ClassVar[bool] = True
    work: Work
    variant: Variant
    platform: str

    @property
    def settings(self) -> dict[str, Any]:
        return self.variant.settings

    def load(self) -> "OurTrainer":
        return OurTrainer(self.work, self.variant)


class OurTrainer:
    """A training state and its compiled step."""

    def __init__(self, work: Work, variant: Variant):
        options = variant.step
        rows = work.tokens(variant.batch_size)
        tokens = jax.device_put(rows.reshape(options.num_micro_batches, -1, work.length + 1))
        rate = np.float32(LEARNING_RATE)
        self.step: Any
        if work.lora is None:
            self.step = train_step.make_train_step(work.config, options, variant.forward, None)
            self.state = train_step.init_state(work.config, options, SEED)
            self.arguments: tuple[Any, ...] = (tokens, rate)
        else:
            model = AdaptedModel(work.config, work.lora, options, variant.forward)
            key = jax.random.key(SEED)
            frozen = model_params.init(work.config, key, options.compute_dtype, None, variant.weights)
            self.step = lora.make_train_step(model)
            self.state = lora.init_state(model, SEED)
            self.arguments = (frozen, tokens, rate)
        jax.block_until_ready((self.state, self.arguments))
        self.compiled: Any = None
        self.metrics: list[dict[str, jax.Array]] = []
        self.found: dict[str, Any] = {"state_gib": model_params.num_bytes(self.state) / measure.GIB}
        self.peak_before = hardware.peak_bytes()

    def first_step(self) -> None:
        begin = time.perf_counter()
        lowered = self.step.lower(self.state, *self.arguments)
        traced = time.perf_counter()
        # For its plan of the memory and its text. The call below finds it compiled; the count of programs tells.
        self.compiled = lowered.compile()
        self.found |= {"trace_s": traced - begin, "compile_s": time.perf_counter() - traced}
        self.found["planned_gib"] = planned_bytes(self.compiled) / measure.GIB
        self.take(1)
        self.wait()

    def take(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.state, metrics = self.step(self.state, *self.arguments)
            self.metrics.append(metrics)

    def wait(self) -> None:
        jax.block_until_ready(self.state)

    def losses(self) -> list[float]:
        bad_step = int(self.metrics[-1]["first_bad_step"])
        if bad_step >= 0:
            raise ArithmeticError(f"the loss or a gradient was not finite in step {bad_step}")
        return [float(metrics["loss"]) for metrics in self.metrics]

    def peak(self) -> Peak | None:
        # JAX's peak is its process's, making the weights included.
        peak = hardware.peak_bytes()
        return None if peak is None else Peak(peak, is_upper_bound=peak == self.peak_before)

    def program_text(self) -> str:
        """What was compiled, as XLA prints it."""
        return self.compiled.as_text()

    def close(self) -> None:
        del self.state, self.arguments, self.compiled, self.metrics
        gc.collect()


def planned_bytes(compiled: Any) -> int:
    """Of a compiled program at its peak, as its compiler planned it: what it is given, makes and needs meanwhile."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    # A CPU's says no peak.
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return peak or memory.argument_size_in_bytes + memory.temp_size_in_bytes + made
