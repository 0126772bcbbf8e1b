"""benchmarks/several_gpus.py: each part on simulated devices, what becomes of jobs that fail, and the bars.

How fast anything is stays out of tests.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from benchmarks import (
    places,
    several_correct,
    several_decode,
    several_gpus,
    several_jobs,
    several_load,
    several_report,
    several_train,
    training_measure,
)
from benchmarks.clock import Clock
from benchmarks.several_gpus import Arguments
from benchmarks.several_jobs import Job, Layout, Result, shape
from falcon_jax.config import PRESETS
from tests import benchmarking

on_cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a GPU each job has its own process")
H200_BYTES = 138_000_000_000
QUIET: list[str] = []


def no_clock(max_seconds: float | None = None) -> Clock:
    return Clock(time.perf_counter(), max_seconds)


def say(line: str) -> None:
    QUIET.append(line)


@pytest.fixture
def call(monkeypatch, tmp_path, capfd):
    """Runs the command in this process; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(training_measure, "WARM_UP_STEPS", 1)
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):  # the command sets these for its own process
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return benchmarking.caller(several_gpus.run, monkeypatch, capfd, tmp_path / "results", *benchmarking.NO_CACHE)


@on_cpu_only
def test_every_part_but_the_comparisons_in_one_document(call, tmp_path, monkeypatch):
    train_jobs = several_train.jobs
    monkeypatch.setattr(several_train, "jobs", lambda *arguments: train_jobs(*arguments)[:2])  # each compiles for 4 s
    few = dict(list(several_decode.GRAPHS.items())[:2])  # on CPUs they are all one and the same
    monkeypatch.setattr(several_decode, "GRAPHS", few)
    parts = ["--only", "decode", "train", "load", "graphs", "--devices", "cpu", "--num-devices", "2", "--tiny"]
    small = ["--counts", "2", "--weights", "native", "--batches", "2", "--repeats", "1", "--graph-steps", "40"]
    layers = ["--num-layers", "1", "--decode-layers", "1", "--train-layers", "1", "--graph-layers", "1"]
    files = ["--folder", str(tmp_path), "--save", "tiny"]
    code, text, errors = call(*parts, *small, *layers, *files, "--load-layers", "1", "--train-steps", "1")
    assert code == 0, errors
    document = json.loads(text.splitlines()[-1])
    assert json.loads((tmp_path / "results" / "tiny.json").read_text()) == document
    assert document["counts"] == [2] and document["environment"]["NCCL_NVLS_ENABLE"] == "0"
    found = {part: [one for one in document["results"] if one["part"] == part] for part in several_gpus.PARTS}
    assert not found["correct"]

    (over,) = found["decode"]
    assert over["num_devices"] == 2 and over["layout"] == "tensor 2"
    assert over["decode_tokens_per_s"] == pytest.approx(2e3 / over["ms_per_step"]) and over["peak_gib"] is None

    fsdp, one = found["train"]  # what one device holds is the whole model
    assert (fsdp["layout"], one["layout"]) == ("fsdp 2", "1 device")
    assert fsdp["tokens_per_s"] == pytest.approx(2 * 32e3 / fsdp["ms_per_step"]) and fsdp["mfu"] is None
    assert fsdp["state_gib"] == pytest.approx(one["state_gib"]) and fsdp["losses"][1] < fsdp["losses"][0]

    loaded, restored = found["load"]
    assert loaded["load_gb_per_s"] > 0 and len(loaded["load_s"]) == 2 and "checkpoint" not in os.listdir(tmp_path)
    assert restored["ok"] and (restored["layout"], restored["onto"]) == ("fsdp 2", "data 2")

    assert [result["captured"] for result in found["graphs"]] == list(several_decode.GRAPHS)
    assert all(result["ok"] and result["num_steps"] == 40 for result in found["graphs"])
    assert all("tokens" not in result for result in found["graphs"])

    assert [bar["asked"] for bar in document["bars"]] == [0.92]
    assert "efficiency" in text and "graphs: falcon-40b-alibi" in errors


