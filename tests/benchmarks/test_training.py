"""benchmarks/training.py: what is counted and trained, what becomes of those who fail, and the document without a GPU.

How fast anything is stays out of tests.
"""

import dataclasses
import json
import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
    clock,
    command,
    peers,
    places,
    training,
    training_cases,
    training_measure,
    training_ours,
    training_peers,
    training_profile,
    training_report,
)
from benchmarks.clock import Clock
from benchmarks.limits import Rates
from benchmarks.measure import Peak
from benchmarks.training_cases import Bar, Case, Variant, Work
from benchmarks.training_measure import Contestant, Timing
from falcon_jax.config import PRESETS
from falcon_jax.errors import RequestError
from falcon_jax.model import params as model_params
from falcon_jax.model.adapters import LoRA
from tests import benchmarking, models

on_cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a GPU each contestant has its own process")


@pytest.fixture
def call(monkeypatch, tmp_path, capfd):
    """Runs the command in this process on small measurements; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(training_measure, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(training_measure, "NUM_PROFILED", 1)
    return benchmarking.caller(training.run, monkeypatch, capfd, tmp_path / "results", *benchmarking.NO_CACHE)


@on_cpu_only
def test_last_line_says_limit_ours_peer_profile_and_machine(call, tmp_path):
    small = ["--model", "falcon-nano", "--num-layers", "2", "--length", "64", "--batch-size", "2"]
    quick = ["--steps", "1", "--repeats", "2", "--peer", "hf-plain"]
    code, text, errors = call(*small, *quick, "--save", "tiny", "--profile", str(tmp_path / "traces"))
    assert code == 0, errors
    lines = text.splitlines()
    document = json.loads(lines[-1])
    assert json.loads((tmp_path / "results" / "tiny.json").read_text()) == document
    assert lines[0].startswith("limit: 2 layers of falcon-nano, T=64, a step takes")

    (case,) = document["cases"]
    ours, peer = case["results"]
    assert [(result["name"], result["ours"], result["round"]) for result in (ours, peer)] == [
        ("falcon_jax", True, 1),
        ("transformers", False, 1),
    ]
    assert ours["settings"] == {"batch_size": 2, "remat": "none"} and peer["settings"] == {"batch_size": 2}
    for result in (ours, peer):
        assert result["tokens_per_s"] == pytest.approx(2 * 64e3 / result["ms_per_step"])
        flops_a_ms = 2 * 64 * case["flops_a_token"] / result["ms_per_step"]
        assert result["tflops_per_s"] == pytest.approx(flops_a_ms * 1e3 / 1e12)
        assert len(result["steps_s"]) == 2 and result["num_steps"] == 1 + training_measure.WARM_UP_STEPS + 2
        first, last = result["losses"]
        assert last < first  # the same batch again and again
        assert result["share_of_flops_limit"] > 0 and result["peak_gib"] is None and "mfu" not in result
    # Compiled once, by the plan of its memory, and found by the step itself.
    assert ours["first_step_programs"] == {"compiled": 1, "from_cache": 0}
    assert 0 < ours["trace_s"] + ours["compile_s"] < ours["first_step_s"] and ours["planned_gib"] > 0
    assert ours["state_gib"] == pytest.approx(3 * 4 * case["num_parameters"] / 2**30, rel=1e-6)
    assert document["limit"]["flops_per_s"] > 0 and document["table"] is None and "B T (6 P" in document["flops"]
    assert document["versions"]["torch"] and document["device"] and "benchmarks/training.py" in document["command"]

    profile = ours["profile"]
    # Within the case's folder: kept results say nothing of the machine's own paths.
    assert (tmp_path / "traces" / "training" / profile["trace"]).is_file() and profile["kernels_ms"] > 0
    assert {"forward", "backward", "the rest"} <= profile["part_ms"].keys()
    assert 0 < sum(profile["part_ms"].values()) <= 1.001 * profile["kernels_ms"]
    assert any(line.endswith("ms a step  share   calls  place") for line in lines)
    (kept,) = (tmp_path / "traces" / "training").glob("*.txt")
    assert kept.read_text() in text
    row = next(line for line in lines if line.startswith("| falcon_jax, batch_size 2"))
    assert f" {ours['ms_per_step']:.1f} " in row and f"{first:.2f} to" in text


@on_cpu_only
def test_adapters_train_beside_a_frozen_model():
    work = Work(models.tiny("falcon-7b", num_layers=1), 16, LoRA())
    contestant = training_ours.Ours(work, Variant(batch_size=2, weights="int4"), "cpu")
    trainer = contestant.load()
    trainer.first_step()
    trainer.take(5)
    first, *_, last = trainer.losses()
    assert last < first
    state, (frozen, tokens, _) = trainer.state, trainer.arguments
    assert tokens.shape == (1, 2, 17) and model_params.weights_of(frozen) == "int4"
    assert trainer.found["state_gib"] < model_params.num_bytes(frozen) / 2**30
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}


def test_flops_are_counted_by_hand():
    config = models.tiny("falcon-rw-1b")  # biases, norms and a tied head
    leaves = jax.tree.leaves(model_params.abstract(config, "float32"))
    num_parameters = sum(leaf.size for leaf in leaves)
    # Forward 2 and backward 4 a parameter; scores and values 2 each a key and dimension, half of the keys, thrice.
    T, NH, L = 10, config.num_heads * config.head_dim, config.num_layers
    for lora, a_parameter in ((None, 6), (LoRA(), 4)):
        work = Work(config, T, lora)
        assert work.flops(3) == 3 * T * (a_parameter * num_parameters + L * 3 * 2 * (2 * NH) * T / 2)
    work = Work(PRESETS["falcon-rw-1b"], 2048)
    assert work.flops(16) == 16 * 2048 * (6 * 1_311_625_216 + 6 * 24 * 2048 * 2048)
    assert work.model_flops(16) == pytest.approx(work.flops(16), rel=1e-3) and work.model_flops(16) < work.flops(16)
    assert work.update_bytes() == 24 * 1_311_625_216
    assert work.tokens(2).shape == (2, 2049) and (work.tokens(2) == work.tokens(2)).all()


def test_the_table_is_measured_at_the_sizes_of_its_bars():
    cases = {case.name: case for case in training_cases.bars()}
    found = {name: (case.work.config.num_layers, case.work.length, case.peer_rows) for name, case in cases.items()}
    assert found == {
        "rw-1b": (24, 2048, {peers.COMPILED: 16, peers.PLAIN: 8}),
        "7b-width": (8, 2048, {peers.COMPILED: 4, peers.PLAIN: 4}),
        "7b-lora": (32, 512, {}),
    }
    assert cases["7b-width"].what == "8 layers of falcon-7b, T=2048"
    assert cases["7b-lora"].what == "falcon-7b LoRA, T=512"
    assert [variant.weights for variant in cases["7b-lora"].variants] == ["native", "int4", "int8"]
    lora = cases["7b-lora"].work.lora
    assert lora is not None and (lora.rank, lora.targets) == (16, ("query_key_value",))


def test_variants_are_settings_by_name():
    assert command.parse_variant("batch-size=32,remat=block,z_loss=0,decay_embedding=false") == {
        "batch_size": 32,
        "remat": "block",
        "z_loss": 0,
        "decay_embedding": False,
    }
    variant = Variant.of({"batch_size": 32, "num_micro_batches": 2, "remat": "block", "z_loss": 0})
    assert (variant.forward.remat, variant.step.num_micro_batches, variant.step.z_loss) == ("block", 2, 0.0)
    assert variant.settings == {"batch_size": 32, "remat": "block", "num_micro_batches": 2, "z_loss": 0.0}
    assert Variant.of(variant.settings) == variant


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "falcon-9b"], "--model falcon-9b is unknown; presets are falcon-rw-1b"),
        (["--length", "0"], "--length is 0; it must be at least 1"),
        (["--save", "../x"], "--save is '../x'"),
        (["--peer", "none", "--no-ours"], "leaves nobody to measure"),
        (["--no-ours", "--profile", "x"], "--profile is of ours"),
        (["--lora"], "--cases 7b-lora"),
        (["--model", "falcon-nano", "--cases", "rw-1b"], "--cases are the table's"),
        (["--variants", "32"], "'32' is not name=value"),
        (["--variants", "batch=32"], "a variant's batch is unknown; known are batch_size, weights"),
        (["--variants", "batch_size=many"], "batch_size is 'many'; it must be int"),
        (["--variants", "remat=half"], "remat='half' is unknown"),
        (["--variants", "remat=stage"], "remat 'stage' is for a pipeline"),
        (["--variants", "num_micro_batches=3"], "batch_size is 16; it must be a multiple of num_micro_batches, 3"),
        (["--variants", "weights=int8"], "weights of few bits are a frozen model's"),
        (["--variants", "weights=int2"], "weights is 'int2'; supported: 'native'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(call, arguments, said):
    code, text, errors = call(*arguments)
    assert (code, text) == (2, "") and errors.count("\n") == 1 and said in errors


# Who fails, and how.


class FakeTrainer:
    def __init__(self, fails: str | None):
        self.fails = fails
        self.found: dict[str, Any] = {"planned_gib": 200.0}
        self.num_steps = 0

    def first_step(self) -> None:
        if self.fails == "memory":
            jax.block_until_ready(jax.jit(lambda: jnp.ones(2**46, jnp.int8) + 1)())
        if self.fails == "else":
            raise RuntimeError("the kernel is wrong")
        self.take(1)

    def take(self, num_steps: int) -> None:
        self.num_steps += num_steps

    def wait(self) -> None: ...

    def losses(self) -> list[float]:
        return [3.0, *[float("nan") if self.fails == "nan" else 2.0] * (self.num_steps - 1)]

    def peak(self) -> Peak | None:
        return Peak(3 * 2**30, is_upper_bound=True)

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Fake(Contestant):
    name: str
    ours: bool  # pyright: ignore[reportIncompatibleVariableOverride]
    fails: str | None = None
    rows: int = 4
    platform: str = "cpu"
    work: ClassVar[Work] = Work(PRESETS["falcon-nano"], 8)

    @property
    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.rows}

    def load(self) -> FakeTrainer:
        return FakeTrainer(self.fails)


def compete(contestant: Contestant, place: places.Place = places.here) -> dict[str, Any]:
    return training_measure.compete(contestant, Timing(steps=2, repeats=3), place, lambda line: None)


def test_what_lacks_memory_is_a_result_of_ours_too():
    found = compete(Fake("falcon_jax", True, "memory"))
    assert found["failed"].startswith("JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating")
    assert found["out_of_memory"] and found["planned_gib"] == 200
    assert training_measure.describe(found).startswith("out of memory (planned: 200.0 GiB): JaxRuntimeError")
    good = compete(Fake("falcon_jax", True))
    assert good["losses"] == [3.0, 2.0] and good["num_steps"] == 1 + 3 + 3 * 2
    assert good["peak_gib"] == 3 and "peak at most 3.00 GiB" in training_measure.describe(good)


def test_a_process_that_dies_is_a_result():
    def dying(function, *arguments, say):
        raise places.ProcessDiedError("its process ended with exit code -9")
        yield

    found = compete(Fake("transformers", False), dying)
    assert found["out_of_memory"] and found["failed"].startswith("ProcessDiedError")

    def dying_later(function, *arguments, say):
        yield from places.here(function, *arguments, say=say)
        raise places.ProcessDiedError("its process ended with exit code 1")

    found = compete(Fake("falcon_jax", True), dying_later)
    assert found["ms_per_step"] >= 0 and "exit code 1" in found["profile_failed"] and "failed" not in found


def test_exit_code_is_1_where_ours_failed_for_another_reason_or_nothing_of_ours_fits():
    def failures(*results: dict[str, Any]) -> list[str]:
        return training_report.failures({"cases": [{"name": "a case", "results": results}]})

    good, large = compete(Fake("falcon_jax", True)), compete(Fake("falcon_jax", True, "memory", rows=64))
    wrong, peer = compete(Fake("falcon_jax", True, "else")), compete(Fake("transformers", False, "else"))
    assert failures(good, large, peer) == []
    assert failures(good, wrong, peer) == ["a case: falcon_jax, batch_size 4: RuntimeError: the kernel is wrong"]
    assert len(failures(large, peer)) == 1 and "batch_size 64: JaxRuntimeError" in failures(large, peer)[0]
    assert failures(training_measure.record(Fake("falcon_jax", True)) | {"left_out": "late"}) == []
    (not_finite,) = failures(compete(Fake("falcon_jax", True, "nan")))
    assert "ArithmeticError: the loss is not finite: 3.0 at first, nan after 10 steps" in not_finite


def test_nobody_begins_who_would_not_be_done_in_time(monkeypatch):
    now = iter([100.0, 130.0, 140.0, 140.0, 140.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    late = Clock(100.0, 65.0)
    with late.running("falcon_jax"):  # from 100 to 130
        pass
    assert late.is_late("falcon_jax") and late.is_late("transformers")  # at 140, and 30 more
    late.slowest_s["transformers"] = 20.0
    assert not late.is_late("transformers")


@on_cpu_only
def test_a_peer_asks_jax_for_no_device(monkeypatch):
    def refuse(*arguments: Any, **options: Any):
        raise AssertionError("JAX would take memory")

    work = Work(models.tiny("falcon-rw-1b", num_layers=1), 8)
    (peer,) = training_peers.transformers(Case("a case", "", work, (), {peers.PLAIN: 2}), (peers.PLAIN,), "cpu")
    for name in ("devices", "local_devices", "default_backend", "device_put"):
        monkeypatch.setattr(jax, name, refuse)
    found = compete(peer)
    assert found["losses"][1] < found["losses"][0] and found["num_steps"] == 10


# The bars.


def result(name: str, rows: int, tokens_per_s: float, peak_gib: float, number: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "ours": name == "falcon_jax",
        "settings": {"batch_size": rows} | more,
        "round": number,
        "tokens_per_s": tokens_per_s,
        "ms_per_step": 1.0,
        "tflops_per_s": 1.0,
        "model_tflops_per_s": 1.0,
        "share_of_flops_limit": 0.5,
        "peak_gib": peak_gib,
        "first_step_s": 9.0,
        "losses": [3.0, 2.0],
    }


def test_a_bar_takes_our_best_variant_and_the_median_of_rounds():
    case = dataclasses.replace(training_cases.bars()[0], bars=(Bar("tokens_per_s", 60e3), Bar("peak_gb", 9, "int4")))
    results = [
        result("falcon_jax", 16, 61e3, 80),
        result("falcon_jax", 32, 66e3, 120),
        result("transformers compiled", 16, 30e3, 90),
        {"name": "transformers", "ours": False, "settings": {"batch_size": 8}, "round": 1}
        | {"failed": "why", "out_of_memory": True},
        result("falcon_jax", 32, 64e3, 121, 2),
        result("falcon_jax", 1, 1e3, 10, weights="int4"),
    ]
    speed, memory = training_report.bars(case, results)
    assert speed["best"]["falcon_jax"] == {"value": 65e3, "settings": {"batch_size": 32}}
    assert speed["reached"] and speed["ratios"] == {"transformers compiled": pytest.approx(65 / 30)}
    assert memory["best"]["falcon_jax"]["value"] == pytest.approx(10.737, rel=1e-3) and memory["reached"] is False
    assert memory["ratios"]["transformers compiled"] == pytest.approx(9)

    entry = {"what": case.what, "results": results, "bars": [speed, memory]}
    lines = training_report.bar_lines({"cases": [entry]})
    assert "at least 60,000 tokens/s" in lines[3] and "65,000 tokens/s (batch_size 32)" in lines[3]
    assert "| yes " in lines[3] and ": x 2.17" in lines[3] and "at most 9.00 GB" in lines[4] and "| no " in lines[4]
    table = training_report.case_lines(entry, "a GPU")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert ["falcon_jax, batch_size 32, round 2", "1.0", "64,000", "1.0", "50.0%", "121.00"] in [
        row[:6] for row in rows
    ]
    assert "transformers, batch_size 8, round 1: why" in table


def test_a_limit_is_the_least_time_of_a_step():
    case = training_cases.bars()[0]
    rates = Rates(memory_bytes_per_s=4e12, flops_per_s=800e12)
    found = training_report.with_limits(result("falcon_jax", 16, 60e3, 80), case, rates, 989e12)
    assert found["flops_limit_ms"] == pytest.approx(1e3 * case.work.flops(16) / 800e12)
    assert found["share_of_flops_limit"] == pytest.approx(found["flops_limit_ms"]) and found["mfu"] > 0
    assert found["update_limit_ms"] == pytest.approx(1e3 * 24 * 1_311_625_216 / 4e12)
    assert len(training_report.limit_lines(case, rates)) == 2


# The profile.

TRACE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #7(Compute)"
    events { metadata_id: 1 duration_ps: 2000000 stats { metadata_id: 1 ref_value: 2 } }
    events { metadata_id: 2 duration_ps: 3000000 stats { metadata_id: 1 str_value: "fusion.2" } }
    events { metadata_id: 3 duration_ps: 1000000 stats { metadata_id: 3 int64_value: 5 } }
  }
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 2000000 } }
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion_12" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion_3" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "loop_add_fusion.12" } }
  stat_metadata { key: 3 value { id: 3 name: "correlation_id" } }
}
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 9000000 } } }
"""
PROGRAM = """HloModule jit_train_step, is_scheduled=true

FileNames
1 "/a/falcon_jax/train/step.py"
2 "/a/falcon_jax/model/decoder.py"
3 "/a/site-packages/optax/transforms.py"

FunctionNames
1 "make_train_step.<locals>.train_step"
2 "MLP.__call__"
3 "update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

ENTRY %main {
  %loop_add_fusion.12 = bf16[8,4]{1,0} fusion(%a), calls=%b, metadata={op_name="jit(f)/transpose(jvp(layer_3))/mul" stack_frame_id=2}
  ROOT %fusion.2 = (f32[8]{0}, /*index=1*/f32[]) fusion(%a), kind=kLoop, metadata={op_name="jit(f)/add" stack_frame_id=3}
  %other = f32[] add(%a, %b)
}
"""  # noqa: E501


