"""scripts/plan.py: a step compiled for GPUs that are not here, and one line for what cannot be planned."""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from falcon_jax.train import flops
from falcon_jax.train.planning import compiler
from falcon_jax.train.planning.job import Job
from tests import commands, models

CONFIG = models.tiny("falcon-40b", num_layers=1)
NUM_LEAVES = 50  # of the state, at least; each is padded to 256 bytes at most
TRAIN = ("--train", "--device", "a100-40", "--batch", 16, "--length", 64)
EIGHT = (*TRAIN, "--gpus", 8, "--fsdp", 2, "--tensor", 2, "--micro-batches", 2)


class Ran(NamedTuple):
    """The one compilation of this file, through the command; and what the command said of it."""

    job: Job
    compiled: compiler.Compiled
    code: int | str | None
    out: str
    errors: str


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG.to_hf()))
    return path


@pytest.fixture(scope="module")
def ran(model) -> Ran:
    if sys.platform != "linux":
        pytest.skip("NVIDIA's compiler runs on Linux")
    kept: list[tuple[Job, compiler.Compiled]] = []
    compile_step = compiler.compile_step

    def keep(job: Job) -> compiler.Compiled:
        kept.append((job, compile_step(job)))
        return kept[0][1]

    out, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        monkeypatch.setattr(compiler, "compile_step", keep)
        code = commands.exit_code(commands.load_script("plan"), monkeypatch, *EIGHT, "--model", model, "--json")
    assert len(kept) == 1, errors.getvalue()
    return Ran(*kept[0], code, out.getvalue(), errors.getvalue())


@pytest.fixture
def call(monkeypatch, capsys, model):
    """Runs the command on the model; returns its exit code, stdout and stderr."""
    script = commands.load_script("plan")

    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        given = arguments if "--model" in arguments else (*arguments, "--model", model)
        return commands.exit_code(script, monkeypatch, *given), *capsys.readouterr()

    return run


def test_a_step_is_compiled_for_eight_gpus_and_fits(ran):
    assert ran.code == 0, ran.out
    *lines, last = ran.out.splitlines()
    record = json.loads(last)
    assert (record["gpus"], record["device"], record["fits"]) == (8, "a100-40", True)
    assert {axis: record["layout"][axis] for axis in ("data", "fsdp", "tensor", "stage")} == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "stage": 1,
    }
    # The program's arguments: the state, exactly as told without compiling; the learning rate; four rows of 65 tokens.
    state_bytes = record["parameter_bytes"] + record["optimizer_bytes"]
    assert ran.compiled.argument_bytes == pytest.approx(state_bytes + 4 + 4 * 65 * 2, abs=256 * NUM_LEAVES)
    assert record["peak_bytes"] > state_bytes > 0
    assert record["spare_bytes"] == record["usable_bytes"] - record["peak_bytes"]
    assert record["rematerializations"] == [] and "involuntary rematerializations: none" in lines
    assert lines[-1].startswith("fits: ") and "compiling the step" in ran.errors


def test_the_collectives_are_those_of_the_mesh(ran):
    found: dict[Any, int] = {}
    for each in ran.compiled.program.collectives:
        assert each.within_machine and each.size == 2 ** len(each.axes)
        found[each.kind, each.axes] = found.get((each.kind, each.axes), 0) + each.count
    assert found["all-gather", ("fsdp",)] and found["reduce-scatter", ("fsdp",)]  # weights, and their gradients
    assert found["all-reduce", ("tensor",)]  # of what projections give in parts
    assert found["reduce-scatter", ("data",)] or found["all-reduce", ("data",)]  # gradients


def test_work_is_counted_as_often_as_it_runs(ran):
    program = ran.compiled.program
    assert program.num_unknown_loops == 0
    needed = flops.train_flops_per_token(CONFIG, 64) * ran.job.num_tokens / 8
    # Computed again: at most the block, whose forward pass is a third of it. And attention kernels make scores twice.
    assert needed <= program.flops <= 1.6 * needed


@pytest.fixture
def compiled_before(monkeypatch, ran) -> list[Job]:
    """Has every step compile to the one that was compiled; the jobs that were asked for."""
    jobs: list[Job] = []

    def known(job: Job) -> compiler.Compiled:
        jobs.append(job)
        return ran.compiled

    monkeypatch.setattr(compiler, "compile_step", known)
    return jobs