@on_cpu_only
def test_a_shape_over_devices_is_compared_with_one_device(monkeypatch):
    monkeypatch.setattr(several_correct, "NUM_STEPS", 8)
    config = shape("falcon-rw-1b", 1, tiny=True)
    layouts = [Layout(tensor=2), Layout(data=2, tensor=2)]
    logits, tokens, int8, mixed, *_ = several_correct.jobs("falcon-rw-1b", config, layouts, 60)
    chosen = [logits, int8, mixed, several_correct.Step("falcon-rw-1b", config, Layout(fsdp=2), 60, "float32")]
    results = list(several_jobs.run(chosen, lambda job: places.here, no_clock(), say))
    assert [result["ok"] for result in results] == [True] * 4, results
    assert (
        results[0]["error"] < 1e-5 and results[1]["agreeing_share"] == 1.0 and results[2]["layout"] == str(layouts[1])
    )
    assert results[3]["loss_error"] < 2e-5 and results[3]["grad_norm"] > 0
    assert tokens.name == "falcon-rw-1b native tokens, tensor 2" and "autotune" in tokens.xla_flags


@on_cpu_only
def test_what_devices_compute_wrongly_is_found(monkeypatch):
    make = several_correct.make_params

    made: list[str] = []

    def wrong_over_devices(config, dtype, weights="native"):
        params = make(config, dtype, weights)
        if made:  # one device's come first
            params["layers"][0]["mlp"]["down"]["bias"] *= 2
        made.append(dtype)
        return params

    monkeypatch.setattr(several_correct, "make_params", wrong_over_devices)
    several_correct._expected_logits.cache_clear()
    config = shape("falcon-rw-1b", 1, tiny=True)
    job = several_correct.Logits("falcon-rw-1b", config, Layout(tensor=2), 60)
    (result,) = several_jobs.run([job], lambda job: places.here, no_clock(), say)
    several_correct._expected_logits.cache_clear()
    assert result["ok"] is False and result["error"] > 1e-2


def test_of_two_texts_the_first_difference_alone_is_judged():
    logits = np.zeros((2, 3, 4), np.float32)
    logits[..., 0], logits[..., 1], logits[..., 2] = 8.0, 7.95, 4.0
    expected = np.zeros((2, 3), np.int32)
    close, wrong = np.array([[0, 1, 2], [0, 0, 0]]), np.array([[0, 0, 0], [0, 0, 2]])
    found = several_correct.compare_tokens(close, expected, logits, 2.0**-6)
    assert found["ok"] and found["agreeing_share"] == pytest.approx(4 / 6) and found["first_step_that_differs"] == 1
    (difference,) = found["first_differences"]
    assert (difference["row"], difference["step"]) == (0, 1) and difference["gap"] == pytest.approx(0.05, rel=1e-3)
    assert not several_correct.compare_tokens(wrong, expected, logits, 2.0**-6)["ok"]
    same = several_correct.compare_tokens(expected, expected, logits, 0.0)
    assert same["ok"] and same["first_step_that_differs"] is None


def test_steps_with_other_graphs_must_make_the_same_tokens():
    kept: dict[str | None, tuple[str, list[int]]] = {}

    def settled(name: str, sums: str | None = None, **more: Any) -> Result:
        return several_decode.with_agreement({"part": "graphs", "name": name, "sums": sums} | more, kept)

    assert "ok" not in settled("hung", failed="why", out_of_memory=False)
    assert settled("first", tokens=[1, 2, 3])["ok"]
    other = settled("other", tokens=[1, 2, 4])
    assert other["ok"] is False and other["first_step_that_differs"] == 2 and other["compared_with"] == "first"
    assert settled("too short", tokens=[1, 2])["ok"] is False
    # Sums that are rounded in other places may make other tokens.
    assert settled("first by XLA", "xla", tokens=[1, 5])["ok"] and not settled("other", "xla", tokens=[1])["ok"]


# What becomes of jobs.