def test_kernels_of_a_gpus_trace_are_added_up_by_name_and_by_place(tmp_path):
    trace = tmp_path / "host.xplane.pb"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trace.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(TRACE))
    found = training_profile.summary(trace, PROGRAM, num_steps=2)
    assert found["kernels_ms"] == pytest.approx(3e-3)
    assert [(row["name"], row["ms"], row["calls"]) for row in found["by_kernel"]] == [
        ("loop_add_fusion", 0.0025, 1.0),
        ("MemcpyD2D", 0.0005, 0.5),
    ]
    assert [row["name"] for row in found["by_place"]] == [
        "the rest      make_train_step: add (f32[8],f32[])",
        "backward      make_train_step > MLP: mul bf16[8,4]",
    ]
    assert found["part_ms"] == {"backward": pytest.approx(1e-3), "the rest": pytest.approx(1.5e-3)}
    lines = training_profile.lines("a title", found | {"ms_per_step": 0.004})
    assert any("50.0%" in line and "make_train_step: add" in line for line in lines)


@on_cpu_only
def test_a_real_trace_names_the_operations_of_the_program(tmp_path):
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))))
    arrays = jnp.ones((64, 64)), jnp.ones((64, 64))
    program = step.lower(*arrays).compile().as_text()
    assert program is not None
    jax.block_until_ready(step(*arrays))
    trace = training_profile.record(lambda: jax.block_until_ready(step(*arrays)), tmp_path)
    assert trace.name.endswith(".xplane.pb") and trace.is_relative_to(tmp_path / "plugins" / "profile")
    events = training_profile.read(trace)
    known = training_profile.places(program)
    assert events and {event.operation for event in events} <= known.keys()
    assert {known[str(event.operation)].part for event in events} >= {"forward", "backward"}


def test_numbers_at_the_end_of_a_kernels_name_do_not_count():
    names = ["loop_add_fusion_12", "gemm_fusion_dot.71.0", "nvjet_hsh_128x256_64x4", "fusion", "cutlass_80_tn_align8"]
    kinds = ["loop_add_fusion", "gemm_fusion_dot", "nvjet_hsh_128x256_64x4", "fusion", "cutlass_80_tn_align8"]
    assert [training_profile.without_numbers(name) for name in names] == kinds
    assert training_profile.folder_name("falcon_jax batch_size 4, remat none") == "falcon_jax_batch_size_4_remat_none"


def test_refused_settings_are_the_users_errors():
    with pytest.raises(RequestError, match="num_micro_batches is 0; it must be at least 1"):
        Variant.of({"num_micro_batches": 0})
