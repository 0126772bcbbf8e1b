"""scripts/benchmark.py: what the document holds, what is counted, and what it refuses with one line and exit code 2.

How fast anything is stays out of tests.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import hardware, measure
from falcon_jax.config import PRESETS
from falcon_jax.model import params as model_params
from tests import commands, hf_models, models

NEW_TOKENS = 3


@pytest.fixture(scope="module")
def script():
    return commands.load_script("benchmark")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    hf_models.save_model(hf_models.make_model(hf_models.tiny_config("falcon-40b-alibi")), folder)
    return folder


@pytest.fixture
def call(script, monkeypatch, capfd):
    """Runs the script in this process on small measurements; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(hardware, "MEASURE_S", 0.0)
    monkeypatch.setattr(hardware, "MATRIX_SIZES", {"cpu": 64, "gpu": 64})
    monkeypatch.setattr(measure, "MEMORY_READ_BYTES", {"cpu": 2**20, "gpu": 2**20})
    # The script sets these for its own process.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
        code = script.run()
        return code, *capfd.readouterr()

    return run


def small(*arguments: str) -> list[str]:
    return ["--context", "5", "--new-tokens", str(NEW_TOKENS), "--repeats", "2", *arguments]


def test_last_line_says_limit_ours_peers_and_machine(call, script, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "REPOSITORY", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    code, text, _ = call("--model", str(folder), *small("--batch", "2", "--dtype", "float32", "--save", "tiny"))
    assert code == 0
    lines = text.splitlines()
    document = json.loads(lines[-1])
    assert json.loads((tmp_path / "benchmarks" / "results" / "tiny.json").read_text()) == document
    first_limit = next(i for i, line in enumerate(lines) if line.startswith("limit:"))
    assert first_limit < next(i for i, line in enumerate(lines) if line.startswith("falcon_jax float32"))

    assert [(result["name"], result["dtype"]) for result in document["results"]] == [
        ("falcon_jax", "float32"),
        ("transformers", "float32"),
    ]
    for result in document["results"]:
        assert len(result["runs_s"]) == 2 and all(0 < first <= total for first, total in result["runs_s"])
        steps = NEW_TOKENS - 1
        assert result["decode_tokens_per_s"] == pytest.approx(2e3 / result["ms_per_step"])
        assert result["ms_per_step"] * steps < 1e3 * sum(total for _, total in result["runs_s"])
    assert document["limit"]["weight_bytes"] > 0 and document["limit"]["read_bytes_per_s"] > 0
    assert set(document["ratios"]) == {"decode", "first_token", "in_all"}
    assert document["weights"] == "stored" and document["batch_size"] == 2
    assert document["versions"]["jax"] and document["versions"]["torch"] and document["cpu"] and document["device"]
    assert document["commit"] and "benchmark.py --model" in document["command"]


def test_random_weights_and_no_peer(call, script, monkeypatch):
    tiny = models.tiny("falcon-7b")
    monkeypatch.setitem(PRESETS, "tiny-7b", tiny)
    code, text, _ = call("--model", "tiny-7b", "--peer", "none", *small())
    document = json.loads(text.splitlines()[-1])
    assert code == 0 and document["weights"] == "random" and document["ratios"] == {}
    assert [result["name"] for result in document["results"]] == ["falcon_jax"]


def test_peer_has_random_weights_of_the_same_shape(script):
    from benchmarks import peers

    tiny = models.tiny("falcon-rw-1b")
    contestants = peers.transformers(tiny, None, "bfloat16")
    assert {contestant.dtype for contestant in contestants} >= {"bfloat16"}
    runner = contestants[0].load()
    assert isinstance(runner, peers.TransformersRunner)
    # `parameters` names a tied head once, as num_parameters does.
    assert sum(parameter.numel() for parameter in runner.model.parameters()) == tiny.num_parameters
    times = runner.run(np.ones((1, 4), np.int32), NEW_TOKENS)
    assert 0 < times.first_s < times.total_s


def test_no_contestant_stops_at_an_end_of_text_token():
    """Every id ends the text here, and yet all tokens are made: `run` raises where some are missing."""
    tiny = models.tiny("falcon-7b", eos_token_ids=tuple(range(hf_models.TINY_VOCAB_SIZE)))
    contestant = measure.ours(tiny, None, "float32")
    contestant.load().run(np.ones((1, 4), np.int32), NEW_TOKENS)


def test_step_reads_every_weight_but_an_embedding_that_is_no_head():
    tied, untied = models.tiny("falcon-7b"), models.tiny("falcon2-11b")
    for config, unread in ((tied, 0), (untied, untied.vocab_size * untied.width)):
        arrays = model_params.flatten(model_params.abstract(config, "bfloat16"))
        stored = sum(leaf.size * 2 for leaf in arrays.values())
        assert measure.step_weight_bytes(config, "bfloat16") == stored - 2 * unread


def test_prefill_flops_of_a_7b_are_twice_its_weights_a_token():
    config = PRESETS["falcon-7b"]
    flops = measure.prefill_flops(config, measure.Workload(batch_size=2, context_tokens=512, new_tokens=2))
    weights = config.num_parameters - config.vocab_size * config.width
    assert flops == pytest.approx(2 * weights * 2 * 512, rel=0.03)  # attention and the head are small here


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "falcon-9b"], "--model falcon-9b is neither a folder nor a preset"),
        (["--model", "falcon-nano", "--new-tokens", "1"], "--new-tokens is 1; it must be at least 2"),
        (["--model", "falcon-nano", "--save", "../x"], "--save is '../x'"),
        (["--model", "falcon-nano", "--start-up"], "--start-up needs a model folder with a tokenizer.json"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(call, arguments, said):
    code, text, errors = call(*arguments)
    assert (code, text) == (2, "") and errors.count("\n") == 1
    assert errors.startswith("error: ") and said in errors


def test_peer_that_is_not_installed_is_one_line_and_code_2(call, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    code, text, errors = call("--model", "falcon-nano")
    assert (code, text) == (2, "") and errors.count("\n") == 1
    assert "--peer hf needs torch, not installed here" in errors


def test_start_up_ends_at_the_first_byte():
    taken = measure.start_up_s([sys.executable, "-c", "print('text', flush=True)"])
    assert 0 < taken["first_token_s"] <= taken["total_s"]
    with pytest.raises(RuntimeError, match="exit code 3"):
        measure.start_up_s([sys.executable, "-c", "raise SystemExit(3)"])


def test_commit_is_unknown_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert hardware.describe()["commit"] == "unknown"
