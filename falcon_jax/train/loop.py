"""The training run: steps, validation, checkpoints and the final model, resumable at any step.

Owns time and files; the arithmetic is in step.py. The device is never waited for between checkpoints: losses are read
one logging interval late, when they have long been computed. The one trap: everything that a later step depends on must
be in the checkpoint or a function of the step number, or a resumed run would differ.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

from falcon_jax import sharding
from falcon_jax.checkpoint.store import TrainCheckpoints
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.tokenizer import Tokenizer
from falcon_jax.train import data as train_data
from falcon_jax.train import evaluation
from falcon_jax.train import schedule as train_schedule
from falcon_jax.train import step as train_step
from falcon_jax.train.final import write_model
from falcon_jax.train.metrics import MetricsFile, Stopwatch, bits_per_byte
from falcon_jax.train.settings import TrainConfig, check_same_run


class NotFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite: names the step. The weights are those before it."""


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

        Raises: ConfigError where settings, corpus, tokenizer and the run found in `output` do not fit each other.
        """
        self._began = time.monotonic()
        self.config = config
        self.model_config = config.model_config()
        num_entries = Tokenizer.from_folder(config.tokenizer).vocab_size
        if num_entries > self.model_config.vocab_size:
            raise ConfigError(
                f"{config.tokenizer} has {num_entries} entries, and the model a vocab_size of only "
                f"{self.model_config.vocab_size}"
            )
        corpus = train_data.tokenize_corpus(config.data, config.tokenizer, config.output / "tokens")
        self.order = train_data.TrainingOrder(corpus["train"].tokens, config.batch_size, config.length, config.seed)
        self._valid = corpus["valid"]
        config.output.mkdir(parents=True, exist_ok=True)
        check_same_run(config, config.output / "run.json")

        shape = (config.data_parallel, config.fsdp, config.tensor)
        if math.prod(shape) > jax.device_count():
            raise ConfigError(
                f"data_parallel * fsdp * tensor is {math.prod(shape)}, and there are only {jax.device_count()} devices"
            )
        self.mesh = None if math.prod(shape) == 1 else sharding.make_mesh(*shape)
        forward = ForwardOptions(attention=config.attention, remat=config.remat)
        self._step_function = train_step.make_train_step(self.model_config, config.step, forward, self.mesh)
        self._eval_function = train_step.make_eval_step(self.model_config, config.step, forward, self.mesh)

        self.total_steps = config.steps
        self._spent_s = 0.0  # by earlier processes of this run
        self._best_nats, self._best_step = math.inf, -1
        self._checkpoints = TrainCheckpoints(config.output / "checkpoints")
        self._best = TrainCheckpoints(config.output / "best", max_to_keep=1)
        self.step = 0
        self.state = self._start()

    def _start(self) -> train_step.State:
        config, newest = self.config, self._checkpoints.latest_step()
        if newest is None:
            return train_step.init_state(self.model_config, config.step, config.seed, self.mesh)
        abstract = train_step.abstract_state(self.model_config, config.step, self.mesh)
        state, progress = self._checkpoints.restore(abstract)
        self.step = newest
        self._spent_s = progress["spent_s"]
        if config.time_budget_s is not None:
            self.total_steps = progress["total_steps"]
        best_step = self._best.latest_step()
        if best_step is not None:
            # Asked of the weights themselves: a lost process may have kept better ones after its last checkpoint.
            _, best = self._best.restore(abstract["params"])
            self._best_nats, self._best_step = best["nats"], best_step
        return state

    def elapsed_s(self) -> float:
        """Seconds that this run has taken, earlier processes included."""
        return self._spent_s + time.monotonic() - self._began

    def run(self) -> Result:
        """Trains to the end, to `max_seconds`, or to a SIGTERM or SIGINT.

        Raises: NotFiniteError at a loss or gradient that is not finite.
        """
        self._first_step = first = self.step
        self._paused_s = 0.0
        with (
            contextlib.ExitStack() as stack,
            _signals() as stopping,
            train_data.Prefetcher(self._placed_batch, first) as batches,
            tqdm(
                total=self.total_steps,
                initial=first,
                unit="step",
                desc="training",
                mininterval=_bar_interval_s(),
            ) as bar,
        ):
            self._bar, self._metrics = bar, MetricsFile(self.config.output / "metrics.jsonl", first)
            stack.callback(self._metrics.close)
            stack.callback(self._best.close)
            stack.callback(self._checkpoints.close)
            self._pending: list[tuple[int, train_step.Metrics]] = []
            self._logged_step, self._stopwatch = first, Stopwatch()
            self._timed_step, self._tokens_per_s = first, 0.0
            self._saved_step, self._saved_at = first, time.monotonic()
            while self.total_steps is None or self.step < self.total_steps:
                self._advance(batches)
                is_out_of_time = (
                    self.config.max_seconds is not None and time.monotonic() - self._began >= self.config.max_seconds
                )
                if stopping.is_set() or is_out_of_time:
                    self._settle_pending()
                    self._save()
                    return self._result(is_complete=False, was_signalled=stopping.is_set())
            self._settle_pending()
            if self._best_step < 0 or self.step % self.config.validate_every:
                self._validate()
            self._save()
            self._export()
            return self._result(is_complete=True, was_signalled=False)

    def _result(self, *, is_complete: bool, was_signalled: bool) -> Result:
        best = bits_per_byte(self._best_nats, self._valid.num_bytes) if self._best_step >= 0 else math.nan
        return Result(self.step, is_complete, was_signalled, best, self._best_step)

    def _advance(self, batches: train_data.Prefetcher) -> None:
        """One step, and what is due after it."""
        config = self.config
        rate = np.float32(config.schedule().rate(self.step, self.total_steps))
        self.state, metrics = self._step_function(self.state, batches.next(), rate)
        self.step += 1
        self._pending.append((self.step, metrics))
        if self.step % config.log_every == 0:
            # All but this interval: waiting for the newest would leave the device idle.
            self._report(self.step - config.log_every)
        if self.total_steps is None:
            self._choose_total_steps()
        if self.step % config.validate_every == 0:
            self._validate()
        is_late = config.checkpoint_every_s is not None and (
            time.monotonic() - self._saved_at >= config.checkpoint_every_s
        )
        if self.step % config.checkpoint_every == 0 or is_late:
            self._save()

    def _placed_batch(self, step: int) -> jax.Array:
        return self._place(self.order.batch(step))

    def _place(self, rows: np.ndarray) -> jax.Array:
        return jax.device_put(rows, None if self.mesh is None else sharding.batch_sharding(rows.shape, self.mesh))

    # Reports.

    def _report(self, up_to: int) -> None:
        """Reads and writes the metrics of the steps up to `up_to` (0: nothing is old enough yet)."""
        ready = [(step, metrics) for step, metrics in self._pending if step <= up_to]
        if not ready:
            return
        self._pending = self._pending[len(ready) :]
        values = jax.device_get([metrics for _, metrics in ready])
        last, step = values[-1], ready[-1][0]
        bad = int(last["first_bad_step"])
        if bad >= 0:
            raise NotFiniteError(
                f"the loss or its gradient was not finite at step {bad}; lower --learning-rate (now "
                f"{self.config.learning_rate}) or lengthen --warmup-steps, and run again from the last "
                "checkpoint"
            )
        if self.step > self._timed_step:
            # Of the steps handed to the device since the last report, which keeps pace with them; the steps reported
            # here are older, and of those it is not known when they ended.
            num_tokens = (self.step - self._timed_step) * self.config.batch_size * self.config.length
            self._tokens_per_s = num_tokens / self._stopwatch.read_s()
            self._timed_step = self.step
        loss = float(np.mean([value["loss"] for value in values]))
        rate = self.config.schedule().rate(step - 1, self.total_steps)
        self._metrics.write(
            "train",
            step,
            loss=loss,
            z_loss=float(last["z_loss"]),
            grad_norm=float(last["grad_norm"]),
            learning_rate=rate,
            tokens_per_s=round(self._tokens_per_s),
            epoch=step * self.config.batch_size / self.order.num_windows,
            elapsed_s=round(self.elapsed_s(), 2),
        )
        self._bar.set_postfix_str(f"loss {loss:.4f}, {self._tokens_per_s:,.0f} tokens/s, lr {rate:.2e}", refresh=False)
        self._bar.update(step - self._logged_step)
        self._logged_step = step

    def _settle_pending(self) -> None:
        """Waits for the device and reports all steps so far, so that what follows is not counted as training."""
        jax.block_until_ready(self.state)
        self._report(self.step)

    # Pauses: what stops the steps for a while.

    def _validate(self) -> float:
        """Nats of the validation split; keeps the weights where they are the best yet. Returns seconds taken."""
        self._settle_pending()
        began = time.monotonic()
        weights = self.state.get("ema", self.state["params"])
        nats = self.validation_nats(weights)
        bits = bits_per_byte(nats, self._valid.num_bytes)
        num_targets = len(self._valid.tokens) - len(self._valid.starts)
        if not math.isfinite(nats):
            raise NotFiniteError(f"the validation loss is not finite after step {self.step}")
        if nats < self._best_nats:
            self._best_nats, self._best_step = nats, self.step
            self._best.save(self.step, weights, {"nats": nats})
        seconds = time.monotonic() - began
        self._metrics.write(
            "valid",
            self.step,
            nats_per_token=nats / num_targets,
            bits_per_byte=bits,
            is_best=self._best_step == self.step,
            seconds=round(seconds, 2),
            elapsed_s=round(self.elapsed_s(), 2),
        )
        self._bar.write(
            f"step {self.step}: validation {nats / num_targets:.4f} nats a token, {bits:.4f} bits a byte"
            + (" (best)" if self._best_step == self.step else ""),
            file=sys.stderr,
        )
        self._pause(seconds)
        return seconds

    def validation_nats(self, params: model_params.Params) -> float:
        """Total nats of the validation split; each token in one window, which does not overlap others."""
        windows = evaluation.cut_windows(self._valid, self.config.length)
        rows = self.config.batch_size // self.config.step.num_micro_batches
        return evaluation.total_nats(self._eval_function, params, windows, rows, place=self._place)

    def _save(self) -> float:
        """A checkpoint of this step, once. Returns the seconds that training stood still."""
        if self.step == self._saved_step:
            return 0.0
        self._settle_pending()  # also keeps a state that is not finite from being saved
        began = time.monotonic()
        progress = {"total_steps": self.total_steps, "spent_s": self.elapsed_s()}
        self._checkpoints.save(self.step, self.state, progress)
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._pause(self._saved_at - began)
        return self._saved_at - began

    def _pause(self, seconds: float) -> None:
        """Keeps time that was not training out of the reported and the measured speed."""
        self._stopwatch.add_pause(seconds)
        self._paused_s += seconds

    # A time budget.

    def _choose_total_steps(self) -> None:
        """At the end of warm-up, turns the time that is left into a number of steps."""
        config = self.config
        if config.time_budget_s is None:
            return
        # Once past warm-up, where its rates no longer tell; at least 10 steps, also where a run resumes late.
        start = max(config.warmup_steps // 2, self._first_step + 5)
        if self.step == start:
            self._settle_pending()
            self._measured_from_s, self._paused_s = time.monotonic(), 0.0
        if self.step < max(config.warmup_steps, start + 5):
            return
        self._settle_pending()
        step_s = (time.monotonic() - self._measured_from_s - self._paused_s) / (self.step - start)
        self._validate()  # the first one compiles
        validation_s, checkpoint_s = self._validate(), self._save()
        pauses = [(validation_s, config.validate_every), (checkpoint_s, config.checkpoint_every)]
        remaining_s = config.time_budget_s - self.elapsed_s()
        self.total_steps = self.step + train_schedule.steps_in_budget(remaining_s, step_s, pauses)
        self._bar.total = self.total_steps
        self._bar.refresh()
        message = f"step {self.step}: {step_s * 1e3:.1f} ms a step, so {self.total_steps} steps in the budget"
        self._bar.write(message, file=sys.stderr)

    def _export(self) -> None:
        """Writes the best weights as a Hugging Face folder with the tokenizer, replacing an earlier one."""
        self._best.wait()
        abstract = train_step.abstract_state(self.model_config, self.config.step, self.mesh)
        params, _ = self._best.restore(abstract["params"])
        write_model(self.model_config, params, self.config.output / "model", self.config.tokenizer)


def _bar_interval_s() -> float:
    """A terminal redraws one line; a log file gets a line each time."""
    return 0.5 if sys.stderr.isatty() else 10.0


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turns the first SIGTERM or SIGINT into an event; a second one acts as it did before."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # only the main thread may handle signals
        return
    former = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: object) -> None:
        stopping.set()
        signal.signal(number, former[number])

    for number in former:
        signal.signal(number, stop)
    try:
        yield stopping
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
