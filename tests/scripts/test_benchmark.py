"""scripts/benchmark.py: what the document holds, what is counted, and what it refuses with one line and exit code 2.

How fast anything is stays out of tests.
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from benchmarks import hardware, limits, measure, peers, seed_table
from benchmarks.limits import Workload
from falcon_jax.config import PRESETS
from falcon_jax.model import params as model_params
from tests import benchmarking, commands, hf_models, models

NEW_TOKENS = 3


@pytest.fixture(scope="module")
def script():
    return commands.load_script("benchmark")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    hf_models.save_model(hf_models.make_model(hf_models.tiny_config("falcon-40b-alibi", num_hidden_layers=1)), folder)
    return folder


@pytest.fixture
def call(script, monkeypatch, capfd, tmp_path):
    """Runs the script in this process on small measurements; returns its exit code, stdout and stderr."""
    # Traced and cut as for the real compiler, which takes half a minute a model here.
    monkeypatch.setattr(peers, "COMPILE", {"backend": "eager", "mode": None})
    monkeypatch.setattr(measure, "PAUSE_S", 0.0)
    return benchmarking.caller(script.run, monkeypatch, capfd, tmp_path / "results", *benchmarking.NO_CACHE)


def small(*arguments: str) -> list[str]:
    return ["--context", "5", "--new-tokens", str(NEW_TOKENS), "--repeats", "2", *arguments]


def test_last_line_says_limit_ours_peers_and_machine(call, folder, tmp_path):
    """The peer that is compiled crashes on models with ALiBi: a result like any other."""
    code, text, _ = call("--model", str(folder), *small("--batch", "2", "--dtype", "float32", "--save", "tiny"))
    assert code == 0
    lines = text.splitlines()
    document = json.loads(lines[-1])
    assert json.loads((tmp_path / "results" / "tiny.json").read_text()) == document
    first_limit = next(i for i, line in enumerate(lines) if line.startswith("limit:"))
    assert first_limit < next(i for i, line in enumerate(lines) if line.startswith("falcon_jax float32"))

    assert [(result["name"], result["dtype"]) for result in document["results"]] == [
        ("falcon_jax", "float32"),
        ("transformers", "float32"),
        ("transformers compiled", "float32"),
    ]
    *measured, crashed = document["results"]
    assert crashed["failed"].startswith("RuntimeError: The size of tensor a")
    assert any(line.startswith("transformers compiled float32: failed: RuntimeError") for line in lines)
    for result in measured:
        assert len(result["runs_s"]) == 2 and all(0 < first <= total for first, total in result["runs_s"])
        steps = NEW_TOKENS - 1
        assert result["decode_tokens_per_s"] == pytest.approx(2e3 / result["ms_per_step"])
        assert result["ms_per_step"] * steps < 1e3 * sum(total for _, total in result["runs_s"])
        assert result["interleaved"] and result["weights"] == "native"
    # Without a cache nothing comes from one; what the peer compiles is not JAX's.
    programs = [result.get("warm_up_programs") for result in measured]
    assert programs[0]["compiled"] >= 3 and programs[0]["from_cache"] == 0 and programs[1] is None
    assert measured[0]["share_of_read_limit"] > 0 and measured[0]["share_of_flops_limit"] > 0
    assert document["limit"]["weight_bytes"] > 0 and document["limit"]["read_bytes_per_s"] > 0
    assert set(document["ratios"]) >= {"decode", "first_token", "in_all"}
    assert document["parameters"] == "stored" and document["batch_size"] == 2
    assert document["versions"]["jax"] and document["versions"]["torch"] and document["cpu"] and document["device"]
    assert document["commit"] and "benchmark.py --model" in document["command"]


@pytest.mark.parametrize("weights", ["native", "int4"])
def test_random_weights_and_no_peer(call, monkeypatch, weights):
    tiny = models.tiny("falcon-7b", num_layers=1)
    monkeypatch.setitem(PRESETS, "tiny-7b", tiny)
    code, text, _ = call("--model", "tiny-7b", "--peer", "none", "--weights", weights, *small())
    document = json.loads(text.splitlines()[-1])
    assert code == 0 and document["parameters"] == "random" and document["ratios"] == {}
    assert [(result["name"], result["weights"]) for result in document["results"]] == [("falcon_jax", weights)]
    assert document["limit"]["weight_bytes"] == limits.step_weight_bytes(tiny, "bfloat16", weights)


def table(document: dict) -> dict[tuple[str, str, str], dict]:
    """Each result by model, row and contestant."""
    return {
        (model["name"], row["name"], result["name"]): result
        for model in document["models"]
        for row in model["rows"]
        for result in row["results"]
    }


def tiny_table(monkeypatch, *arguments: str) -> list[str]:
    """The arguments of the seed table on models of its own two names, tiny."""
    for name in seed_table.MODELS:
        monkeypatch.setitem(PRESETS, name, models.tiny(name, num_layers=1))
    small_rows = ["--scale", "0.004", "--new-tokens", str(NEW_TOKENS), "--repeats", "1", "--dtype", "float32"]
    return ["--table", "seed", *small_rows, *arguments]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a GPU each contestant compiles in its own process")
def test_seed_table_has_a_result_for_each_model_row_and_contestant(call, monkeypatch, tmp_path):
    code, text, _ = call(*tiny_table(monkeypatch, "--save", "tiny"))
    assert code == 0
    *lines, last = text.splitlines()
    document = json.loads(last)
    assert json.loads((tmp_path / "results" / "tiny.json").read_text()) == document
    found = table(document)
    contestants = ("falcon_jax", "transformers", "transformers compiled")
    rows = ("first_token", "decode", "peak", "long")
    assert list(found) == [(m, row, name) for m in seed_table.MODELS for row in rows for name in contestants]

    for (model, row, name), result in found.items():
        if model == "falcon-40b-alibi" and name == "transformers compiled":
            assert "The size of tensor" in result["failed"]
        else:
            assert "failed" not in result, (model, row, name, result["failed"])
            assert result["first_token_ms"] > 0
            assert ("ms_per_step" in result) == (row != "first_token")  # one token decodes nothing
            assert ("share_of_flops_limit" in result) == (name == "falcon_jax")
    sizes = [[row["batch_size"], row["context_tokens"]] for row in document["models"][0]["rows"]]
    assert sizes == [[1, 2], [1, 16], [4, 16], [1, 48]]
    assert document["models"][1]["rows"][1]["ratios"]["decode"] > 0

    header = next(i for i, line in enumerate(lines) if line.startswith("| falcon-40b-alibi, "))
    assert [cell.strip() for cell in lines[header].split("|")[2:-1]] == [f"{name} float32" for name in contestants]
    first_cell, *cells = (cell.strip() for cell in lines[header + 2].split("|")[1:-1])
    assert first_cell == "first token, 2 tokens" and "ms (" in cells[0] and cells[2] == "failed"
    assert lines[header + 6].startswith("transformers compiled float32, first token, 2 tokens: RuntimeError")


def test_seed_table_goes_on_after_a_failure_of_ours_and_ends_with_code_1(call, monkeypatch):
    run = measure.OurRunner.run

    def fail_at_16_tokens(self, prompts, new_tokens):
        if prompts.shape == (1, 16):
            raise RuntimeError("the kernel is wrong")
        return run(self, prompts, new_tokens)

    monkeypatch.setattr(measure.OurRunner, "run", fail_at_16_tokens)
    arguments = ["--model", "falcon-40b", "--rows", "first_token", "decode", "--peer", "hf-plain"]
    code, text, errors = call(*tiny_table(monkeypatch, *arguments))
    assert code == 1
    assert errors == "error: falcon-40b, decode: falcon_jax failed: RuntimeError: the kernel is wrong\n"
    found = table(json.loads(text.splitlines()[-1]))
    assert {key[1:]: "failed" in result for key, result in found.items()} == {
        ("first_token", "falcon_jax"): False,
        ("decode", "falcon_jax"): True,
        ("first_token", "transformers"): False,
        ("decode", "transformers"): False,
    }
    assert "in fail_at_16_tokens" in text  # the traceback


@pytest.mark.gpu
def test_seed_table_on_a_gpu_says_what_each_contestant_held(call, monkeypatch):
    code, text, _ = call(*tiny_table(monkeypatch, "--model", "falcon-40b", "--rows", "peak", "--peer", "hf-plain"))
    found = table(json.loads(text.splitlines()[-1]))
    assert code == 0 and len(found) == 2 and all(result["peak_gib"] > 0 for result in found.values())


def test_seed_table_is_measured_at_its_published_sizes():
    cases = {case.name: case.workload for case in seed_table.Plan("bfloat16", "native").cases()}
    assert cases["first_token"].context_tokens == 512 and cases["first_token"].batch_size == 1
    assert (cases["decode"].batch_size, cases["decode"].context_tokens) == (1, 4000)
    assert (cases["peak"].batch_size, cases["peak"].context_tokens) == (4, 4000)
    assert (cases["long"].batch_size, cases["long"].context_tokens) == (1, 12_000)


def test_peer_has_random_weights_of_the_same_shape():
    tiny = models.tiny("falcon-rw-1b")
    contestants = peers.transformers(tiny, None, "bfloat16")
    assert {contestant.dtype for contestant in contestants} >= {"bfloat16"}
    runner = contestants[0].load()
    assert isinstance(runner, peers.TransformersRunner)
    # `parameters` names a tied head once, as num_parameters does.
    assert sum(parameter.numel() for parameter in runner.model.parameters()) == tiny.num_parameters
    times = runner.run(np.ones((1, 4), np.int32), NEW_TOKENS)
    assert 0 < times.first_s < times.total_s


def test_peer_with_random_weights_is_made_on_its_device_in_its_dtype():
    """On a device that stores nothing: what passed through the host would have numbers."""
    model = peers.random_model(models.tiny("falcon-40b"), "bfloat16", "meta")
    assert {(leaf.device.type, leaf.dtype) for leaf in model.parameters()} == {("meta", torch.bfloat16)}
    assert {leaf.device.type for leaf in model.buffers()} == {"meta"}


def test_compiled_peer_begins_each_workload_anew(monkeypatch):
    monkeypatch.setattr(peers, "COMPILE", {"backend": "eager", "mode": None})
    (runner,) = (
        one.load()
        for one in peers.transformers(models.tiny("falcon-7b", num_layers=1), None, "float32", [peers.COMPILED])
    )
    assert isinstance(runner, peers.TransformersRunner)
    runner.begin()
    runner.run(np.ones((2, 8), np.int32), NEW_TOKENS)
    assert {"_compiled_call", "_previous_max_cache_length"} <= set(vars(runner.model))
    runner.begin()
    assert not {"_compiled_call", "_previous_max_cache_length"} & set(vars(runner.model))


def test_no_contestant_stops_at_an_end_of_text_token():
    """Every id ends the text here, and yet all tokens are made: `run` raises where some are missing."""
    tiny = models.tiny("falcon-7b", num_layers=1, eos_token_ids=tuple(range(hf_models.TINY_VOCAB_SIZE)))
    measure.Ours(tiny, None, "float32").load().run(np.ones((1, 4), np.int32), NEW_TOKENS)


@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_step_reads_every_weight_but_an_embedding_that_is_no_head(weights):
    tied, untied = models.tiny("falcon-7b"), models.tiny("falcon2-11b")
    V, D = untied.vocab_size, untied.width
    # In few bits it has whole tiles, of 64 tokens by 128 numbers of one byte, and a scale of four a token.
    table = 2 * V * D if weights == "native" else 64 * -(-V // 64) * (128 * -(-D // 128) + 4)
    for config, unread in ((tied, 0), (untied, table)):
        arrays = model_params.flatten(model_params.abstract(config, "bfloat16", weights))
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values())
        assert limits.weight_bytes(config, "bfloat16", weights) == stored
        assert limits.step_weight_bytes(config, "bfloat16", weights) == stored - unread


def test_weights_of_few_bits_count_their_scales():
    """All sizes of this shape are whole tiles, so that there is no padding: a scale of two bytes for 128 weights, and
    of four for each token of the embedding, which is the head."""
    config = PRESETS["falcon-40b-alibi"]
    D, H = config.width, config.head_dim
    projections = config.num_layers * D * (2 * D + 2 * config.num_kv_heads * H + 2 * config.mlp_width)
    V, table = config.vocab_size, config.vocab_size * D
    others = 2 * (config.num_parameters - projections - table)
    assert limits.weight_bytes(config, "bfloat16", "native") == 2 * (projections + table) + others
    few = projections // 2 + projections // 64 + table + 4 * V
    assert limits.weight_bytes(config, "bfloat16", "int4") == few + others


def test_prefill_flops_of_a_7b_are_twice_its_weights_a_token():
    config = PRESETS["falcon-7b"]
    flops = limits.prefill_flops(config, Workload(batch_size=2, context_tokens=512, new_tokens=2))
    weights = config.num_parameters - config.vocab_size * config.width
    assert flops == pytest.approx(2 * weights * 2 * 512, rel=0.03)  # attention and the head are small here


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "falcon-9b"], "--model falcon-9b is neither a folder nor a preset"),
        (["--model", "falcon-nano", "--new-tokens", "1"], "--new-tokens is 1; it must be at least 2"),
        (["--model", "falcon-nano", "--save", "../x"], "--save is '../x'"),
        (["--model", "falcon-nano", "--start-up"], "--start-up needs a model folder with a tokenizer.json"),
        (["--model", "falcon-7b", "falcon-40b"], "--model names 2 models; one at a time, except in a --table"),
        (["--no-ours", "--peer", "none"], "leaves nobody to measure"),
        (["--rows", "decode"], "add --table seed"),
        (["--table", "seed", "--scale", "0"], "--scale is 0.0; it must be a number above 0"),
        (["--table", "seed", "--scale", "nan"], "--scale is nan; it must be a number above 0"),
        (["--table", "seed", "--context", "9"], "--batch, --context and --start-up are no table's"),
        (["--table", "seed", "--model", "falcon-9b"], "--model falcon-9b is neither a folder nor a preset"),
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
