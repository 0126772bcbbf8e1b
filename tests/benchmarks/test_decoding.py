"""The benchmark of decoding's steps, on a CPU."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import decode_steps, decoding
from benchmarks.decode_steps import StepCase, Steps
from benchmarks.limits import Rates
from benchmarks.training_profile import Event
from falcon_jax.config import PRESETS
from falcon_jax.errors import RequestError
from falcon_jax.model.cache import cache_bytes
from tests.benchmarking import caller


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(decode_steps, "NUM_CALLS", 1)
    return caller(decoding.run, monkeypatch, capfd, tmp_path)


def test_a_run_ends_with_a_document_of_all_cases(call, tmp_path):
    code, out, err = call(
        *("--models", "falcon-nano", "--num-layers", "3", "--weights", "native", "--rows", "1", "2", "--context", "40"),
        *("--trace", str(tmp_path / "trace"), "--save", "steps"),
    )
    assert code == 0, err
    *printed, last = out.splitlines()
    document = json.loads(last)
    assert document == json.loads((tmp_path / "steps.json").read_text())
    assert [(case["num_rows"], case["num_layers"]) for case in document["cases"]] == [(1, 3), (2, 3)]
    for case in document["cases"]:
        assert case["ms_per_step"] > 0 and case["share_of_read_limit"] > 0
        assert case["decode_tokens_per_s"] == pytest.approx(1e3 * case["num_rows"] / case["ms_per_step"])
        assert case["kernels"][0]["us_a_step"] >= case["kernels"][-1]["us_a_step"] > 0
    assert any(line.startswith("falcon-nano native R=2 S=40: ") for line in printed)


def test_a_case_that_fails_is_named_and_costs_the_others_nothing(call, monkeypatch):
    measure = Steps.measure

    def fail_with_two_rows(steps, case, trace):
        if case.num_rows == 2:
            raise RuntimeError("out of memory")
        return measure(steps, case, trace)

    monkeypatch.setattr(Steps, "measure", fail_with_two_rows)
    code, out, err = call("--models", "falcon-nano", "--rows", "2", "1", "--context", "40")
    assert code == 1 and "error: falcon-nano native: RuntimeError: out of memory" in err
    failed, done = json.loads(out.splitlines()[-1])["cases"]
    assert failed["failed"] == "RuntimeError: out of memory" and done["ms_per_step"] > 0

    def fail(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(Steps, "__init__", fail)
    code, out, err = call("--models", "falcon-nano", "--rows", "2", "1")
    assert (
        code == 1
        and [case["failed"] for case in json.loads(out.splitlines()[-1])["cases"]] == ["MemoryError: too large"] * 2
    )


def test_a_step_goes_on_from_a_cache_of_the_length_asked_for():
    config = PRESETS["falcon-nano"]
    case = StepCase(2, 40)
    steps = Steps(config, "int8", [case])
    generation = steps.generation(case)
    cache = generation._state.cache
    assert cache.lengths.tolist() == [40, 40] and float(jnp.std(cache.keys[0])) > 0.9
    assert [len(row) for row in generation.next_chunk(3)[0]] == [3, 3]
    assert generation._state.cache.lengths.tolist() == [43, 43]
    limit = case.limit(config, "int8", Rates(1e12, 1.0))
    assert limit.cache_bytes == cache_bytes(config, 2, 40 + 32 * 2 + 32 * 6 // 2, "bfloat16")


def test_a_model_over_two_devices_is_measured_beside_one(call, cpu_devices):
    code, out, err = call(*("--models", "falcon-nano", "--num-layers", "2", "--context", "40", "--tensor", "1", "2"))
    assert code == 0, err
    *printed, last = out.splitlines()
    one, two = json.loads(last)["cases"]
    assert (one["tensor"], two["tensor"]) == (1, 2) and two["ms_per_step"] > 0
    assert two["limit_ms_per_step"] < one["limit_ms_per_step"]
    assert any("R=1 S=40 on 2 devices: " in line for line in printed)


def test_kernels_are_added_up_by_kind():
    events = [Event("fusion_1", None, 3e3), Event("fusion_2", None, 5e3), Event("copy", None, 1e3)]
    assert decode_steps.kernels(events, 2) == [
        {"name": "fusion", "us_a_step": 4.0, "calls_a_step": 1.0, "us_a_call": 4.0},
        {"name": "copy", "us_a_step": 0.5, "calls_a_step": 0.5, "us_a_call": 1.0},
    ]


def test_bad_arguments_are_named():
    for changes, message in [
        ({"models": ("falcon",)}, "--models falcon is unknown"),
        ({"weights": ("int3",)}, "--weights int3 is unknown"),
        ({"rows": (0,)}, "at least 1"),
        ({"context": 0}, "--context is 0"),
        ({"tensor": (1, 99)}, r"--tensor is \(1, 99\); there are"),
        ({"save": "a/b"}, "without a folder"),
    ]:
        with pytest.raises(RequestError, match=message):
            decoding.check(decoding.Arguments(**changes))
