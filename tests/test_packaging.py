"""What a stranger's first command depends on: the interpreter search, the pins, an import without effects."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import falcon_jax

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_LINES = 550


def make_interpreter(path: Path, version: tuple[int, int], has_venv: bool = True) -> Path:
    """Writes a command that answers the search as a Python of that version would."""
    modules = "" if has_venv else "sys.modules['ensurepip'] = None; "
    fake = f"import sys; sys.version_info = {(*version, 1, 'final', 0)!r}; sys._base_executable = {str(path)!r}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{fake}; {modules}exec(sys.argv[2])" "$@"\n')
    path.chmod(0o755)
    return path


def find_python(home: Path, *, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the search where nothing exists but the shell's own tools and what the test put in `home/bin`."""
    commands = home / "bin"
    commands.mkdir(exist_ok=True)
    for tool in ("sh", "sed", "cat"):
        target = next(folder / tool for folder in map(Path, ("/bin", "/usr/bin")) if (folder / tool).exists())
        (commands / tool).symlink_to(target)
    environment = {"PATH": str(commands), "HOME": str(home)} | (variables or {})
    command = [str(commands / "sh"), str(ROOT / "tools" / "find_python.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def run_python(code: str) -> str:
    """Runs `code` in a Python of its own, without what conftest.py sets up; returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_any_python_the_search_says_what_to_install(tmp_path):
    result = find_python(tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    for advice in ("3.12", "apt install", "pyenv install", "uv python install", "PYTHON="):
        assert advice in result.stderr


@pytest.mark.parametrize("version", [(2, 7), (3, 11), (3, 15)])
def test_an_interpreter_that_does_not_fit_is_refused_by_its_version(tmp_path, version):
    make_interpreter(tmp_path / "bin" / "python3", version)
    result = find_python(tmp_path)
    assert result.returncode == 1
    assert f"python3: is Python {version[0]}.{version[1]}" in result.stderr
    assert "apt install" in result.stderr


def test_an_interpreter_without_venv_is_refused_with_the_package_to_install(tmp_path):
    make_interpreter(tmp_path / "bin" / "python3", (3, 13), has_venv=False)
    result = find_python(tmp_path)
    assert result.returncode == 1
    assert "python3.13-venv" in result.stderr


def test_a_shim_that_fails_does_not_hide_the_interpreter_that_pyenv_has(tmp_path):
    shim = tmp_path / "bin" / "python3.12"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    make_interpreter(tmp_path / "bin" / "python3", (3, 11))
    make_interpreter(tmp_path / ".pyenv" / "versions" / "3.11.9" / "bin" / "python", (3, 11))
    installed = make_interpreter(tmp_path / ".pyenv" / "versions" / "3.13.2" / "bin" / "python", (3, 13))
    result = find_python(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(installed)


def test_pyenv_is_asked_where_it_keeps_its_versions(tmp_path):
    installed = make_interpreter(tmp_path / "elsewhere" / "versions" / "3.12.4" / "bin" / "python", (3, 12))
    pyenv = tmp_path / "bin" / "pyenv"
    pyenv.parent.mkdir()
    pyenv.write_text(f"#!/bin/sh\n[ \"$1\" = root ] && echo '{tmp_path / 'elsewhere'}'\n")
    pyenv.chmod(0o755)
    assert find_python(tmp_path).stdout.strip() == str(installed)


def test_uv_is_asked_last(tmp_path):
    managed = make_interpreter(tmp_path / "managed" / "python", (3, 14))
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f"#!/bin/sh\n[ \"$1 $2\" = 'python find' ] && echo '{managed}'\n")
    uv.chmod(0o755)
    assert find_python(tmp_path).stdout.strip() == str(managed)


def test_the_tested_version_comes_before_a_newer_one(tmp_path):
    tested = make_interpreter(tmp_path / "bin" / "python3.12", (3, 12))
    make_interpreter(tmp_path / "bin" / "python3", (3, 14))
    assert find_python(tmp_path).stdout.strip() == str(tested)


def test_a_named_python_is_used_or_refused_and_never_replaced(tmp_path):
    make_interpreter(tmp_path / "bin" / "python3.12", (3, 12))
    named = make_interpreter(tmp_path / "named" / "python", (3, 13))
    assert find_python(tmp_path, variables={"PYTHON": str(named)}).stdout.strip() == str(named)


@pytest.mark.parametrize(("name", "reason"), [("python3", "is Python 3.11"), ("/no/python", "not found")])
def test_a_named_python_that_does_not_fit_is_an_error(tmp_path, name, reason):
    make_interpreter(tmp_path / "bin" / "python3.12", (3, 12))
    make_interpreter(tmp_path / "bin" / "python3", (3, 11))
    result = find_python(tmp_path, variables={"PYTHON": name})
    assert result.returncode == 1
    assert f"PYTHON={name} cannot be used" in result.stderr
    assert reason in result.stderr


def test_the_version_has_one_value():
    assert falcon_jax.__version__ == PYPROJECT["project"]["version"]
    assert f"## [{falcon_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_exactly_and_hold_no_address():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9._-]+==[0-9][0-9a-z.]*", pin), pin
    assert len({pin.split("==")[0] for pin in pins}) == len(pins)


def test_each_core_dependency_is_pinned():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for requirement in PYPROJECT["project"]["dependencies"]:
        name = re.split(r"[<>=!\[]", requirement)[0].replace("_", "-")
        assert name in pinned, name


def test_no_file_is_too_long_to_read():
    folders = ("falcon_jax", "pallas_kernels", "scripts", "benchmarks", "tests", "tools", "docs")
    too_long = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".sh", ".md"}:
                num_lines = len(path.read_text().splitlines())
                if num_lines >= MAX_LINES:
                    too_long[str(path.relative_to(ROOT))] = num_lines
    assert too_long == {}


def test_the_core_imports_where_no_test_dependency_is_installed():
    run_python(
        """
import sys
for name in ("torch", "transformers", "matplotlib", "pytest", "hypothesis", "beartype", "triton"):
    sys.modules[name] = None
import falcon_jax, pallas_kernels
for name in falcon_jax.__all__:
    getattr(falcon_jax, name)
"""
    )


def test_importing_sets_no_variable_no_flag_and_makes_no_device():
    printed = run_python(
        """
import os, jax
from jax._src import xla_bridge
# What the libraries themselves do at import is theirs.
import flax.nnx, orbax.checkpoint, huggingface_hub, tokenizers, optax
environment, flags = dict(os.environ), dict(jax.config.values)
import falcon_jax, pallas_kernels
for name in falcon_jax.__all__:
    getattr(falcon_jax, name)
assert dict(os.environ) == environment
assert dict(jax.config.values) == flags
print("devices" if xla_bridge.backends_are_initialized() else "no devices")
"""
    )
    assert printed.strip() == "no devices"