@dataclasses.dataclass(frozen=True)
class Fake(Job):
    part: ClassVar[str] = "correct"
    does: str
    timeout_s: float = 60.0

    @property
    def name(self) -> str:
        return self.does

    def run(self, say: places.Say) -> Iterator[Result]:
        yield {"pid": os.getpid(), "flags": os.environ.get("XLA_FLAGS")}
        if self.does == "dies":
            os._exit(7)
        if self.does == "hangs":
            time.sleep(600)
        if self.does == "raises":
            raise RuntimeError("it is wrong")
        if self.does == "lacks memory":
            raise MemoryError("too large")


def test_a_job_that_dies_or_hangs_takes_no_other_along(monkeypatch, capfd):
    jobs = [Fake("raises"), Fake("dies"), Fake("hangs", 1.0)]
    arguments, flags = Arguments(compilation_cache="off"), "--xla_gpu_autotune_level=0"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(Fake, "xla_flags", several_decode.WITH_COLLECTIVES)
    monkeypatch.setenv("XLA_FLAGS", flags)
    results = list(several_jobs.run(jobs, lambda job: several_gpus.place_of(arguments, job), no_clock(), say))
    assert [(result["name"], result.get("failed")) for result in results] == [
        ("raises", None),
        ("raises", "RuntimeError: it is wrong"),
        ("dies", None),
        ("dies", "ProcessDiedError: its process ended with exit code 7"),
        ("hangs", None),
        ("hangs", "TimeoutError: no result within 1 s: where it hung stands on stderr"),
    ]
    works = [result for result in results if "pid" in result]
    assert works[0]["pid"] == works[1]["pid"] and len({result["pid"] for result in works} | {os.getpid()}) == 3
    # XLA would end a process with flags that it does not know.
    assert {result["flags"] for result in works} == {f"{flags} {several_decode.WITH_COLLECTIVES}"}
    assert os.environ["XLA_FLAGS"] == flags and "most recent call first" in capfd.readouterr().err
    assert len(several_report.failures({"results": results})) == 3


def test_lack_of_memory_is_a_failure_where_nothing_else_fits():
    memory, works = Fake("lacks memory"), Fake("works")
    results = list(several_jobs.run([memory, works], lambda job: places.here, no_clock(), say))
    assert results[1]["out_of_memory"] and several_report.failures({"results": results}) == []
    (line,) = several_report.failures({"results": results[1:2]})
    assert line == "correct: lacks memory: MemoryError: too large"
    (line,) = several_report.failures({"results": [{"part": "load", "name": "x", "ok": False}]})
    assert line == "load: x is wrong"


def test_nothing_begins_that_would_end_too_late():
    clock = no_clock(100.0)
    clock.slowest_s["correct"] = 200.0
    results = list(several_jobs.run([Fake("works")], lambda job: places.here, clock, say))
    assert results == [
        {"part": "correct", "name": "works", "left_out": "it would not be done within --max-seconds 100"}
    ]
    assert several_report.failures({"results": results}) == []


# What is measured, and in which order.


def names(arguments: Arguments, counts: list[int], memory_bytes: int = H200_BYTES) -> list[str]:
    return [str(job) for job in several_gpus.make_jobs(arguments, counts, memory_bytes)]


def test_the_most_important_comes_first():
    told = names(Arguments(), [1, 2, 4, 8])
    assert told[0] == "correct: falcon-40b-alibi float32 logits, tensor 8"
    assert [line for line in told if line.startswith("decode")] == [
        "decode: falcon-40b-alibi native, tensor 8",
        "decode: falcon-40b-alibi native, 1 device",
        "decode: falcon-180b native, tensor 8",
        "decode: falcon-40b-alibi int8, tensor 8",
        "decode: falcon-40b-alibi int8, 1 device",
        "decode: falcon-40b-alibi native, tensor 4",
        "decode: falcon-40b-alibi native, tensor 2",
        "decode: falcon-40b-alibi int8, tensor 4",
        "decode: falcon-40b-alibi int8, tensor 2",
    ]
    assert [line for line in told if line.startswith("train")] == [
        "train: falcon-7b, 32 layers, fsdp 8",
        "train: falcon-7b, 16 layers, 1 device",
        "train: falcon-7b, 16 layers, fsdp 8",
        "train: falcon-7b, 16 layers, data 8",
    ]
    assert "correct: falcon-7b float32 logits, data 2, tensor 4" in told
    assert "load: falcon-rw-1b training state, fsdp 8 onto data 2, tensor 4" in told
    assert not any("180b" in line for line in names(Arguments(), [1, 2, 4]) + names(Arguments(), [1, 8], 80 * 10**9))
    only = names(Arguments(only=("correct",), models=("falcon-7b",)), [2])
    assert len(only) == 9 + 4 * len({several_jobs.half_dtype(), "float32"}) and all(
        "falcon-7b" in line for line in only
    )


