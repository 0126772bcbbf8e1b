"""What a run says of its speed, on a device and a clock that are not there; and of steps before one that went wrong."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from falcon_jax.config import FalconConfig
from falcon_jax.train import loop, metrics
from falcon_jax.train.batches import Batches
from falcon_jax.train.reporting import Reporter
from falcon_jax.train.saving import Best
from falcon_jax.train.settings import TrainConfig

STEP_S, HOST_S, COMPILE_S, VALIDATION_S, SAVE_S = 1.0, 0.001, 90.0, 40.0, 25.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Later(jax.Array):
    """A number that the device has at some time; reading it sooner waits."""

    def __init__(self, clock: Clock, at: float, value: float) -> None:
        self._clock, self._at, self._value = clock, at, value

    def is_ready(self) -> bool:
        return self._clock.now >= self._at

    def block_until_ready(self) -> "Later":
        self._clock.now = max(self._clock.now, self._at)
        return self

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.asarray(self.block_until_ready()._value)


class Device:
    """Takes a second for each step, one after the other, and the host a while to compile one for each shape."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._free_at, self._shapes, self.num_steps = clock, 0.0, set(), 0

    def step(self, _: Any, tokens: Any, *__: Any) -> tuple[dict, dict]:
        self._clock.now += HOST_S if tokens.shape in self._shapes else COMPILE_S
        self._shapes.add(tokens.shape)
        self._free_at = max(self._free_at, self._clock.now) + STEP_S
        self.num_steps += 1
        values = {"loss": 2.5, "z_loss": 0.0, "grad_norm": 1.0, "first_bad_step": -1}
        return self.state(), {name: Later(self._clock, self._free_at, value) for name, value in values.items()}

    def state(self) -> dict[str, Any]:
        return {"params": {"w": Later(self._clock, self._free_at, 0.0)}}

    def evaluate(self, *_: Any) -> Any:
        pytest.fail("no weights are there")

    def init_state(self) -> dict[str, Any]:
        return self.state()

    abstract_state = init_state

    def export(self, *_: Any) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (loop, metrics):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def device(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Device:
    """What runs train on, with checkpoints and validations that take time and do nothing."""
    device = Device(clock)

    def wait(seconds: float, result: Any = None) -> Any:
        clock.now += seconds
        return result

    kept = SimpleNamespace(
        best=Best(0, 0, 9.0),
        restore=lambda _: None,
        save=lambda *_: wait(SAVE_S),
        offer=lambda *_: False,
        best_weights=lambda _: None,
        close=lambda: None,
    )
    monkeypatch.setattr(loop.trainee, "of_run", lambda *_: device)
    monkeypatch.setattr(loop, "RunCheckpoints", lambda _: kept)
    monkeypatch.setattr(loop.Trainer, "validation_nats", lambda *_: wait(VALIDATION_S, 9.0))
    return device


def speeds(config: TrainConfig) -> dict[int, float]:
    """By step; step 1 alone, which compiles, may have none."""
    lines = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["tokens_per_s"] for line in lines if line["kind"] == "train" and line["step"] > 1}


