"""falcon_jax.commands: the cache of compiled programs by default, its switch, and compiling while weights are read."""

import collections
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from falcon_jax import commands
from falcon_jax.errors import CheckpointError

ROOT = Path(__file__).parents[2]

# Serves each request; then compiles ahead what it needs and serves it again. Prints the names of what was compiled
# when nothing was ahead, ahead, and after that.
# In a process of its own: the annotations that tests check take arrays alone, and here shapes stand for them.
AHEAD = """
import json
import jax
from falcon_jax import Falcon, commands
from falcon_jax.falcon import BUNDLED_MODEL

jax.config.update("jax_disable_most_optimizations", True)
names = []

def note(event, _, *, fun_name="", **__):
    if event == "/jax/core/compile/backend_compile_duration":
        names.append(fun_name)

how = {"dtype": "float32", "alibi": "float32", "cuda_graphs": True, "max_cache_tokens": None}
model = Falcon.from_checkpoint(**how)
jax.monitoring.register_event_duration_secs_listener(note)
for num_words, streamed, request in json.loads(input()):
    prompt = "sea" + " sea" * (num_words - 1)

    def compile_ahead():
        for program in commands.generation_programs(BUNDLED_MODEL, prompt, streamed=streamed, **how, **request):
            program.compile()

    def serve():
        list(model.stream(prompt, **request) if streamed else model.generate(prompt, **request))

    jax.clear_caches()
    lines = []
    for step in (serve, jax.clear_caches, compile_ahead, serve):
        names.clear()
        step()
        lines.append(list(names))
    print(json.dumps([lines[0], *lines[2:]]))
"""


def run(*command: object, environment: dict[str, str] | None = None, text: str = "") -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(
        arguments, input=text, capture_output=True, text=True, cwd=ROOT, env=inherited | (environment or {})
    )


def generate(cache_home: Path, *options: object) -> subprocess.CompletedProcess:
    """The command in a process of its own, whose user keeps caches in `cache_home`."""
    flags = ["--max-new-tokens", "3", "--json", *options]
    result = run("scripts/generate.py", "The sea", *flags, environment={"XDG_CACHE_HOME": str(cache_home)})
    assert result.returncode == 0, result.stderr
    return result


def completions(result: subprocess.CompletedProcess) -> list:
    return json.loads(result.stdout)["completions"]


def test_second_process_reads_what_the_first_compiled(tmp_path):
    first = generate(tmp_path)
    folder = tmp_path / "falcon_jax" / "xla"
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-cache")}
    assert {"jit_prefill", "jit_first_token", "jit_decode"} <= {name.partition("-")[0] for name in kept}
    assert folder.stat().st_mode & 0o077 == 0  # whoever may write there can run code as this user
    read = {path: path.read_bytes() for path in folder.glob("*-atime")}
    second = generate(tmp_path)
    assert completions(second) == completions(first) and second.stderr == ""
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*-cache")} == kept
    assert len(read) == len(kept) and all(path.read_bytes() != moment for path, moment in read.items())


