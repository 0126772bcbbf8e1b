"""Run by test_resume.py in a process of its own: kills conversions with SIGKILL, goes on, and prints what happened.

Each conversion is a child forked before JAX has made any thread, so that none imports everything anew.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from falcon_jax.checkpoint import CheckpointError, convert, load
from falcon_jax.checkpoint.convert import Conversion
from falcon_jax.checkpoint.hf_files import HFFolder
from falcon_jax.checkpoint.manifest import Manifest
from falcon_jax.checkpoint.store import ArrayFolder
from falcon_jax.model.params import flatten

# convert the function hides convert the module.
convert_module: Any = importlib.import_module("falcon_jax.checkpoint.convert")
convert_module.GROUP_BYTES = 0  # one tensor a write, as with real sizes


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(owner: Any, name: str, call: int, *, after: bool = False) -> Callable[[], None]:
    """A patch: the process dies before (or right after) its `call`-th call of owner.name."""

    def patch() -> None:
        original, calls = getattr(owner, name), 0

        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                kill_self()
            result = original(*args, **kwargs)
            if calls == call:
                kill_self()
            return result

        setattr(owner, name, replacement)

    return patch


def half_a_journal_line() -> None:
    original, calls = ArrayFolder.put, 0

    def put(self: ArrayFolder, arrays: Any) -> None:
        nonlocal calls
        calls += 1
        original(self, arrays)
        if calls == 9:
            journal = Path(destination_of_child) / "unfinished" / "journal.jsonl"
            with open(journal, "ab") as file:
                file.write(b'{"tensor": "transformer.h.0')
            kill_self()

    ArrayFolder.put = put  # type: ignore[method-assign]


# The renames that put a fused tensor's three arrays in place are the 5th to 7th: embedding, two norms of two
# arrays (the variant has ln_attn and ln_mlp), then query, key, value.
MOMENTS: dict[str, Callable[[], None]] = {
    "before anything is written": kill_at(ArrayFolder, "create", 1),
    "before the first tensor": kill_at(HFFolder, "read", 1),
    "in the midst": kill_at(HFFolder, "read", 9),
    "written but in no place": kill_at(ArrayFolder, "put", 8),
    "between two arrays of a tensor": kill_at(os, "rename", 30),
    "in place but not in the journal": kill_at(ArrayFolder, "put", 8, after=True),
    "in half a journal line": half_a_journal_line,
    "all converted, nothing moved": kill_at(Conversion, "finish", 1),
    "moved, without a manifest": kill_at(Manifest, "write", 1),
}
destination_of_child = ""


def in_child(function: Callable[[], Any], kill_after_s: float | None = None) -> tuple[int, Any]:
    """Runs a function in a fork; returns the signal that ended it (0: none) and what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.write(writer, json.dumps(function()).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), None
    if os.WEXITSTATUS(status):
        raise RuntimeError("a child failed; its traceback is above")
    return 0, json.loads(content)


def refusal(destination: Path) -> str:
    """What loading says, or "loads"."""
    try:
        load(destination)
    except CheckpointError as error:
        return str(error)
    return "loads"


def go_on(source: Path, destination: Path) -> tuple[list[str], bool]:
    """Converts again; returns the tensors that were read for it, and whether the outcome equals the source."""
    reads: list[str] = []
    original = HFFolder.read

    def read(self: HFFolder, name: str) -> np.ndarray:
        reads.append(name)
        return original(self, name)

    HFFolder.read = read  # type: ignore[method-assign]
    convert(source, destination, progress=False)
    return list(reads), same_as_source(source, destination)


def same_as_source(source: Path, destination: Path) -> bool:
    expected, found = flatten(load(source).params), flatten(load(destination).params)
    return expected.keys() == found.keys() and all(np.array_equal(expected[k], found[k]) for k in expected)


def journaled(destination: Path) -> list[str]:
    path = destination / "unfinished" / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["tensor"] for line in lines]


def outcomes(source: Path, folder: Path) -> Iterator[dict[str, Any]]:
    moments: list[tuple[str, Callable[[], None] | None, float | None]] = [
        (name, patch, None) for name, patch in MOMENTS.items()
    ]
    generator = random.Random(0)
    moments += [(f"at random {number}", None, generator.uniform(0.05, 0.7)) for number in range(4)]
    for number, (name, patch, delay_s) in enumerate(moments):
        destination = folder / f"converted-{number}"

        def killed(patch: Callable[[], None] | None = patch, destination: Path = destination) -> None:
            global destination_of_child
            destination_of_child = str(destination)
            if patch is not None:
                patch()
            convert(source, destination, progress=False)

        ended_by, _ = in_child(killed, delay_s)
        finished = journaled(destination)
        whole = (destination / "manifest.json").exists()
        _, says = in_child(lambda d=destination: refusal(d))
        if whole:
            _, same = in_child(lambda d=destination: same_as_source(source, d))
            reads = []
        else:
            _, (reads, same) = in_child(lambda d=destination: go_on(source, d))
        yield {
            "moment": name,
            "signal": ended_by,
            "whole": whole,
            "finished": finished,
            "says": says,
            "reads": reads,
            "same": same,
            "left": sorted(path.name for path in destination.iterdir()),
        }


if __name__ == "__main__":
    print(json.dumps(list(outcomes(Path(sys.argv[1]), Path(sys.argv[2])))))
