"""What a run says while it goes: metrics, speed, a progress bar, and a picture at the end.

Reads the device's numbers one logging interval late, when they have long been computed. All processes read them, since
all must learn of a loss that is not finite; process 0 alone writes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from falcon_jax.config import FalconConfig
from falcon_jax.train import flops, processes
from falcon_jax.train.batches import Batches
from falcon_jax.train.metrics import MetricsFile, Sink, Stopwatch, TensorBoard, device_memory
from falcon_jax.train.plot import plot_run
from falcon_jax.train.settings import TrainConfig
from falcon_jax.train.step import Metrics

METRICS_FILE, PICTURE_FILE, EVENTS_FOLDER = "metrics.jsonl", "loss.png", "tensorboard"


class Reporter:
    """Takes each step's metrics as they are on the device, and writes them when they are due."""

    def __init__(
        self,
        config: TrainConfig,
        model: FalconConfig,
        batches: Batches,
        first_step: int,
        validated_step: int,
        total_steps: int | None,
    ) -> None:
        """first_step: steps that were done before this process. validated_step: the last one validated before it."""
        self._config, self._batches, self._ramp = config, batches, config.ramp
        self._pending: list[tuple[int, Metrics]] = []
        self._shown_step = self._timed_step = first_step
        self._stopwatch, self._tokens_per_s = Stopwatch(), 0.0
        self._flops_per_token = flops.train_flops_per_token(model, config.length, is_frozen=bool(config.lora))
        self._peak_flops = _peak_flops(config)
        self._first_step_s: float | None = None  # until it is written
        self._sinks: list[Sink] = []
        if processes.is_main():
            self._sinks.append(MetricsFile(config.output / METRICS_FILE, first_step, validated_step))
            if config.tensorboard:
                self._sinks.append(TensorBoard(config.output / EVENTS_FOLDER, first_step))
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            desc="training",
            mininterval=_bar_interval_s(),
            disable=not processes.is_main(),
        )
        if first_step == 0 and jax.default_backend() == "cpu" and config.step.compute_dtype != "float32":
            self.say(
                f"most CPUs compute faster in float32 than in {config.step.compute_dtype}: --compute-dtype float32"
            )

    def add(self, step: int, metrics: Metrics) -> None:
        """metrics: of the step that made `step` steps done, still on the device."""
        self._pending.append((step, metrics))

    def first_step_done(self, seconds: float) -> None:
        """Told once, when the first step of this process has ended, compilation and all; no speed counts its time."""
        self._first_step_s = seconds
        self.say(f"first step: {seconds:.1f} s, compilation included")
        self._stopwatch.start()
        self._timed_step = self._pending[-1][0]

    def report(self, up_to: int, total_steps: int | None, elapsed_s: float) -> int | None:
        """Writes the steps up to `up_to` (0: none) as one record. Waits for no later ones.

        elapsed_s: of the run so far.

        Returns: the first step whose loss or gradient was not finite, counted from 0; those before it are written.
        """
        ready = [(step, metrics) for step, metrics in self._pending if step <= up_to]
        if not ready:
            return None
        self._pending = self._pending[len(ready) :]
        values = jax.device_get([metrics for _, metrics in ready])
        self._measure(ready[-1][0])
        bad = int(values[-1]["first_bad_step"])
        if bad < 0:
            self._write_steps(ready[-1][0], values, total_steps, elapsed_s)
            return None
        finite = [value for (step, _), value in zip(ready, values) if step <= bad]
        if finite:
            self._write_steps(bad, finite, total_steps, elapsed_s)
        return bad

    def _write_steps(
        self, step: int, values: Sequence[dict[str, Any]], total_steps: int | None, elapsed_s: float
    ) -> None:
        """One record of the steps with these metrics, of which `step` is the last."""
        last = values[-1]
        loss = float(np.mean([value["loss"] for value in values]))
        rate = self._config.rate(step - 1, total_steps)
        record = {
            "loss": loss,
            "z_loss": float(last["z_loss"]),
            "grad_norm": float(last["grad_norm"]),
            "learning_rate": rate,
            "tokens": self._ramp.tokens_before(step),
            "batch_rows": self._ramp.rows(step - 1),
            "epoch": self._batches.epochs(step),
            "elapsed_s": round(elapsed_s, 2),
            **self._speed(),
            **device_memory(jax.local_devices()),
        }
        if self._first_step_s is not None:
            record["first_step_s"], self._first_step_s = round(self._first_step_s, 3), None
        self.write("train", step, **record)
        speed = f", {self._tokens_per_s:,.0f} tokens/s" if self._tokens_per_s else ""
        mfu = f", MFU {record['mfu']:.1%}" if "mfu" in record else ""
        self._bar.set_postfix_str(f"loss {loss:.4f}{speed}{mfu}, lr {rate:.2e}", refresh=False)
        self._bar.update(step - self._shown_step)
        self._shown_step = step

    def _measure(self, done: int) -> None:
        """Of the steps that ended since the last report: up to `done`, for which it waited, and later ones that have
        ended too. Of those that the device was only handed it is not known when they will end."""
        for step, metrics in self._pending:
            loss: Any = metrics["loss"]
            if not loss.is_ready():
                break
            done = step
        if done > self._timed_step:
            num_tokens = self._ramp.tokens_before(done) - self._ramp.tokens_before(self._timed_step)
            self._tokens_per_s = num_tokens / self._stopwatch.read_s()
            self._timed_step = done

    def _speed(self) -> dict[str, float]:
        """Nothing before there is a step after the first, and no MFU where the device's peak is not known."""
        if not self._tokens_per_s:
            return {}
        speed = {"tokens_per_s": round(self._tokens_per_s, 1)}
        if self._peak_flops is not None:
            speed["mfu"] = round(self._tokens_per_s * self._flops_per_token / self._peak_flops, 4)
        return speed

    def pause(self, seconds: float) -> None:
        """Keeps time that was not training out of the speed."""
        self._stopwatch.add_pause(seconds)

    def write(self, kind: str, step: int, **values: Any) -> None:
        for sink in self._sinks:
            sink.write(kind, step, **values)

    def say(self, message: str) -> None:
        """A line on stderr, above the progress bar."""
        if processes.is_main():
            self._bar.write(message, file=sys.stderr)

    def set_total(self, total_steps: int) -> None:
        self._bar.total = total_steps
        self._bar.refresh()

    def draw(self) -> None:
        """The picture of the run so far; where matplotlib is missing, a line that says so."""
        if not processes.is_main():
            return
        output: Path = self._config.output
        title = f"{output.name}: {self._config.model_name}"
        try:
            plot_run(output / METRICS_FILE, output / PICTURE_FILE, title)
        except ImportError:
            self.say("no picture of the losses: matplotlib is not installed (pip install 'falcon-jax[plots]')")

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._bar.close()


def _peak_flops(config: TrainConfig) -> float | None:
    """Of all devices of the run; None where it is not stated, or the products are not those that it is stated for."""
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    if peak is None or config.step.compute_dtype == "float32":
        return None
    return peak * config.num_devices


def _bar_interval_s() -> float:
    """A terminal redraws one line; a log file gets a line each time."""
    return 0.5 if sys.stderr.isatty() else 10.0
