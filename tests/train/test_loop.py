import dataclasses
import json
import math
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_jax.checkpoint import load
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.falcon import Falcon
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.train import flops
from falcon_jax.train.final import write_model
from falcon_jax.train.loop import NotFiniteError, Trainer
from falcon_jax.train.settings import TrainConfig
from falcon_jax.train.step import StepOptions
from tests.thorough import thorough
from tests.train import toys


def records(config: TrainConfig, kind: str) -> list[dict]:
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_learns_and_reports_bits_per_byte(train_config: TrainConfig, model_config: FalconConfig) -> None:
    trainer = Trainer(train_config)
    result = trainer.run()
    assert result.is_complete
    losses = [record["loss"] for record in records(train_config, "train")]
    assert losses[0] > 5.4  # log(296) is 5.7
    assert losses[-1] < losses[0] - 1.5
    last = records(train_config, "valid")[-1]
    assert last["step"] == 20
    split, length = trainer._valid, train_config.length
    nats = toys.numpy_nats(model_config, trainer.state["params"], split, length, length)
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / split.num_bytes, rel=1e-5)
    assert last["nats_per_token"] == pytest.approx(nats / (len(split.tokens) - len(split.starts)), rel=1e-5)
    assert result.bits_per_byte == min(record["bits_per_byte"] for record in records(train_config, "valid"))