@pytest.fixture
def cache_settings():
    """JAX's settings, put back after the test: the process runs others' tests too."""
    names = [name for name in jax.config.values if "persistent_cache" in name or "compilation_cache" in name]
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_switch_beats_jaxs_own_setting_which_beats_the_default(cache_settings, tmp_path):
    own = str(tmp_path.parent / "own")
    jax.config.update("jax_compilation_cache_dir", own)
    commands.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == own
    commands.use_compilation_cache(str(tmp_path / "chosen"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "chosen")
    commands.use_compilation_cache("off")
    assert jax.config.jax_compilation_cache_dir is None
    assert [path.name for path in tmp_path.rglob("*")] == ["chosen"]


def test_programs_compiled_ahead_are_those_that_run(tmp_path):
    sampled = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}
    requests = [
        (5, False, {"max_new_tokens": 40}),
        (5, False, {"max_new_tokens": 1}),
        # Chunks of other lengths are asked for.
        (5, True, {"max_new_tokens": 40}),
        # Two kinds of prefill calls, and a program more for the copies.
        (1100, False, {"max_new_tokens": 2, "num_samples": 2, **sampled}),
        # So hot that drafts fail and the decoding is called again, with what its first call gave.
        (5, False, {"max_new_tokens": 80, "speculate": 4, "temperature": 1.5, "repetition_penalty": 1.1}),
    ]
    # A program that is compiled a second time counts as compiled, and comes from there.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    result = run("-c", AHEAD, text=json.dumps(requests), environment=cache)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    first, copies = ["jit(prefill)", "jit(first_token)"], ["jit(prefill)", "jit(prefill)", "jit(repeat_rows)"]
    assert [sorted(ahead) for _, ahead, _ in lines] == [
        sorted([*first, "jit(copy_made)", "jit(decode)"]),
        sorted(first),
        sorted([*first, "jit(ask)", "jit(copy_made)", "jit(decode)"]),
        sorted([*copies, "jit(first_token)", "jit(copy_made)", "jit(decode)"]),
        sorted([*first, "jit(copy_made)", "jit(decode_drafted)"]),
    ]
    # None in vain: a process that reads what another compiled would find one that was never needed there.
    assert all(not collections.Counter(ahead) - collections.Counter(alone) for alone, ahead, _ in lines)
    assert not {name for _, ahead, _ in lines for name in ahead} & {name for _, _, after in lines for name in after}


def test_body_waits_for_what_has_begun_and_gives_up_the_rest():
    begun, body_ended, compiled = threading.Event(), threading.Event(), []

    def compile_slowly():
        begun.set()
        body_ended.wait()
        compiled.append("first")

    def programs():
        yield SimpleNamespace(compile=compile_slowly)
        body_ended.wait()
        time.sleep(0.1)  # until the pool takes no more
        yield SimpleNamespace(compile=lambda: compiled.append("second"))

    lazily: Any = programs
    with commands.compile_ahead(lazily):
        assert begun.wait(timeout=30)
        threading.Timer(0.05, body_ended.set).start()
    assert compiled == ["first"]


def failing_with(error: Exception) -> Any:
    def programs():
        raise error

    return programs


def test_what_a_user_did_wrong_is_left_to_the_call_itself():
    with commands.compile_ahead(failing_with(CheckpointError("no such model"))):
        pass


def test_what_is_wrong_with_us_is_raised_once_the_body_has_ended():
    done = []
    with pytest.raises(TypeError, match="ours"), commands.compile_ahead(failing_with(TypeError("ours"))):
        done.append("body")
    assert done == ["body"]


@pytest.mark.parametrize(
    ("cache_home", "parent"), [("{}/caches", "caches"), ("", "home/.cache"), ("it", "home/.cache")]
)
def test_default_folder_is_in_the_users_cache(monkeypatch, tmp_path, cache_home, parent):
    """A path that is not absolute counts as none."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home.format(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert commands.default_folder() == tmp_path / parent / "falcon_jax" / "xla"


def test_a_hugging_face_folder_is_loaded_without_orbax():
    code = "import sys, falcon_jax, falcon_jax.commands; falcon_jax.Falcon.from_checkpoint(); print(*sys.modules)"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    modules = result.stdout.split()
    assert "falcon_jax.checkpoint.load" in modules and not {"orbax", "tensorstore"} & set(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["x", "--no-such-flag"], ["x", "--file", "y"]])
def test_help_and_wrong_arguments_do_not_wait_for_jax(arguments):
    code = (
        f"import runpy, sys; sys.argv = ['generate.py', *{arguments!r}]\n"
        "try:\n    runpy.run_path('scripts/generate.py', run_name='__main__')\n"
        "except SystemExit as done:\n    print(done.code, 'jax' in sys.modules)\n"
    )
    expected = "0 False" if arguments == ["--help"] else "2 False"
    assert run("-c", code).stdout.splitlines()[-1] == expected