def test_tiny_shapes_keep_what_is_peculiar():
    for model in several_gpus.MODELS:
        config, preset = shape(model, None, tiny=True), PRESETS[model]
        assert (config.positions, config.block, config.num_norms, config.bias) == (
            preset.positions,
            preset.block,
            preset.num_norms,
            preset.bias,
        )
        assert (config.num_kv_heads == 1) == (preset.num_kv_heads == 1)
    assert shape("falcon-7b", None, tiny=True).num_heads % 2 == 1  # as 71: no mesh divides it
    assert shape("falcon-40b", 3, tiny=False) == dataclasses.replace(PRESETS["falcon-40b"], num_layers=3)
    assert several_train.layers_for_one_device(PRESETS["falcon-7b"], 10**9) == 1
    assert several_train.layers_for_one_device(PRESETS["falcon-7b"], 10**12) == 32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--counts", "3"], "--counts has 3; it must be a power of two"),
        (["--counts", "1"], "there must be several devices"),
        (["--num-devices", "1"], "--num-devices is 1; it must be at least 2"),
        (["--num-devices", "99"], "--num-devices is 99; there are 8"),
        (["--batches", "0"], "--batches is 0; it must be at least 1"),
        (["--save", "../x"], "--save is '../x'"),
    ],
)
@on_cpu_only
def test_what_cannot_be_done_is_one_line_and_code_2(call, arguments, said):
    code, text, errors = call(*arguments)
    assert (code, text) == (2, "") and errors.count("\n") == 1 and said in errors


def test_a_full_disk_is_said_beforehand(tmp_path):
    with pytest.raises(OSError, match="GB free, and 1100000"):
        several_load.require_space(tmp_path, 10**18)


def test_bars_of_decoding_and_training():
    def decoded(count: int, speed: float, model: str = "falcon-40b-alibi") -> Result:
        sizes = {"num_layers": 60, "weights": "native", "batch_size": 1, "context_tokens": 4000, "num_devices": count}
        return {"part": "decode", "name": f"{count}", "model": model, "decode_tokens_per_s": speed} | sizes

    def trained(count: int, layers: int, tflops: float, mfu: float | None) -> Result:
        figures = {"tokens_per_s": 1.0, "tflops_per_s_a_device": tflops, "mfu": mfu}
        about = {"part": "train", "name": f"{count}, {layers}", "model": "falcon-7b"}
        return about | {"num_layers": layers, "num_devices": count} | figures

    results = [decoded(8, 260.0), decoded(1, 50.0), decoded(8, 79.0, "falcon-180b"), decoded(4, 140.0)]
    results += [trained(8, 32, 470.0, 0.475), trained(1, 16, 500.0, 0.5), trained(8, 16, 450.0, 0.455)]
    bars = [(bar["value"], bar["asked"], bar["reached"]) for bar in several_report.bars(results)]
    assert bars == [
        (5.2, 5.0, True),
        (2.8, 3.0, False),
        (79.0, 80.0, False),
        (0.475, 0.46, True),
        (0.5, 0.46, True),
        (0.455, 0.46, False),
        (0.9, 0.92, False),
    ]
    told = several_report.lines({"results": [{"ok": True}, {"ok": False}], "bars": several_report.bars(results)})
    assert told[0] == "1 of 2 comparisons are right" and "5.2 (asked: 5): yes" in told[1]
