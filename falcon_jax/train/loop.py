"""The training run: steps, validation, checkpoints and the final model, resumable at any step.

Owns time and the order of things; the arithmetic is in step.py, what is written in reporting.py and saving.py. The
device is never waited for between checkpoints. The one trap: with several processes each runs this same code, and what
only one of them knows (its clock, a signal) may decide nothing before all know it (processes.py).
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from falcon_jax import sharding
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.tokenizer import Tokenizer
from falcon_jax.train import data as train_data
from falcon_jax.train import evaluation, processes, trainee
from falcon_jax.train import schedule as train_schedule
from falcon_jax.train.batches import Batches, place_rows
from falcon_jax.train.metrics import bits_per_byte, require_tensorboard
from falcon_jax.train.reporting import Reporter
from falcon_jax.train.saving import Progress, RunCheckpoints, weights_of
from falcon_jax.train.settings import TrainConfig, check_same_run, record_run
from falcon_jax.train.shards import Split
from falcon_jax.train.step import State


class NotFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite: names the step. The weights are those before it."""


class _SignalledError(Exception):
    """A process was told to end while the steps stood still, and all know it."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. is_complete: the final model is in `output/model`; else a checkpoint waits to be resumed."""

    step: int
    is_complete: bool
    was_signalled: bool
    bits_per_byte: float  # of the best weights on the validation split, NaN where none was computed yet
    best_step: int


