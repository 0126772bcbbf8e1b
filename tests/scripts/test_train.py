"""scripts/train.py and scripts/train_tokenizer.py from the command line: exit codes, one line for what is wrong."""

import json
from pathlib import Path

import pytest

from falcon_jax.checkpoint import load
from falcon_jax.tokenizer import Tokenizer
from tests import commands
from tests.train import toys


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
        return call("train", *(part for pair in chosen.items() for part in pair))

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
        ({"data": "/no/such/folder"}, "'/no/such/folder' is neither a folder nor a tar archive"),
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
    # The progress bar may have begun.
    [line] = [line for line in errors.splitlines() if line and not line.startswith("training:")]
    assert line.startswith("train: ") and said in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"time_budget_s": 5}, "give one of the two"),
        ({"batch_size": 6, "num_micro_batches": 4}, "must divide it"),
        ({"dropout": 1}, "dropout is 1"),
        ({"compute_dtype": "float8"}, "compute_dtype is 'float8'"),
    ],
)
def test_values_out_of_range_are_refused_as_unknown_options_are(train, changes, said):
    code, out, errors = train(**changes)
    assert (code, out) == (2, "")
    assert said in " ".join(errors.replace("│", " ").split())  # tyro draws a box around it


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
        ({"--data": "/no/such/folder"}, "neither a folder nor a tar archive"),
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