def test_a_run_in_tokens_ramps_its_batch_without_compiling_again_and_says_what_it_does(
    train_config: TrainConfig, model_config: FalconConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = dataclasses.replace(train_config.step, num_micro_batches=4)
    config = dataclasses.replace(
        train_config,
        steps=None,
        tokens=2500,
        warmup_tokens=500,
        ramp_tokens=1000,
        log_every=1,
        step=step,
        tensorboard=True,
    )
    monkeypatch.setattr("falcon_jax.train.reporting._peak_flops", lambda _: 1e9)
    trainer = Trainer(config)
    result = trainer.run()
    assert trainer._trainee.step._cache_size() == 1  # type: ignore[attr-defined]
    lines = records(config, "train")
    rows = [line["batch_rows"] for line in lines]
    assert rows[0] == 2 and rows[-1] == 8 and set(rows) == {2, 4, 6, 8}
    assert [line["tokens"] for line in lines] == list(32 * np.cumsum(rows))
    assert lines[-2]["tokens"] < 2500 <= lines[-1]["tokens"]
    assert result.is_complete and result.step == len(lines) == config.total_steps
    for line in lines:  # linear over tokens to the peak, and down to a tenth at the end
        warm = min(1.0, line["tokens"] / 500) * 1e-2
        assert line["learning_rate"] == pytest.approx(warm) or line["tokens"] > 500
    assert max(line["learning_rate"] for line in lines) <= 1e-2
    assert lines[-1]["learning_rate"] == pytest.approx(1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    # The first step's time is told once, and counts for no speed.
    assert [line.get("first_step_s", 0) > 0 for line in lines] == [True] + [False] * (len(lines) - 1)
    flops_per_token = flops.train_flops_per_token(model_config, config.length)
    for line in lines[2:]:
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * flops_per_token / 1e9, abs=1e-3)
    assert records(config, "valid")[-1]["tokens"] == lines[-1]["tokens"]
    assert (config.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((config.output / "tensorboard").iterdir())) == 1


def test_a_picture_that_cannot_be_drawn_is_one_line_and_no_end(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert Trainer(dataclasses.replace(train_config, steps=2)).run().is_complete
    assert "no picture of the losses: matplotlib is not installed (pip install" in capsys.readouterr().err


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer(train_config)
    whole.run()

    parts = dataclasses.replace(train_config, output=tmp_path / "parts")
    first = Trainer(parts)
    with monkeypatch.context() as context:
        save = first._save

        def killed_after_checkpoint() -> float:
            save()
            raise KeyboardInterrupt

        context.setattr(first, "_save", killed_after_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            first.run()
    second = Trainer(parts)
    assert second.step == 10
    second.run()
    for one, two in zip(jax.tree.leaves(whole.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(one, two)
    steps = [record["step"] for record in records(parts, "train")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20
    assert [r["bits_per_byte"] for r in records(parts, "valid")] == [
        r["bits_per_byte"] for r in records(train_config, "valid")
    ]


def test_a_finished_run_writes_a_folder_that_transformers_loads(
    train_config: TrainConfig, model_config: FalconConfig
) -> None:
    trainer = Trainer(dataclasses.replace(train_config, steps=4))
    trainer.run()
    folder = train_config.output / "model"
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (0, 0)

    ids = tokenizer("the old sea", return_tensors="pt")["input_ids"]
    loaded = load(folder, dtype="float32")
    assert (loaded.config, loaded.tokenizer_folder) == (model_config, folder)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), trainer.state["params"])
    jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)
    decoder = model_params.bind(model_config, loaded.params, ForwardOptions(alibi="hf_bf16"))
    ours = decoder.logits(decoder(jnp.asarray(ids.numpy(), jnp.int32))[0])
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs.float()(ids).logits.numpy(), atol=1e-4)


def test_writing_a_model_replaces_an_older_one(
    model_config: FalconConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, lost = tmp_path / "model", tmp_path / "model.incoming"
    for stale in (folder, lost):
        stale.mkdir()
        (stale / "stale.txt").write_text("of another model")
    params = model_params.init(model_config, jax.random.key(0), jnp.float32)
    write_model(model_config, params, folder, tokenizer_folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not lost.exists()


def test_the_best_weights_are_kept_and_written_not_the_last(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(dataclasses.replace(train_config, steps=9, validate_every=3))
    nats = iter([50.0, 20.0, 30.0])
    weights = []

    def fake_nats(params: model_params.Params) -> float:
        weights.append(np.asarray(params["final_norm"]["scale"]))
        return next(nats)

    written = []
    monkeypatch.setattr(trainer, "validation_nats", fake_nats)
    monkeypatch.setattr("falcon_jax.train.trainee.write_model", lambda _, params, *rest: written.append(params))
    assert trainer.run().best_step == 6
    np.testing.assert_array_equal(written[0]["final_norm"]["scale"], weights[1].astype(jnp.bfloat16))


def test_a_time_budget_settles_the_number_of_steps_and_resuming_keeps_it(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake_steps(remaining_s: float, step_s: float, pauses: list[tuple[float, int]]) -> int:
        asked.append((remaining_s, step_s, [every for _, every in pauses]))
        return 4

    monkeypatch.setattr("falcon_jax.train.schedule.steps_in_budget", fake_steps)
    timed = dataclasses.replace(train_config, steps=None, time_budget_s=1e6, warmup_steps=10)
    result = Trainer(timed).run()
    assert (result.is_complete, result.step) == (True, 14)
    [(remaining_s, step_s, every)] = asked
    assert 0 < step_s < remaining_s < 1e6
    assert every == [timed.validate_every, timed.checkpoint_every]
    assert Trainer(timed).total_steps == 14


def test_max_seconds_leaves_a_checkpoint_to_go_on_from(train_config: TrainConfig) -> None:
    result = Trainer(dataclasses.replace(train_config, max_seconds=0.001)).run()
    assert (result.is_complete, result.was_signalled, result.step) == (False, False, 1)
    assert Trainer(train_config).step == 1


def test_sigterm_leaves_a_checkpoint(train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(train_config)
    advance = trainer._advance

    def advance_and_signal(*arguments) -> None:
        advance(*arguments)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "_advance", advance_and_signal)
    handler = signal.getsignal(signal.SIGTERM)
    result = trainer.run()
    assert (result.is_complete, result.was_signalled, result.step) == (False, True, 3)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert Trainer(train_config).step == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(train_config)
    advance, calls = trainer._advance, []

    def poison(*arguments) -> None:
        if len(calls) == 4:
            norm = trainer.state["params"]["final_norm"]
            norm["scale"] = norm["scale"] * jnp.nan
        calls.append(1)
        advance(*arguments)

    monkeypatch.setattr(trainer, "_advance", poison)
    batch = train_config.output / "not-finite-step-4.npz"
    with pytest.raises(NotFiniteError, match=f"not finite at step 4, whose batch lies in {batch}"):
        trainer.run()
    saved = np.load(batch)
    [fed] = trainer._batches.placed(4)
    np.testing.assert_array_equal(saved["tokens"], np.asarray(fed).reshape(saved["tokens"].shape))
    assert (int(saved["step"]), float(saved["learning_rate"])) == (4, train_config.rate(4, 20))
    assert Trainer(train_config).step == 0  # nothing poisoned was saved


def test_resuming_with_another_batch_size_is_refused(train_config: TrainConfig) -> None:
    Trainer(train_config)
    with pytest.raises(ConfigError, match="batch_size = 8, and this one has 4"):
        Trainer(dataclasses.replace(train_config, batch_size=4))


def test_contradictory_settings_are_refused(train_config: TrainConfig) -> None:
    ramping = dataclasses.replace(train_config.step, num_micro_batches=4)
    for wrong, message in (
        ({"steps": None}, "give one of the three"),
        ({"time_budget_s": 9.0}, "give one of the three"),
        ({"tokens": 9}, "give one of the three"),
        ({"steps": 0}, "steps is 0"),
        ({"stage": 0}, "stage is 0"),
        ({"ramp_tokens": 900}, "fewer than the full batch"),
        ({"steps": None, "time_budget_s": 9.0, "ramp_tokens": 9, "step": ramping}, "steps of one size"),
        ({"steps": None, "time_budget_s": 9.0, "warmup_tokens": 1}, "warm-up has 1 steps"),
        ({"data_parallel": 3}, "must divide it"),
        ({"learning_rate": -1.0}, "learning rate -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(train_config, **wrong)
    with pytest.raises(ConfigError, match="neither a file nor one of"):
        Trainer(dataclasses.replace(train_config, model="falcon-9"))
    with pytest.raises(ConfigError, match="stage is 64, and there are only 8 devices"):
        Trainer(dataclasses.replace(train_config, tensor=64))


@pytest.fixture(scope="module")
def base(model_config: FalconConfig, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    params = model_params.init(model_config, jax.random.key(5), jnp.float32)
    write_model(model_config, params, folder, tokenizer_folder)
    return folder


@pytest.mark.parametrize("weights", ["int8", *thorough(["native"])])
def test_adapters_are_trained_beside_a_checkpoint_and_loaded_with_it(
    train_config: TrainConfig, base: Path, weights: str
) -> None:
    config = dataclasses.replace(
        train_config, model=None, tokenizer=None, base=str(base), lora=True, lora_rank=4, base_weights=weights
    )
    result = Trainer(config).run()
    assert result.is_complete and not (config.output / "model").exists()
    before, *_, after = records(config, "valid")
    assert before["step"] == 0
    assert after["nats_per_token"] < before["nats_per_token"] - 0.1
    plain = Falcon.from_checkpoint(base, dtype="float32")
    adapted = Falcon.from_checkpoint(base, dtype="float32", adapter=config.output / "adapter")
    ids = [[3, 4, 5, 6]]
    assert not np.allclose(plain.logits(ids), adapted.logits(ids), atol=1e-2)


def test_a_checkpoint_is_trained_on_with_documents_apart(train_config: TrainConfig, base: Path) -> None:
    config = dataclasses.replace(train_config, model=None, tokenizer=None, base=str(base), mask_documents=True, steps=4)
    trainer = Trainer(config)
    expected = load(base, dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, trainer.state["params"], expected)
    assert config.step_options.separator == 0
    assert trainer.run().is_complete
    assert [record["step"] for record in records(config, "valid")] == [0, 4]


def test_a_pipeline_trains_as_one_device_does_and_its_model_is_loaded(
    train_config: TrainConfig, tmp_path: Path, model_config: FalconConfig
) -> None:
    step = dataclasses.replace(train_config.step, num_micro_batches=2)
    alone = dataclasses.replace(train_config, step=step, steps=6, log_every=1)
    piped = dataclasses.replace(alone, output=tmp_path / "piped", stage=2, remat="stage")
    for config in (alone, piped):
        assert Trainer(config).run().is_complete
    for kind, value in (("train", "loss"), ("valid", "nats_per_token")):
        found, expected = ([record[value] for record in records(config, kind)] for config in (piped, alone))
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert load(piped.output / "model", dtype="float32").config == model_config


def test_settings_of_checkpoints_and_adapters_that_contradict_each_other_are_refused(train_config: TrainConfig) -> None:
    for changes, message in (
        ({"base": "falcon-nano"}, "which has a configuration: give one"),
        ({"lora": True}, "lora needs the checkpoint"),
        ({"base_weights": "int4"}, "only frozen weights can be"),
        ({"step": StepOptions(separator=3)}, "give mask_documents instead"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(train_config, **changes)