def test_a_plan_that_does_not_fit_says_by_how_much(call, ran, compiled_before):
    code, out, _ = call(*EIGHT, "--memory-share", "0.00001", "--json")
    assert code == 1
    *lines, last = out.splitlines()
    over = ran.compiled.peak_bytes - json.loads(last)["usable_bytes"]
    assert json.loads(last)["spare_bytes"] == -over < 0
    assert lines[-1].startswith(f"does not fit: {over / 1e9:.2f} GB ({over / 2**30:.2f} GiB) a GPU too much")


def test_rematerializations_are_counted_and_listed(call, monkeypatch, ran):
    bad = compiler.Rematerialization("{devices=[8]} to {replicated}", "f32[8,64] copy", "step/embed")
    changed = dataclasses.replace(ran.compiled, rematerializations=(bad,))
    monkeypatch.setattr(compiler, "compile_step", lambda job: changed)
    code, out, _ = call(*EIGHT)
    assert code == 0
    assert "rematerializations: 1\n  f32[8,64] copy from {devices=[8]} to {replicated}, step/embed\n" in out


def test_a_search_compiles_the_promising_meshes_and_prints_a_table(call, compiled_before):
    code, out, errors = call(*TRAIN, "--gpus", 16, "--search", "--compile", 3, "--json")
    assert code == 0
    layouts = {tuple(job.layout.sizes.values()) for job in compiled_before}
    assert len(layouts) == len(compiled_before) == 3
    assert all(job.num_devices == 16 for job in compiled_before)
    assert "[3/3] compiled in" in errors
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["data", "fsdp", "tensor", "stage"]
    assert all("fits, " in line for line in lines[1:4]) and lines[4] == ""
    plans = json.loads(lines[-1])["plans"]
    assert [plan["step_s"] for plan in plans] == sorted(plan["step_s"] for plan in plans)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*TRAIN, "--device", "v100"), "device is 'v100'; known are a100-40, a100-80, h100, h200"),
        ((*TRAIN, "--gpus", 100, "--fsdp", 8), "--gpus is 100; fsdp * tensor * stage = 8 must divide it"),
        ((*TRAIN, "--gpus", 8, "--data", 4, "--tensor", 4), "data * fsdp * tensor * stage = 16"),
        ((*TRAIN, "--gpus", 32), "batch is 16 rows; data * fsdp * micro-batches = 32 * 1 = 32 must divide it"),
        ((*TRAIN, "--gpus", 12), "beyond 8 they come in machines of as many"),
        ((*TRAIN, "--stage", 2, "--micro-batches", 2), "1 layers do not fall into 2 stages"),
        ((*TRAIN, "--model", "falcon-2"), "model 'falcon-2' is neither a file nor one of falcon-rw-1b"),
        (("--train", "--gpus", 8), "give --batch"),
        ((*TRAIN, "--search"), "--search takes --gpus"),
        ((*TRAIN, "--search", "--gpus", 7), "no mesh of 7 GPUs divides a batch of 16 rows"),
        (("--search", "--gpus", 8), "--search is for training: add --train"),
        (("--fsdp", 2), "a model that only runs takes --tensor"),
        ((*TRAIN, "--memory-share", 2), "the usable share of memory is 2.0"),
        ((*TRAIN, "--network", 0), "the network's bandwidth is 0 GB/s"),
        ((*TRAIN, "--attention", "nonsense"), "implementation='nonsense' is unknown"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_code_2(call, arguments, said):
    code, out, errors = call(*arguments)
    assert (code, out) == (2, "")
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and said in last


def test_without_a_compiler_the_line_says_how_to_get_one(call, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "FOLDER", tmp_path / "nothing")
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    code, _, errors = call(*EIGHT)
    assert code == 2 and "`make setup` installs it" in errors.splitlines()[-1]


def test_a_model_that_only_runs_is_planned_without_a_compiler(call, monkeypatch):
    monkeypatch.setattr(compiler, "compile_step", lambda job: pytest.fail("compiled"))
    arguments = ("--model", "falcon-40b", "--device", "h100", "--batch", 4, "--length", 8192)
    code, out, _ = call(*arguments)
    assert code == 1 and "does not fit: " in out.splitlines()[-1]
    code, out, _ = call(*arguments, "--tensor", 2, "--json")
    record = json.loads(out.splitlines()[-1])
    assert code == 0 and record["fits"] and record["gpus"] == 2
    assert record["weight_bytes"] == pytest.approx(41.3e9, rel=1e-2)


def test_help_does_not_wait_for_jax(call):
    code, out, _ = call("--help")
    assert code == 0 and "--search" in out