class Trainer:
    """Trains one model as `TrainConfig` says. `run` may be called once."""

    def __init__(self, config: TrainConfig) -> None:
        """Loads or makes the tokens, and the state: fresh, or from the newest checkpoint in `config.output`.

        Raises: ConfigError where settings, corpus, tokenizer, devices and the run found in `output` do not fit each
        other.
        """
        self._began = time.monotonic()
        self.config = config
        self.model_config = config.model_config()
        num_entries = Tokenizer.from_folder(config.tokenizer_folder).vocab_size
        if num_entries > self.model_config.vocab_size:
            raise ConfigError(
                f"{config.tokenizer_folder} has {num_entries} entries, and the model a vocab_size of only "
                f"{self.model_config.vocab_size}"
            )
        if config.tensorboard:
            require_tensorboard()
        self.mesh = make_mesh(config)
        corpus = processes.main_first(lambda: prepare_output(config))
        self._valid = corpus["valid"]
        self._batches = Batches(
            corpus["train"].tokens, config.ramp, config.step.num_micro_batches, config.seed, self.mesh
        )
        self._trainee = trainee.of_run(config, self.mesh)
        self._evaluate = processes.everywhere(self._trainee.evaluate, self.mesh)

        self.total_steps = config.total_steps
        self._stopping, self._in_pauses = threading.Event(), processes.Agreement()
        self._spent_s = 0.0  # by earlier processes of this run
        self._validated_step = -1
        self._kept = RunCheckpoints(config.output)
        self.step = 0
        self.state = self._start()

    def _start(self) -> State:
        config = self.config
        found = self._kept.restore(self._trainee.abstract_state())
        if found is None:
            return self._trainee.init_state()
        self.step, state, progress = found
        self._spent_s, self._validated_step = progress.spent_s, progress.validated_step
        if config.time_budget_s is not None:
            self.total_steps = progress.total_steps
        return state

    def elapsed_s(self) -> float:
        """Seconds that this run has taken, earlier processes included."""
        return self._spent_s + time.monotonic() - self._began

    def run(self) -> Result:
        """Trains to the end, to `max_seconds`, or to a SIGTERM or SIGINT, in any of the processes.

        Raises: NotFiniteError at a loss or gradient that is not finite; its batch lies in `output` then.
        """
        self._first_step = self.step
        self._paused_s = 0.0
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._shapes: set[tuple[int, ...]] = set()
        self._reporter = Reporter(
            self.config, self.model_config, self._batches, self.step, self._validated_step, self.total_steps
        )
        with (
            contextlib.closing(self._kept),
            contextlib.closing(self._reporter),
            processes.signals() as self._stopping,
            self._batches.stream(self.step) as batches,
        ):
            try:
                if self._lacks_validation():
                    self._validate()
                result = self._train(batches)
            except _SignalledError:
                self._save()
                result = self._result(is_complete=False, was_signalled=True)
        # What is being written is on disk: a process that ends sooner could have the others killed before that.
        processes.wait_for_all("the run has ended")
        return result

    def _lacks_validation(self) -> bool:
        """Whether the one that is due at this step was not made: of a base that of before; or a signal came first."""
        is_due = self.step % self.config.validate_every == 0 if self.step else self.config.base is not None
        return is_due and self._validated_step < self.step

    def _train(self, batches: Iterator[tuple[Any, ...]]) -> Result:
        agreement = processes.Agreement()
        while self.total_steps is None or self.step < self.total_steps:
            self._advance(batches)
            was_signalled, is_out_of_time, is_late = agreement.ask(
                self._stopping.is_set(), self._is_out_of_time(), self._is_checkpoint_late()
            )
            is_stopping = was_signalled or is_out_of_time
            is_late = is_late and self.step - self._saved_step > agreement.lag  # asked before the last one
            if is_stopping or is_late or self.step % self.config.checkpoint_every == 0:
                self._save()
            if is_stopping:
                if not was_signalled:  # then there may be no time
                    self._reporter.draw()
                return self._result(is_complete=False, was_signalled=was_signalled)
        self._settle_pending()
        if self._validated_step < self.step or self._kept.best is None:
            self._validate()
        self._save()
        for _ in range(self._in_pauses.lag + 1):  # till an answer is to what was asked here
            self._end_if_signalled()
        self._export()
        self._reporter.draw()
        return self._result(is_complete=True, was_signalled=False)

    def _result(self, *, is_complete: bool, was_signalled: bool) -> Result:
        best = self._kept.best
        bits = math.nan if best is None else bits_per_byte(best.nats, self._valid.num_bytes)
        return Result(self.step, is_complete, was_signalled, bits, -1 if best is None else best.step)

    def _end_if_signalled(self) -> None:
        """Call as often in every process. With several the answer is to an earlier call, or none would be alike."""
        (was_signalled,) = self._in_pauses.ask(self._stopping.is_set())
        if was_signalled:
            raise _SignalledError

    def _is_out_of_time(self) -> bool:
        limit_s = self.config.max_seconds
        return limit_s is not None and time.monotonic() - self._began >= limit_s

    def _is_checkpoint_late(self) -> bool:
        limit_s = self.config.checkpoint_every_s
        return limit_s is not None and time.monotonic() - self._saved_at >= limit_s

    def _advance(self, batches: Iterator[tuple[Any, ...]]) -> None:
        """One step, and what is due after it but a checkpoint."""
        config = self.config
        tokens, *num_used = next(batches)
        rate = np.float32(config.rate(self.step, self.total_steps))
        is_compiled = tokens.shape in self._shapes
        self._shapes.add(tokens.shape)
        if not is_compiled:
            jax.block_until_ready(self.state)  # or it would work on while the host compiles
        began = time.monotonic()
        self.state, metrics = self._trainee.step(self.state, tokens, rate, *num_used)
        if not is_compiled:
            self._pause(time.monotonic() - began)
        self.step += 1
        self._reporter.add(self.step, metrics)
        if self.step == self._first_step + 1:
            jax.block_until_ready(metrics)
            self._reporter.first_step_done(time.monotonic() - began)
        if self.step % config.log_every == 0:
            # All but this interval: waiting for the newest would leave the device idle.
            self._report(self.step - config.log_every)
        if self.total_steps is None:
            self._choose_total_steps()
        if self.step % config.validate_every == 0:
            self._validate()

    def _report(self, up_to: int) -> None:
        bad = self._reporter.report(up_to, self.total_steps, self.elapsed_s())
        if bad is not None:
            raise NotFiniteError(
                f"the loss or its gradient was not finite at step {bad}, whose batch lies in "
                f"{self._save_batch(bad)}; lower --learning-rate (now {self.config.learning_rate}) or lengthen the "
                "warm-up, and run again from the last checkpoint"
            )

    def _save_batch(self, step: int) -> Path:
        """Writes the tokens of a step, made again from its number, and its rate."""
        path = self.config.output / f"not-finite-step-{step}.npz"
        if processes.is_main():
            self._batches.save(step, path, learning_rate=self.config.rate(step, self.total_steps))
        return path

    def _settle_pending(self) -> None:
        """Waits for the device and reports all steps so far, so that what follows is not counted as training."""
        jax.block_until_ready(self.state)
        self._report(self.step)

    # Pauses: what stops the steps for a while.

    def _validate(self) -> float:
        """Nats of the validation split; keeps the weights where they are the best yet. Returns seconds taken."""
        self._settle_pending()
        began = time.monotonic()
        weights = weights_of(self.state)
        nats = self.validation_nats(weights)
        if not math.isfinite(nats):
            raise NotFiniteError(f"the validation loss is not finite after step {self.step}")
        is_best = self._kept.offer(self.step, weights, nats)
        seconds = time.monotonic() - began
        if self._validated_step < self.step:  # not a second time, for the time that it takes
            self._write_validation(nats, is_best=is_best, seconds=seconds)
        self._validated_step = self.step
        self._pause(seconds)
        return seconds

    def _write_validation(self, nats: float, *, is_best: bool, seconds: float) -> None:
        nats_per_token = nats / (len(self._valid.tokens) - len(self._valid.starts))
        bits = bits_per_byte(nats, self._valid.num_bytes)
        self._reporter.write(
            "valid",
            self.step,
            nats_per_token=nats_per_token,
            bits_per_byte=bits,
            is_best=is_best,
            tokens=self.config.ramp.tokens_before(self.step),
            seconds=round(seconds, 2),
            elapsed_s=round(self.elapsed_s(), 2),
        )
        best = " (best)" if is_best else ""
        self._reporter.say(
            f"step {self.step}: validation {nats_per_token:.4f} nats a token, {bits:.4f} bits a byte{best}"
        )

    def validation_nats(self, params: model_params.Params) -> float:
        """Total nats of the validation split; each token in one window, which does not overlap others."""
        windows = evaluation.cut_windows(self._valid, self.config.length)
        return evaluation.total_nats(
            self._evaluate,
            params,
            windows,
            self.config.batch_size // self.config.step.num_micro_batches,
            place=lambda rows: place_rows(rows, self.mesh),
            advance=lambda _: self._end_if_signalled(),
        )

    def _save(self) -> float:
        """A checkpoint of this step, once. Returns the seconds that training stood still."""
        self._settle_pending()  # also keeps a state that is not finite from being saved
        if self.step == self._saved_step:
            return 0.0
        began = time.monotonic()
        self._kept.save(self.step, self.state, Progress(self.total_steps, self.elapsed_s(), self._validated_step))
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._pause(self._saved_at - began)
        return self._saved_at - began

    def _pause(self, seconds: float) -> None:
        """Keeps time that was not training out of the reported and the measured speed."""
        self._reporter.pause(seconds)
        self._paused_s += seconds

    # A time budget.

    def _choose_total_steps(self) -> None:
        """At the end of warm-up, turns the time that is left into a number of steps."""
        config = self.config
        if config.time_budget_s is None:
            return
        # Once past warm-up, where its rates no longer tell; at least 10 steps, also where a run resumes late.
        start = max(config.num_warmup_steps // 2, self._first_step + 5)
        if self.step == start:
            self._settle_pending()
            self._measured_from_s, self._paused_s = time.monotonic(), 0.0
        if self.step < max(config.num_warmup_steps, start + 5):
            return
        self._settle_pending()
        step_s = (time.monotonic() - self._measured_from_s - self._paused_s) / (self.step - start)
        self._validate()  # the first one compiles
        validation_s, checkpoint_s = self._validate(), self._save()
        remaining_s = config.time_budget_s - self.elapsed_s()
        remaining_s, step_s, validation_s, checkpoint_s = processes.as_main(
            (remaining_s, step_s, validation_s, checkpoint_s)
        )
        pauses = [(validation_s, config.validate_every), (checkpoint_s, config.checkpoint_every)]
        self.total_steps = self.step + train_schedule.steps_in_budget(remaining_s, step_s, pauses)
        self._reporter.set_total(self.total_steps)
        self._reporter.say(f"step {self.step}: {step_s * 1e3:.1f} ms a step, so {self.total_steps} steps in the budget")

    def _export(self) -> None:
        """Writes the best weights, in place of those of an earlier run in this folder."""
        best = self._kept.best_weights(self._trainee.abstract_state()["params"])
        self._trainee.export(best, self.config.output)


def prepare_output(config: TrainConfig) -> dict[str, Split]:
    """The run's tokens, made if they are not there, in a folder that is this run's. Needs no accelerator.

    Raises: ConfigError where the corpus cannot be read, or the folder holds another run.
    """
    record = config.output / "run.json"
    source: dict[str, Any] = {"text_field": config.text_field, "valid_share": config.valid_share}
    known = train_data.describe_corpus(config.data, config.tokenizer_folder, **source)
    check_same_run(config, known, record)  # before hours may go into tokens

    def accept(digest: str) -> None:
        known["tokens_sha256"] = digest
        check_same_run(config, known, record)

    splits = train_data.tokenize_corpus(
        config.data,
        config.tokenizer_folder,
        config.output / "tokens",
        **source,
        check=(jax.process_index(), jax.process_count()),
        accept=accept,
    )
    config.output.mkdir(parents=True, exist_ok=True)
    record_run(config, known, record)
    return splits


def make_mesh(config: TrainConfig) -> jax.sharding.Mesh | None:
    """None where one device trains alone.

    Raises: ConfigError where there are fewer devices, or other processes' devices would have nothing to do.
    """
    shape = (config.data_parallel, config.fsdp, config.tensor, config.stage)
    product, count = f"data_parallel * fsdp * tensor * stage is {config.num_devices}", jax.device_count()
    if config.num_devices > count:
        raise ConfigError(f"{product}, and there are only {count} devices")
    if jax.process_count() > 1 and config.num_devices < count:
        raise ConfigError(f"{product}, and the {jax.process_count()} processes have {count} devices: use them all")
    return None if config.num_devices == 1 else sharding.make_mesh(*shape)
