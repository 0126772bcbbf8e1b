import pytest

from falcon_jax.checkpoint import load
from tests import commands, hf_models


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = hf_models.make_model(hf_models.tiny_config("falcon-rw-1b"))
    return hf_models.save_model(model, tmp_path_factory.mktemp("commands") / "hf")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *arguments) -> (exit code, stdout, stderr)."""

    def run_script(script, *arguments):
        code = commands.exit_code(commands.load_script(script), monkeypatch, *arguments)
        return code, *capsys.readouterr()

    return run_script


def test_there_and_back_by_command(run, source, tmp_path):
    assert run("convert_checkpoint", source, tmp_path / "out", "--quiet") == (0, f"{tmp_path / 'out'}\n", "")
    assert run("export_checkpoint", tmp_path / "out", tmp_path / "back") == (0, f"{tmp_path / 'back'}\n", "")
    load(tmp_path / "back")


def test_a_failure_is_one_line_and_exit_code_2(run, source, tmp_path):
    for arguments in [
        ("convert_checkpoint", tmp_path / "nowhere", tmp_path / "out"),
        ("convert_checkpoint", "no-such-org/no-such-model", tmp_path / "out"),
        ("convert_checkpoint", source, source),
        ("export_checkpoint", source, tmp_path / "back"),
        ("export_checkpoint", source, tmp_path / "back", "--max-shard-gb", "-1"),
    ]:
        code, out, error = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert error.startswith("error: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize("script", ["convert_checkpoint", "export_checkpoint"])
def test_help_and_unknown_options(run, script, source, tmp_path):
    code, out, _ = run(script, "--help")
    assert code == 0
    assert "Folder to make" in out
    assert run(script, source, tmp_path / "out", "--dtipe", "x")[0] == 2