def test_the_speed_of_a_steady_device_is_the_same_in_all_records(
    train_config: TrainConfig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(train_config, steps=200, log_every=10, validate_every=55, checkpoint_every=70)
    trainer = loop.Trainer(config)
    advance = trainer._advance

    def signalled_at_127(batches: Any) -> None:
        advance(batches)
        if trainer.step == 127:
            trainer._stopping.set()

    monkeypatch.setattr(trainer, "_advance", signalled_at_127)
    monkeypatch.setattr(trainer, "_is_checkpoint_late", lambda: trainer.step == 34)
    assert trainer.run().step == 127
    found = speeds(config)
    # Of validations, checkpoints and the end besides those of every tenth.
    assert list(found) == [10, 20, 34, 40, 55, 60, 70, 80, 90, 100, 110, 127]
    tokens_per_s = config.batch_size * config.length / STEP_S
    assert found == pytest.approx(dict.fromkeys(found, tokens_per_s), rel=0.005)


@pytest.mark.parametrize("log_every", [1, 7])
def test_the_speed_does_not_count_a_step_that_compiles_again(
    train_config: TrainConfig, device: Device, log_every: int
) -> None:
    config = dataclasses.replace(
        train_config, steps=40, log_every=log_every, validate_every=1000, checkpoint_every=1000
    )
    trainer = loop.Trainer(config)
    # As in a pipeline, whose batches grow.
    trainer._batches.placed = lambda step: (np.zeros((1 + step // 16, 4)),)  # type: ignore[method-assign]
    assert trainer.run().is_complete
    found = speeds(config)
    assert len(found) >= 5
    assert found == pytest.approx(dict.fromkeys(found, config.batch_size * config.length / STEP_S), rel=0.005)


def test_the_speed_of_a_device_that_is_done_sooner_than_it_is_asked_counts_all_that_it_did(
    train_config: TrainConfig, model_config: FalconConfig, clock: Clock, tmp_path: Path
) -> None:
    train_config.output.mkdir()
    reporter = make_reporter(train_config, model_config)
    values = {"loss": 2.0, "z_loss": 0.0, "grad_norm": 1.0, "first_bad_step": -1}

    def add(step: int, seconds: float) -> None:
        reporter.add(step, {name: Later(clock, clock.now + seconds, value) for name, value in values.items()})

    add(1, 0.0)
    reporter.first_step_done(1.0)
    for step in range(2, 32):
        add(step, 0.5)
        clock.now += 1.0
    add(32, 5.0)
    reporter.report(12, None, 0.0)
    reporter.close()
    [speed] = speeds(train_config).values()
    assert speed == pytest.approx(30 * 8 * 32 / 30.0)


class NoBatches(Batches):
    def __init__(self) -> None:
        pass

    def epochs(self, step: int) -> float:
        return 0.0


def make_reporter(config: TrainConfig, model: FalconConfig) -> Reporter:
    return Reporter(config, model, NoBatches(), 0, -1, config.steps)


@pytest.mark.parametrize(("first_bad", "recorded"), [(4, [3, 4]), (3, [3]), (5, [3, 5])])
def test_finite_losses_before_one_that_is_not_are_written(
    train_config: TrainConfig, model_config: FalconConfig, clock: Clock, first_bad: int, recorded: list[int]
) -> None:
    train_config.output.mkdir()
    reporter = make_reporter(train_config, model_config)
    for step in range(1, 8):
        is_bad = step > first_bad
        values = {"loss": math.nan if is_bad else float(step), "z_loss": 0.0, "grad_norm": float(step)}
        values["first_bad_step"] = first_bad if is_bad else -1
        reporter.add(step, {name: Later(clock, 0.0, value) for name, value in values.items()})
    assert reporter.report(3, 20, 1.0) is None
    assert reporter.report(6, 20, 1.0) == first_bad
    reporter.close()
    lines = [json.loads(line) for line in (train_config.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == recorded
    assert [line["loss"] for line in lines[1:]] == [np.mean(range(4, first_bad + 1)) for _ in lines[1:]]
    assert [line["grad_norm"] for line in lines[1:]] == recorded[1:]


@pytest.mark.parametrize(
    ("backend", "dtype", "tells"), [("cpu", "bfloat16", 1), ("cpu", "float32", 0), ("gpu", "bfloat16", 0)]
)
def test_a_cpu_that_computes_in_few_bits_is_told_what_is_faster(
    train_config: TrainConfig, model_config: FalconConfig, monkeypatch, capfd, backend: str, dtype: str, tells: int
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    step = dataclasses.replace(train_config.step, compute_dtype=dtype)
    train_config.output.mkdir()
    make_reporter(dataclasses.replace(train_config, step=step), model_config).close()
    assert capfd.readouterr().err.count("--compute-dtype float32") == tells
