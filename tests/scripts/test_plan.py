"""scripts/plan.py: a step compiled for GPUs that are not here, and one line for what cannot be planned."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro
import yaml

from falcon_jax.train import flops
from falcon_jax.train.planning import compiler, devices
from falcon_jax.train.planning.job import Job, Layout, state_bytes, unsplit_shares
from falcon_jax.train.recipes import RECIPES
from tests import commands, models

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
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
    vocabulary = CONFIG.vocab_size * CONFIG.width / CONFIG.num_parameters  # 97 entries do not fall into two parts
    assert record["unsplit_shares"] == {"tensor": pytest.approx(vocabulary)}
    assert f"  state not split    {vocabulary:.1%} over tensor 2, which does not divide it" in lines
    assert record["rematerializations"] == [] and "involuntary rematerializations: none" in lines
    assert lines[-1].startswith("fits: ") and "compiling the step" in ran.errors


def test_a_mesh_of_a100s_without_a_tensor_axis_compiles(ran):
    """Attention is cuDNN's there, which no axis may be beside that is XLA's own."""
    config = models.tiny("falcon-7b", num_layers=1, num_heads=4, width=256, mlp_width=256)
    job = Job(config=config, device=devices.DEVICES["a100-40"], layout=Layout(data=8), rows=8, length=128)
    compiled = compiler.compile_step(job)
    assert any(work.kind == "attention" for work in compiled.program.work)
    assert {each.axes for each in compiled.program.collectives} == {("data",)}


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


def test_a_search_on_one_gpu_compiles_several_variants(call, compiled_before):
    code, out, _ = call(*TRAIN, "--gpus", 1, "--search", "--compile", 3)
    assert code == 0 and "could be faster" not in out
    assert len({job.layout for job in compiled_before}) == 3
    first = compiled_before[0].layout
    assert (first.num_devices, first.num_micro_batches, first.remat) == (1, 1, "none")


def test_a_plan_for_one_gpu_says_that_fewer_micro_batches_could_be_faster(call, compiled_before):
    code, out, _ = call(*TRAIN, "--gpus", 1)
    assert code == 0 and compiled_before[0].layout.num_micro_batches == 16
    assert " of the memory is left: fewer --micro-batches or less --remat could be faster\n" in out


def slurm_example() -> tuple[list[str], str, int]:
    """The options of train.py, the share of a GPU's memory that JAX takes, and the GPUs."""
    text = (EXAMPLES / "train.sbatch").read_text()
    words = shlex.split(text[text.index("\nsrun ") : text.index("\ncode=")].replace("\\\n", " "))
    share = re.search(r"^export XLA_PYTHON_CLIENT_MEM_FRACTION=(\S+)", text, re.MULTILINE)
    nodes, gpus = (
        int(*re.findall(rf"^#SBATCH --{name}=(\d+)$", text, re.MULTILINE)) for name in ("nodes", "gpus-per-node")
    )
    assert share is not None
    # Each process ends by itself: the code of all is 3 then, which the requeue waits for.
    assert "--kill-on-bad-exit=0" in words and "--cpus-per-task=$SLURM_CPUS_PER_TASK" in words
    return words[words.index("scripts/train.py") + 1 :], share[1], nodes * gpus


def jobset_example() -> tuple[list[str], str, int]:
    *_, jobset = yaml.safe_load_all((EXAMPLES / "train-jobset.yaml").read_text())
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    # Exit code 2 ends the job with a reason that ends the set.
    (pod_rule,), (set_rule,) = job["podFailurePolicy"]["rules"], jobset["spec"]["failurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod_rule == {"action": "FailJob", "onExitCodes": codes}
    assert (set_rule["action"], set_rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (share,) = container["env"]
    assert share["name"] == "XLA_PYTHON_CLIENT_MEM_FRACTION" and container["workingDir"].startswith("/")
    gpus = job["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    return container["command"][2:], share["value"], gpus


def job_of_run(options: list[str], device: str) -> Job:
    """What train.py would compile."""
    run = commands.load_script("train").parse(["--data", "d", "--output", "o", *options]).run
    layout = Layout(
        data=run.data_parallel,
        fsdp=run.fsdp,
        tensor=run.tensor,
        stage=run.stage,
        num_micro_batches=run.step.num_micro_batches,
        pipeline_rounds=run.step.pipeline_rounds,
        remat=run.remat,
        splits_sequence=run.step.splits_sequence,
    )
    return Job(config=run.model_config(), device=devices.named(device), layout=layout, rows=run.batch_size)


def test_the_plans_in_the_docs_are_of_the_recipes_and_the_examples():
    script, text = commands.load_script("plan"), (EXAMPLES.parent / "planning.md").read_text()
    planned = {}
    for what, options in re.findall(r"^\| (.+?) \| `(--model .+?)` \|", text, re.MULTILINE):
        planned[what.split(",")[0]] = script.job_of(tyro.cli(script.Arguments, args=["--train", *options.split()]))
    for name in RECIPES:
        assert planned.pop(f"recipe {name}") == job_of_run(["--recipe", name], "a100-40")
    assert planned.pop("falcon-7b on 32 H100s") == job_of_run(jobset_example()[0], "h100")
    assert job_of_run(slurm_example()[0], "a100-40") == job_of_run(["--recipe", "falcon-40b"], "a100-40")
    assert list(planned) == ["the same without a pipeline"]


@pytest.mark.parametrize(("example", "device"), [(slurm_example, "a100-40"), (jobset_example, "h100")])
def test_the_examples_run_layouts_whose_state_is_split_and_leaves_room(example, device):
    options, share, num_gpus = example()
    job = job_of_run(options, device)
    assert job.num_devices == num_gpus
    assert state_bytes(job).total < 0.15 * job.device.usable_bytes
    assert unsplit_shares(job).keys() <= {"data"} and job.layout.data in (1, 3)
    assert job.device.usable_share < float(share) == devices.EXAMPLE_SHARE < 1


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
        ((*TRAIN, "--search", "--gpus", 8, "--fsdp", 2), "--fsdp is what --search chooses: leave one of the two out"),
        ((*TRAIN, "--search", "--gpus", 8, "--data", 1), "--data is what --search chooses"),
        ((*TRAIN, "--search", "--gpus", 8, "--remat", "stage"), "--remat is what --search chooses"),
        ((*TRAIN, "--search", "--gpus", 8, "--micro-batches", 2), "--micro-batches is what --search chooses"),
        ((*TRAIN, "--search", "--gpus", 8, "--splits-sequence"), "--splits-sequence is what --search chooses"),
        ((*TRAIN, "--compile", 2), "--compile is for a search: add --search"),
        ((*TRAIN, "--dtype", "float32"), "--dtype is for a model that only runs: leave it out, or --train"),
        ((*TRAIN, "--weights", "native"), "--weights is for a model that only runs"),
        (("--micro-batches", 1), "--micro-batches is for training: add --train"),
        (("--remat", "none"), "--remat is for training: add --train"),
        (("--packed",), "--packed is for training: add --train"),
        (("--attention", "xla"), "--attention is for training: add --train"),
        (("--network", 6.25), "--network is for training: add --train"),
        ((*TRAIN, "--rounds", 2), "rounds is 2, which a pipeline alone has"),
        ((*TRAIN, "--splits-sequence"), "tokens are to be split over tensor, which is 1"),
        ((*TRAIN, "--search", "--gpus", 7), "no mesh of 7 GPUs divides a batch of 16 rows"),
        (("--search", "--gpus", 8), "--search is for training: add --train"),
        (("--batch", 0), "batch is 0; it must be at least 1"),
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
