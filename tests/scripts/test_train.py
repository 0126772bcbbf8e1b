"""scripts/train.py and scripts/train_tokenizer.py from the command line: exit codes, one line for what is wrong."""

import dataclasses
import json
import re
import shlex
import types
import typing
from pathlib import Path

import jax
import pytest
import yaml

from falcon_jax import sharding
from falcon_jax.checkpoint import load
from falcon_jax.tokenizer import Tokenizer
from falcon_jax.train.recipes import RECIPES
from tests import commands
from tests.train import toys

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return toys.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, corpus) -> Path:
    return toys.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), corpus)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script in this process; returns its exit code, stdout and stderr."""

    def run(name: str, *arguments: object) -> tuple[int | str | None, str, str]:
        code = commands.exit_code(commands.load_script(name), monkeypatch, *arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def train(call, tmp_path, corpus, tokenizer_folder):
    """Trains the toy model; later options win over the first ones."""
    model = tmp_path / "config.json"
    model.write_text(json.dumps(toys.MODEL.to_hf()))
    settings = {
        "--data": corpus,
        "--output": tmp_path / "run",
        "--model": model,
        "--tokenizer": tokenizer_folder,
        "--steps": 4,
        "--batch-size": 8,
        "--length": 32,
        "--warmup-steps": 1,
        "--log-every": 1,
        "--compute-dtype": toys.STEP.compute_dtype,
        "--loss-chunk-tokens": toys.STEP.loss_chunk_tokens,
        "--dropout": toys.STEP.dropout,
    }

    def run(**changes: object) -> tuple[int, str, str]:
        settings["--compilation-cache"] = "off"  # a cache would stay switched on in this process
        chosen = settings | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        return call("train", *(part for pair in chosen.items() for part in pair if part is not None))

    return run


def test_a_run_stops_when_told_is_resumed_by_the_same_command_and_ends_with_a_model(train, tmp_path):
    run = tmp_path / "run"
    code, out, _ = train(max_seconds=0.001)
    assert code == 0
    assert out == f"{run}: checkpoint of step 1; the same command goes on from there; not validated yet\n"
    code, out, errors = train()
    assert code == 0
    assert out.startswith(f"{run / 'model'}: 4 steps; best on validation ")
    assert "goes on from the checkpoint of step 1" in errors
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    loaded = load(run / "model")
    assert loaded.config == toys.MODEL
    assert loaded.tokenizer_folder is not None
    assert Tokenizer.from_folder(loaded.tokenizer_folder).vocab_size == toys.VOCAB_SIZE


def test_a_signal_is_exit_code_3_with_a_checkpoint(train, tmp_path, monkeypatch):
    from falcon_jax.train import loop

    # The signal itself is sent in tests/train/test_loop.py.
    monkeypatch.setattr(loop.Trainer, "run", lambda self: loop.Result(7, False, True, 1.5, 5))
    code, out, _ = train()
    assert code == 3
    assert "checkpoint of step 7" in out and "best on validation 1.5000 bits a byte after step 5" in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "/no/such/folder"}, "/no/such/folder does not exist; give a text file, a folder, a tar archive"),
        ({"model": "falcon-9"}, "model 'falcon-9' is neither a file nor one of"),
        ({"tokenizer": "/no/such/folder"}, "/no/such/folder/tokenizer.json does not exist"),
        ({"length": 1_000_000}, "length is 1000000, but the train split has only"),
        ({"attention": "nonsense"}, "implementation='nonsense' is unknown; known are"),
        ({"tensor": 64}, "there are only 8 devices"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_code_2(train, changes, said):
    code, out, errors = train(**changes)
    assert (code, out) == (2, "")
    # Progress bars may have begun.
    [line] = [line for line in errors.splitlines() if line and not line.startswith(("tokenizing:", "training:"))]
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"time_budget_s": 5}, "give one of the three"),
        ({"batch_size": 6, "num_micro_batches": 4}, "must divide it"),
        ({"dropout": 1}, "dropout is 1"),
        ({"compute_dtype": "float8"}, "compute_dtype is 'float8'"),
    ],
)
def test_values_out_of_range_are_refused_as_unknown_options_are(train, changes, said):
    code, out, errors = train(**changes)
    assert (code, out) == (2, "")
    assert said in " ".join(errors.replace("│", " ").split())  # tyro draws a box around it


def test_tokens_can_be_made_before_the_run(train, tmp_path):
    code, out, _ = train(tokenize_only=None, tensor=64)  # more devices than there are
    assert code == 0
    assert out.startswith(f"{tmp_path / 'run' / 'tokens'}: tokens, ") and " to train, " in out and " to valid" in out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json", "tokens"]
    code, _, errors = train()
    assert code == 0 and "tokenizing" not in errors


@pytest.mark.parametrize("equals", [True, False])
def test_a_recipe_stands_where_no_option_says_otherwise(equals):
    recipe = ["--recipe=falcon-7b"] if equals else ["--recipe", "falcon-7b"]
    parse = commands.load_script("train").parse
    plain = parse(["--data", "d", "--output", "o", *recipe]).run
    assert (plain.model, plain.tokens, plain.batch_size, plain.step.weight_decay) == (
        "falcon-7b",
        15 * 10**11,
        2304,
        0.1,
    )
    assert plain.learning_rate * plain.min_rate_ratio == pytest.approx(1.2e-5)
    words = ["--batch-size", "24", "--steps=70", "--warmup_steps", "5", "--data-parallel", "2", "--fsdp", "1"]
    words += ["--stage", "1", "--remat", "none"]
    changed = parse(["--data", "d", "--output", "o", *words, *recipe]).run
    assert (changed.batch_size, changed.data_parallel, changed.stage, changed.length) == (24, 2, 1, 2048)
    assert (changed.steps, changed.tokens, changed.warmup_steps, changed.warmup_tokens) == (70, None, 5, None)
    assert (changed.learning_rate, changed.ramp_tokens, changed.ramp.start_rows) == (6e-4, 30 * 10**9, 2)


def test_what_a_run_would_not_get_to_is_said_before_it_begins(capsys, tmp_path, corpus, tokenizer_folder):
    module, train_config = commands.load_script("train"), toys.run_config(tmp_path, corpus, tokenizer_folder)
    trainer = types.SimpleNamespace(total_steps=4, mesh=None, model_config=toys.MODEL)
    module.say_what_is_idle(dataclasses.replace(train_config, warmup_steps=4), trainer)
    assert capsys.readouterr().err == ""
    module.say_what_is_idle(dataclasses.replace(train_config, warmup_steps=5), trainer)
    assert "warm-up takes 5 steps and the run has 4" in capsys.readouterr().err

    # Widths of 32 fall into 8 parts and not into 5.
    for size, said in ((8, False), (5, True)):
        trainer.mesh = sharding.make_mesh(data=size, devices=range(8))
        module.say_what_is_idle(train_config, trainer)
        assert ("lie whole along data, whose size 5" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lora-rank", "4"], "lora_rank is for a run with lora"),
        (["--ramp-start-rows", "8"], "ramp_start_rows is for a run with ramp_tokens"),
        (["--pipeline-rounds", "2"], "pipeline_rounds is for a run with stage above 1"),
        (["--splits-sequence"], "splits_sequence is for a run with tensor above 1"),
        (["--remat-layers", "2"], "remat_layers is for a run with remat"),
        (["--remat", "block", "--remat-layers", "0"], "remat_layers is 0"),
        (["--seed", "99999999999999999999"], "seed is 99999999999999999999; it must be from 0 to 4294967295"),
        (["--max-grad-norm", "-1"], "max_grad_norm is -1.0"),
        (["--learning-rate", "nan"], "learning rate nan must be a number above 0"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(call, options, said):
    code, out, errors = call("train", "--data", "d", "--output", "o", "--steps", "3", *options)
    assert (code, out) == (2, "")
    assert said in " ".join(line.strip("│ ") for line in errors.splitlines())


def test_memory_that_runs_out_is_one_line(train, monkeypatch):
    from falcon_jax.train import loop

    def run_out(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(loop.Trainer, "run", run_out)
    code, _, errors = train()
    assert code == 2
    assert "error: the device's memory ran out; lower --batch-size, raise --num-micro-batches" in errors


def options_of_sbatch() -> tuple[list[str], int]:
    text = (EXAMPLES / "train.sbatch").read_text()
    command = re.search(r"^srun .*?scripts/train.py(.*?)^code=", text, re.DOTALL | re.MULTILINE)
    assert command is not None
    nodes, gpus = (
        int(*re.findall(rf"^#SBATCH --{name}=(\d+)$", text, re.MULTILINE)) for name in ("nodes", "gpus-per-node")
    )
    return shlex.split(command[1].replace("\\\n", " ")), nodes * gpus


def options_of_jobset() -> tuple[list[str], int]:
    *_, jobset = yaml.safe_load_all((EXAMPLES / "train-jobset.yaml").read_text())
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    python, script, *options = container["command"]
    assert (python, script, job["completions"]) == ("python", "scripts/train.py", job["parallelism"])
    return options, job["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("read", [options_of_sbatch, options_of_jobset])
def test_the_examples_are_runs_on_all_the_gpus_they_ask_for(read):
    options, num_gpus = read()
    arguments = commands.load_script("train").parse(options)
    assert arguments.distributed
    assert arguments.run.num_devices == num_gpus
    assert (arguments.run.tokens or 0) >= 10**12


def test_the_recipes_are_named_in_the_options():
    choices = typing.get_args(typing.get_type_hints(commands.load_script("train").Arguments)["recipe"])
    assert typing.get_args(choices[0]) == tuple(RECIPES)


def test_processes_join_before_anything_else_or_say_why_not(train, monkeypatch):
    calls = []

    def initialize() -> None:
        calls.append(jax.config.jax_enable_preemption_service)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    before = jax.config.jax_enable_preemption_service
    try:
        code, out, errors = train(distributed=None)
    finally:
        jax.config.update("jax_enable_preemption_service", before)
    assert (code, out, calls) == (2, "", [False])
    assert errors.startswith("error: --distributed: coordinator_address should be defined.: start one process")
    assert errors.count("\n") == 1


def test_another_run_in_the_output_folder_is_left_alone(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"batch_size": 16}))
    code, _, errors = train()
    assert code == 2
    assert "holds a run with" in errors


def test_a_vocabulary_is_learned_and_measured(call, corpus, tmp_path):
    arguments = ("--data", corpus, "--vocab-size", 280, "--max-tokens", 64)
    code, out, errors = call("train_tokenizer", *arguments, "--output", tmp_path)
    assert (code, errors) == (0, "")
    assert out.startswith(f"{tmp_path}: 280 entries, ") and out.endswith(" bytes a token on the validation split\n")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == 280
    text = (corpus / "valid" / "0.txt").read_bytes().decode()
    rate = len(text.encode()) / len(tokenizer.encode(text))
    assert float(out.split()[3]) == pytest.approx(rate, rel=0.1)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--data": "/no/such/folder"}, "/no/such/folder does not exist"),
        ({"--vocab-size": 100}, "vocab_size is 100"),
        ({"--vocab-size": 100_000}, "the texts give only"),
    ],
)
def test_a_vocabulary_that_cannot_be_learned_is_one_line_and_code_2(call, corpus, tmp_path, changes, said):
    options = {"--data": corpus, "--output": tmp_path, **changes}
    code, out, errors = call("train_tokenizer", *(part for pair in options.items() for part in pair))
    assert (code, out) == (2, "")
    assert errors.startswith("train_tokenizer: ") and errors.count("\n") == 1 and said in errors
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("script", ["train", "train_tokenizer"])
def test_help_and_unknown_options(call, script):
    code, out, _ = call(script, "--help")
    assert code == 0
    assert "--output" in out
    assert call(script, "--otput", "x")[0] == 2
