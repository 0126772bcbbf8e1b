"""scripts/evaluate.py: what it prints, and one line and exit code 2 for what it cannot measure."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from falcon_jax.checkpoint import convert, load
from falcon_jax.model import params as model_params
from falcon_jax.train.data import read_texts
from falcon_jax.train.evaluation import evaluate
from falcon_jax.train.final import write_model
from tests import commands
from tests.train import toys

SCRIPT = commands.SCRIPTS / "evaluate.py"  # some text file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return toys.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, corpus) -> Path:
    base = tmp_path_factory.mktemp("model")
    params = model_params.init(toys.MODEL, jax.random.key(0), jnp.float32)
    write_model(toys.MODEL, params, base / "model", toys.write_tokenizer(base / "tokenizer", corpus))
    return base / "model"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the script in this process; returns its exit code, stdout and stderr."""

    script = commands.load_script("evaluate")

    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        # A cache would last beyond the test, and stay switched on in this process.
        arguments = (*arguments, "--compilation-cache", "off")
        return commands.exit_code(script, monkeypatch, *arguments), *capsys.readouterr()

    return run


def test_every_length_is_measured_by_both_protocols_and_the_last_line_is_json(call, model, corpus):
    code, out, errors = call(
        model, corpus / "valid", "--lengths", 16, 80, "--stride", 16, "--dtype", "float32", "--quiet"
    )
    assert (code, errors) == (0, "")
    *lines, last = out.splitlines()
    document = json.loads(last)
    assert (document["model"], document["dtype"]) == (str(model), "float32")
    # At length 16 a stride of 16 slides nothing.
    results = document["results"]
    assert [(result["length"], result["stride"]) for result in results] == [(16, 16), (80, 80), (80, 16)]
    assert [result["protocol"] for result in results] == ["non-overlapping", "non-overlapping", "sliding"]
    assert len(lines) == 3
    assert [line.endswith("beyond the trained length") for line in lines] == [False, True, True]

    config, params, tokenizer_folder = load(model, dtype="float32")
    assert tokenizer_folder is not None
    split = read_texts(sorted((corpus / "valid").glob("*.txt")), tokenizer_folder)
    assert results == [
        score.record()
        for score in evaluate(config, params, split, [(16, 16), (80, 80), (80, 16)], dtype="float32", progress=False)
    ]


def test_weights_of_few_bits_are_measured_as_they_are_stored_and_rounded_while_loading(call, model, corpus, tmp_path):
    text = corpus / "valid" / "0.txt"
    for calibration in (None, corpus / "train" / "0.txt"):
        convert(model, tmp_path / f"{calibration is None}", weights="int4", calibration=calibration, progress=False)
    found = {}
    for name, folder, weights in [
        ("native", model, "native"),
        ("rounded", model, "int4"),
        ("stored", tmp_path / "True", "int4"),
        ("calibrated", tmp_path / "False", "int4"),
    ]:
        options = ("--weights", weights, "--lengths", 16, "--dtype", "float32", "--quiet")
        code, out, errors = call(folder, text, *options)
        assert (code, errors) == (0, ""), name
        document = json.loads(out.splitlines()[-1])
        assert (document["weights"], document["calibrated"]) == (weights, name == "calibrated")
        found[name] = document["results"][0]["nats_per_token"]
    assert found["rounded"] == found["stored"]
    assert len(set(found.values())) == 3
    code, _, errors = call(tmp_path / "True", text, "--quiet")
    assert code == 2 and "holds int4 weights, and weights='native' was asked for" in errors


def test_progress_goes_to_stderr(call, model, corpus):
    code, out, errors = call(model, corpus / "valid" / "0.txt", "--lengths", 16, "--dtype", "float32")
    assert code == 0
    assert "length 16, stride 16" in errors
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/file"], "/no/such/file does not exist"),
        ([SCRIPT, "--lengths", "0"], "lengths of at least 1"),
        (
            [SCRIPT, "--lengths", "16", "8", "--stride", "9"],
            "--stride is 9; it must be from 1 to the shortest length, 8",
        ),
        ([SCRIPT, "--lengths", "16", "--stride", "0"], "--stride is 0"),
        ([SCRIPT, "--batch-tokens", "0"], "batch_tokens is 0"),
        ([SCRIPT, "--attention", "nonsense"], "implementation='nonsense' is unknown"),
        ([SCRIPT, "--attention", "cudnn"], "implementation='cudnn' cannot run here"),
        ([SCRIPT.parent], "holds no *.txt"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_code_2(call, model, arguments, said):
    if jax.default_backend() == "gpu" and "cudnn" in arguments:
        pytest.skip("cudnn runs on a GPU")
    code, out, errors = call(model, *arguments, "--quiet")
    assert (code, out) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors


def test_a_model_without_a_tokenizer_is_refused(call, tmp_path):
    from falcon_jax.checkpoint.export import export_params

    params = model_params.init(toys.MODEL, jax.random.key(0), jnp.float32)
    export_params(toys.MODEL, params, tmp_path / "bare")
    for model, said in ((tmp_path / "bare", "holds no tokenizer.json"), (tmp_path / "nowhere", "nowhere")):
        code, _, errors = call(model, SCRIPT)
        assert code == 2
        assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors


def test_memory_that_runs_out_is_one_line(call, model, corpus, monkeypatch):
    def run_out(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr("falcon_jax.train.evaluation.evaluate", run_out)
    code, _, errors = call(model, corpus / "valid")
    assert (code, errors) == (2, "error: the device's memory ran out; lower --batch-tokens or --lengths\n")


def test_help_does_not_wait_for_jax(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "--stride" in out
