"""Runs that go on where another process ended: with the same settings as if it had not, with others as themselves."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.errors import CheckpointError, ConfigError
from falcon_jax.train import data as train_data
from falcon_jax.train import processes, shards
from falcon_jax.train.loop import Trainer, prepare_output
from falcon_jax.train.metrics import read_records
from falcon_jax.train.saving import Progress, RunCheckpoints
from falcon_jax.train.settings import TrainConfig, check_same_run
from tests.train import counting, toys
from tests.train.counting import Counting, LostError


@pytest.fixture
def trainee(monkeypatch: pytest.MonkeyPatch) -> Counting:
    trainee = Counting()
    counting.use(trainee, monkeypatch)
    return trainee


@pytest.fixture
def config(train_config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train_config, steps=12, validate_every=3, checkpoint_every=4, log_every=1)


def validations(config: TrainConfig) -> list[tuple[Any, ...]]:
    records = read_records(config.output / "metrics.jsonl")
    return [(line["step"], line["nats_per_token"], line["is_best"]) for line in records if line["kind"] == "valid"]


def lose_at(step: int, trainee: Counting, config: TrainConfig, nats: dict[int, float] | None = None) -> None:
    trainee.lost_at = step
    with pytest.raises(LostError):
        counting.run(config, nats)
    trainee.lost_at = -1


# The best weights.

FUTURE = {3: 50.0, 6: 20.0}  # of a run that is lost in step 8, with a checkpoint of step 4


def test_a_step_validated_before_may_be_the_best_again_with_another_rate(
    config: TrainConfig, trainee: Counting
) -> None:
    lose_at(7, trainee, config, FUTURE)
    other = dataclasses.replace(config, learning_rate=5e-3)
    result = counting.run(other, {6: 10.0, 9: 30.0, 12: 30.0})
    assert (result.is_complete, result.best_step) == (True, 6)
    assert [(step, is_best) for step, _, is_best in validations(config)] == [
        (3, True),
        (6, True),
        (9, False),
        (12, False),
    ]


def test_the_best_weights_of_a_future_that_did_not_come_are_not_written(
    config: TrainConfig, trainee: Counting, tmp_path: Path
) -> None:
    short = dataclasses.replace(config, steps=3, warmup_steps=5, output=tmp_path / "short", checkpoint_every=100)
    counting.run(dataclasses.replace(short, min_rate_ratio=1.0), {3: 50.0})
    flat = dataclasses.replace(config, min_rate_ratio=1.0)
    lose_at(7, trainee, flat, FUTURE)
    result = counting.run(dataclasses.replace(flat, learning_rate=5e-3), dict.fromkeys((6, 9, 12), 60.0))
    assert result.best_step == 3
    of_three, written = trainee.exported
    assert written == of_three
    assert len(list((config.output / "best").iterdir())) == 1


def test_the_same_settings_give_the_same_best_as_without_the_loss(
    config: TrainConfig, trainee: Counting, tmp_path: Path
) -> None:
    nats = {3: 50.0, 6: 20.0, 9: 40.0, 12: 30.0}
    whole = counting.run(dataclasses.replace(config, output=tmp_path / "whole"), nats)
    lose_at(7, trainee, config, nats)
    lose_at(11, trainee, config, nats)
    result = counting.run(config, nats)
    assert result == whole and result.best_step == 6
    assert trainee.exported[0] == trainee.exported[1]
    assert validations(config) == validations(dataclasses.replace(config, output=tmp_path / "whole"))


def test_no_more_weights_are_kept_than_a_run_can_go_on_with(config: TrainConfig, trainee: Counting) -> None:
    for step in (2, 6, 7, 11):
        lose_at(step, trainee, config, {step: 100.0 - step for step in range(13)})
        assert len(list((config.output / "best").iterdir())) <= 3
    assert counting.run(config, {step: 100.0 - step for step in range(13)}).best_step == 12
    assert len(list((config.output / "best").iterdir())) <= 3


def state_of(number: float) -> dict[str, Any]:
    return {"params": {"w": jnp.full(64, number, jnp.float32)}}


def keep(output: Path, *steps: int) -> None:
    """Checkpoints of these steps, each with the best weights yet."""
    with contextlib.closing(RunCheckpoints(output)) as kept:
        kept.restore(state_of(0.0))
        for step in steps:
            kept.offer(step, state_of(step)["params"], 1 / step)
            kept.save(step, state_of(step), Progress(None, 0.0, step))


def best_of(output: Path) -> float | None:
    with contextlib.closing(RunCheckpoints(output)) as kept:
        kept.restore(state_of(0.0))
        return None if kept.best is None else float(kept.best_weights(state_of(0.0)["params"])["w"][0])


def test_best_weights_lost_before_they_were_on_disk_are_those_of_their_checkpoint(tmp_path: Path) -> None:
    keep(tmp_path, 2, 4)
    [*_, newest] = sorted((tmp_path / "best").iterdir())
    shutil.rmtree(newest)
    assert best_of(tmp_path) == 4.0
    assert best_of(tmp_path) == 4.0  # and are on disk again


def test_an_earlier_checkpoint_finds_the_best_weights_of_its_time(tmp_path: Path) -> None:
    keep(tmp_path, 2, 4, 6)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert best_of(tmp_path) == 4.0


def test_best_weights_that_somebody_deleted_are_none(tmp_path: Path) -> None:
    keep(tmp_path, 2)
    with contextlib.closing(RunCheckpoints(tmp_path)) as kept:
        kept.restore(state_of(0.0))
        kept.save(4, state_of(4.0), Progress(None, 0.0, 2))
    shutil.rmtree(tmp_path / "best")
    assert best_of(tmp_path) is None


def test_a_process_lost_in_a_deletion_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, 2, 4)
    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(LostError()))
        with pytest.raises(LostError):
            keep(tmp_path, 6, 8)
    assert best_of(tmp_path) == 6.0
    assert all(path.name.isdigit() for path in (tmp_path / "best").iterdir())


# A checkpoint that is damaged.


def flip_a_byte(folder: Path) -> None:
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


@pytest.mark.parametrize(
    ("damaged", "then"), [((6,), "goes on from step 4"), ((4, 6), "begins the run anew"), ((), "")]
)
def test_a_damaged_checkpoint_says_what_to_delete_and_what_comes_then(
    tmp_path: Path, damaged: tuple[int, ...], then: str
) -> None:
    generator = np.random.default_rng(0)
    states = {step: {"params": {"w": jnp.asarray(generator.normal(size=4096), jnp.float32)}} for step in (4, 6)}
    with contextlib.closing(RunCheckpoints(tmp_path)) as kept:
        for step, state in states.items():
            kept.save(step, state, Progress(None, 0.0, -1))
    for step in damaged:
        flip_a_byte(tmp_path / "checkpoints" / str(step))
    if 4 in damaged:
        about = tmp_path / "checkpoints" / "4" / "about" / "metadata"
        about.write_text(about.read_text().replace("float32", "float31"))
    if damaged:
        with pytest.raises(CheckpointError, match=rf"delete the folder {tmp_path}/checkpoints/6; .* then {then}"):
            RunCheckpoints(tmp_path).restore(states[6])
        shutil.rmtree(tmp_path / "checkpoints" / "6")
        if 4 in damaged:
            shutil.rmtree(tmp_path / "checkpoints" / "4")
    found = RunCheckpoints(tmp_path).restore(states[6])
    assert (None if found is None else found[0]) == {"": 6, "goes on from step 4": 4}.get(then)


@pytest.mark.parametrize(("answer", "step"), [(4, 4), (-1, None)])
def test_all_processes_go_on_from_what_process_0_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int, step: int | None
) -> None:
    keep(tmp_path, 4, 6)
    answers = [answer // 2**20, answer % 2**20]
    monkeypatch.setattr(processes, "as_main", lambda own: answers if own[1] == 6 else [float(value) for value in own])
    found = RunCheckpoints(tmp_path).restore(state_of(0.0))
    assert (None if found is None else found[0]) == step


def test_steps_beyond_what_a_float32_holds_are_agreed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "as_main", lambda own: [float(np.float32(value)) for value in own])
    step = 2**30 + 1
    keep(tmp_path, step)
    found = RunCheckpoints(tmp_path).restore(state_of(0.0))
    assert found is not None and found[0] == step


# The curve.


def test_the_last_step_is_validated_once_however_often_the_command_is_given(
    config: TrainConfig, trainee: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, steps=8)
    with monkeypatch.context() as context:
        context.setattr(trainee, "export", lambda *_: (_ for _ in ()).throw(LostError()))
        with pytest.raises(LostError):
            counting.run(config)
    once = validations(config)
    assert [step for step, *_ in once] == [3, 6, 8]
    for _ in range(2):
        assert counting.run(config).is_complete
        assert validations(config) == once
    assert trainee.exported[0] == trainee.exported[1]


def test_a_time_budget_that_validates_twice_writes_it_once(
    config: TrainConfig, trainee: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("falcon_jax.train.schedule.steps_in_budget", lambda *_: 3)
    timed = dataclasses.replace(config, steps=None, time_budget_s=1e6, warmup_steps=10)
    assert counting.run(timed).is_complete
    assert [step for step, *_ in validations(timed)] == [3, 6, 9, 10, 12, 13]


# Signals in pauses.


def test_a_signal_in_a_validation_ends_it_and_the_same_command_makes_it(
    config: TrainConfig, trainee: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, batch_size=1)  # many batches
    whole = dataclasses.replace(config, output=tmp_path / "whole")
    complete = counting.run(whole)
    num_batches, trainee.num_evaluated = trainee.num_evaluated // 4, 0
    evaluate = trainee.evaluate

    def signalled(*arguments: Any) -> Any:
        if trainee.num_evaluated == num_batches + 2:  # in the second one
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as context:
        context.setattr(trainee, "evaluate", signalled)
        result = counting.run(config)
    assert (result.is_complete, result.was_signalled, result.step, result.best_step) == (False, True, 6, 3)
    assert num_batches + 2 < trainee.num_evaluated < 2 * num_batches
    assert [step for step, *_ in validations(config)] == [3]
    assert Trainer(config).step == 6
    assert counting.run(config) == complete
    assert validations(config) == validations(whole)
    assert trainee.exported[0] == trainee.exported[1]


def test_a_signal_before_the_model_is_written_leaves_that_to_the_next_process(
    config: TrainConfig, trainee: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        save = RunCheckpoints.save

        def signalled(self: RunCheckpoints, step: int, *arguments: Any) -> None:
            save(self, step, *arguments)
            if step == 10:
                os.kill(os.getpid(), signal.SIGTERM)

        context.setattr(RunCheckpoints, "save", signalled)
        config = dataclasses.replace(config, steps=10, checkpoint_every=100)
        result = counting.run(config)
    assert (result.is_complete, result.was_signalled, result.step) == (False, True, 10)
    assert trainee.exported == []
    once = validations(config)
    assert counting.run(config).is_complete
    assert len(trainee.exported) == 1
    assert validations(config) == once


# Other settings, and other data.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def own_corpus(tmp_path: Path, corpus: Path, config: TrainConfig) -> TrainConfig:
    """A run, with tokens, on data that may be changed."""
    shutil.copytree(corpus, tmp_path / "data")
    config = dataclasses.replace(config, data=tmp_path / "data")
    prepare_output(config)
    return config


def test_other_data_is_refused_and_leaves_the_run_as_it_was(own_corpus: TrainConfig) -> None:
    config, before = own_corpus, contents(own_corpus.output)
    path = config.data / "valid" / "0.txt"
    path.write_text(path.read_text()[:-1] + "x")
    with pytest.raises(ConfigError, match=f"holds a run on other tokens than those of {config.data}: give the same"):
        prepare_output(config)
    assert contents(config.output) == before
    assert not (config.output / "tokens.incoming").exists()


def test_data_that_was_touched_or_moved_is_the_same(own_corpus: TrainConfig, tmp_path: Path) -> None:
    config = own_corpus
    path = config.data / "train" / "0.txt"
    os.utime(path, (1, 1))
    before = contents(config.output)
    prepare_output(config)
    after = contents(config.output)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"tokens/corpus.json"}  # which knows the time
    config.data.rename(tmp_path / "moved")
    prepare_output(dataclasses.replace(config, data=tmp_path / "moved"))
    prepare_output(dataclasses.replace(config, data=config.output / "tokens"))


def test_a_process_lost_while_equal_tokens_take_the_place_of_the_old_ones_loses_no_run(
    own_corpus: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, before = own_corpus, contents(own_corpus.output)
    for name in ("unlink", "rename"):
        os.utime(config.data / "train" / "0.txt")
        with monkeypatch.context() as context:
            context.setattr(Path, name, lambda *_, **__: (_ for _ in ()).throw(LostError()))
            with pytest.raises(LostError):
                prepare_output(config)
        prepare_output(config)
        after = contents(config.output)
        assert before.keys() == after.keys()
        assert {name for name in before if before[name] != after[name]} <= {"tokens/corpus.json"}


def test_other_ways_to_read_the_data_are_refused_before_it_is_read(
    own_corpus: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, before = own_corpus, contents(own_corpus.output)
    monkeypatch.setattr(train_data, "_write_tokens", lambda *_: pytest.fail("tokenized"))
    assert config.tokenizer is not None
    other = shutil.copytree(config.tokenizer, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    for changes, message in (
        ({"tokenizer": other}, f"with another tokenizer than {other}: give the same one"),
        ({"text_field": "body"}, "with text_field = 'text', and this one has 'body'"),
        ({"valid_share": 0.25}, "with valid_share = None, and this one has 0.25"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_output(dataclasses.replace(config, **changes))
    assert contents(config.output) == before


def test_another_folder_of_tokens_is_refused(own_corpus: TrainConfig, tmp_path: Path) -> None:
    config = own_corpus
    assert config.tokenizer is not None
    other = toys.write_corpus(tmp_path / "other")
    (other / "valid" / "1.txt").write_text("the old sea")
    train_data.tokenize_corpus(other, config.tokenizer, tmp_path / "tokens")
    with pytest.raises(ConfigError, match=r"other tokens than those of .*/tokens"):
        prepare_output(dataclasses.replace(config, data=tmp_path / "tokens"))


def test_a_digest_is_of_the_tokens_alone(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    for data, folder in ((corpus, "one"), (copy, "same")):
        train_data.tokenize_corpus(data, tokenizer_folder, tmp_path / folder)
    assert shards.read_digest(tmp_path / "one") == shards.read_digest(tmp_path / "same")
    (copy / "train" / "1.txt").write_text((copy / "train" / "1.txt").read_text().replace("sea", "ship", 1))
    train_data.tokenize_corpus(copy, tokenizer_folder, tmp_path / "other")
    assert shards.read_digest(tmp_path / "one") != shards.read_digest(tmp_path / "other")


def test_another_precision_of_frozen_weights_is_refused(config: TrainConfig) -> None:
    config = dataclasses.replace(config, model=None, tokenizer=None, base="falcon-nano", lora=True)
    prepare_output(config)
    with pytest.raises(ConfigError, match="with base_weights = 'native', and this one has 'int8'"):
        prepare_output(dataclasses.replace(config, base_weights="int8"))


def test_of_several_differences_the_first_setting_is_named(config: TrainConfig) -> None:
    prepare_output(config)
    other = dataclasses.replace(config, batch_size=4, seed=7, step=dataclasses.replace(config.step, beta2=0.9))
    with pytest.raises(ConfigError, match="with batch_size = 8, and this one has 4"):
        prepare_output(other)
    path = config.output / "run.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(recorded.items()))))
    with pytest.raises(ConfigError, match="with batch_size = 8, and this one has 4"):
        prepare_output(other)


def test_a_setting_of_a_later_version_has_its_default_in_an_earlier_run(config: TrainConfig) -> None:
    prepare_output(config)
    path = config.output / "run.json"
    recorded = json.loads(path.read_text())
    for name in ("base_weights", "ramp_tokens", "step.dropout_seed", "stages", "lora", "tie_word_embeddings"):
        del recorded[name]
    for name in [name for name in recorded if name.startswith("data.")]:
        del recorded[name]
    path.write_text(json.dumps(recorded))
    check_same_run(config, {"tokens_sha256": "any"}, path)
    other = dataclasses.replace(config, step=dataclasses.replace(config.step, dropout_seed=2))
    with pytest.raises(ConfigError, match=r"with step.dropout_seed = 0, and this one has 2"):
        check_same_run(other, {}, path)
    path.write_text(json.dumps(recorded | {"of_later": 3}))
    with pytest.raises(ConfigError, match="with of_later = 3, and this one has None"):
        check_same_run(config, {}, path)
