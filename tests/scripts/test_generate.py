"""scripts/generate.py: prompts from anywhere, one line and exit code 2 for what cannot be served."""

import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import falcon_jax.commands
from tests import commands, hf_models

SCRIPT = commands.SCRIPTS / "generate.py"


@pytest.fixture(scope="module")
def script():
    return commands.load_script("generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = hf_models.tiny_config("falcon-7b", vocab_size=320, eos_token_id=0)
    hf_models.save_model(hf_models.make_model(config), folder)
    hf_models.tiny_tokenizer(folder)
    return folder


@pytest.fixture
def call(script, folder, monkeypatch, capfd):
    """Runs the script in this process; returns its exit code, stdout and stderr."""

    # To compile ahead, descriptions stand for arrays, which the annotations that tests check do not take. What it does
    # is tested in processes without those checks (test_start_up.py).
    monkeypatch.setattr(falcon_jax.commands, "generation_programs", lambda *_, **__: ())

    def run(*arguments: str, stdin: bytes = b"", model: str | None = str(folder)) -> tuple[int, str, str]:
        # A cache would last beyond the test, and stay switched on in this process.
        options = [] if "--compilation-cache" in arguments else ["--compilation-cache", "off"]
        options += [] if model is None else ["--model", model]
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, *options])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with warnings.catch_warnings():  # the script replaces showwarning
            code = script.run()
        return code, *capfd.readouterr()

    return run


def test_argument_file_and_stdin_give_the_same_text(call, tmp_path):
    (tmp_path / "prompt.txt").write_text("The lighthouse\n")
    code, text, errors = call("The lighthouse", "--max-new-tokens", "12")
    assert (code, errors) == (0, "") and len(text) > 1
    assert call("--file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "12")[1] == text
    assert call("--max-new-tokens", "12", stdin=b"The lighthouse\r\n")[1] == text


def test_full_text_begins_with_the_prompt(call):
    _, text, _ = call("The lighthouse", "--max-new-tokens", "12")
    assert call("The lighthouse", "--max-new-tokens", "12", "--full-text")[1] == "The lighthouse" + text


def test_json_is_one_document_with_everything(call):
    flags = ["--max-new-tokens", "12", "--dtype", "float32", "--temperature", "0.9", "--top-p", "0.9", "--seed", "3"]
    code, text, _ = call("The sea", *flags, "--json", "--num-samples", "2")
    document = json.loads(text)
    assert code == 0 and document["prompt"] == "The sea"
    assert [completion["sample_index"] for completion in document["completions"]] == [0, 1]
    for completion in document["completions"]:
        assert len(completion["token_ids"]) == len(completion["logprobs"]) <= 12
        assert completion["finish_reason"] in ("stop", "length") and isinstance(completion["text"], str)
    assert {"import_s", "load_s", "generate_s", "num_tokens", "tokens_per_s"} <= document["timing"].keys()
    # The same seed again, streamed.
    assert call("The sea", *flags)[1] == document["completions"][0]["text"] + "\n"


def test_speculation_prints_the_same_text_and_says_what_it_was_worth(call):
    flags = ["--max-new-tokens", "30", "--dtype", "float32"]
    _, plain, _ = call("The sea, the sea, the", *flags)
    code, text, errors = call("The sea, the sea, the", *flags, "--speculate", "4")
    assert (code, text) == (0, plain)
    said = re.fullmatch(r"speculate: (\d+) tokens after the first in (\d+) steps, (\d\.\d\d) tokens a step\n", errors)
    assert said and int(said[2]) <= int(said[1]) <= 29 and float(said[3]) == round(int(said[1]) / int(said[2]), 2)
    _, document, errors = call("The sea, the sea, the", *flags, "--speculate", "4", "--json")
    [completion] = json.loads(document)["completions"]
    assert completion["text"] + "\n" == plain and completion["num_steps"] == int(said[2])
    assert errors == said[0]


def test_stop_may_be_given_several_times(call):
    _, text, _ = call("The sea", "--max-new-tokens", "20")
    stop = text[4:6]
    _, stopped, _ = call("The sea", "--max-new-tokens", "20", "--stop", "never there", "--stop", stop)
    assert stopped == text[: text.index(stop)] + "\n"


def test_several_samples_are_told_apart(call):
    _, text, _ = call("The sea", "--max-new-tokens", "4", "--temperature", "1", "--num-samples", "2")
    assert "--- sample 1 of 2\n" in text and "--- sample 2 of 2\n" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["x", "--file", "y"], "there are two prompts"),
        (["--file", "no-such-file"], "no-such-file cannot be read"),
        (["x", "--temperature", "-1"], "temperature=-1.0 is out of range"),
        (["x", "--top-k", "0"], "top_k=0 is out of range"),
        (["x", "--top-p", "1.5"], "top_p=1.5 is out of range"),
        (["x", "--min-p", "-1"], "min_p=-1.0 is out of range"),
        (["x", "--repetition-penalty", "0"], "repetition_penalty=0.0 is out of range"),
        (["x", "--max-new-tokens", "0"], "max_new_tokens=0 is out of range"),
        (["x", "--max-new-tokens", "1000000"], "the cache cannot hold 1000001 tokens a row"),
        (["x", "--max-new-tokens", "40", "--max-cache-tokens", "30"], "the cache cannot hold 41 tokens a row"),
        (["x", "--num-samples", "0"], "num_samples=0 is out of range"),
        (["x", "--seed", "-1"], "seed=-1 is out of range"),
        (["x", "--speculate", "17"], "speculate=17 is out of range"),
        (["x", "--stop", ""], "stop='' is not a stop string"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_code_2(call, arguments, said):
    code, text, errors = call(*arguments)
    assert code == 2
    assert text == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors


@pytest.mark.parametrize("model", ["/no/such/folder", "no-such-organisation/no-such-model", str(SCRIPT)])
def test_model_that_is_not_there_is_one_line_and_code_2(call, model):
    code, text, errors = call("x", model=model)
    assert (code, text) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1 and model in errors


def test_stdin_that_is_not_utf8_is_named(call):
    code, _, errors = call(stdin=b"\xff\xfe")
    assert code == 2 and "not UTF-8" in errors


def test_warnings_are_one_line(call):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, errors = call("a " * 70, "--max-new-tokens", "2")
    assert code == 0
    assert errors.startswith("warning: ") and errors.count("\n") == 1


def test_cache_that_cannot_be_written_is_one_warning(call, tmp_path):
    _, text, _ = call("The sea", "--max-new-tokens", "2")
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "cache")
    code, same, errors = call("The sea", "--max-new-tokens", "2", "--compilation-cache", path)
    assert (code, same) == (0, text)
    assert errors.startswith("warning: compiled programs are not kept for the next run: ")
    assert errors.count("\n") == 1 and path in errors
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_interrupt_is_quiet(call, script, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "main", interrupt)
    assert call("x") == (130, "", "")


def test_reader_that_goes_away_is_no_error(folder):
    command = [sys.executable, str(SCRIPT), "The sea", "--model", str(folder), "--max-new-tokens", "40"]
    command += ["--compilation-cache", "off"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=SCRIPT.parents[1])
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_help_does_not_wait_for_jax():
    code = (
        "import runpy, sys; sys.argv = ['generate.py', '--help']\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as done:\n    assert done.code == 0 and 'jax' not in sys.modules\n"
        "else:\n    raise AssertionError('no exit')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert result.returncode == 0, result.stderr
    assert "--max-new-tokens" in result.stdout
