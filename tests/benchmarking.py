"""Runs a benchmark's command inside the test's own process, where it need not import JAX again."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import command, hardware, limits

type Call = Callable[..., tuple[int, str, str]]


def caller(
    run: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, results: Path, *always: str
) -> Call:
    """A function of a command's arguments that gives its exit code, stdout and stderr.

    Measurements of the machine are small, `results` is the folder that --save writes to, and `always` are arguments
    of every call.
    """
    monkeypatch.setattr(hardware, "MEASURE_S", 0.0)
    monkeypatch.setattr(hardware, "MATRIX_SIZES", {"cpu": 64, "gpu": 64})
    monkeypatch.setattr(limits, "MEMORY_READ_BYTES", {"cpu": 2**20, "gpu": 2**20})
    # A pass over all that JAX and PyTorch have made takes 0.4 s.
    monkeypatch.setattr(gc, "collect", lambda *arguments: 0)
    monkeypatch.setattr(command, "RESULTS", results)
    # Commands set these for their own process.
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("NCCL_NVLS_ENABLE", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "0")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, *always])
        code = run()
        return code, *capfd.readouterr()

    return call


# A cache would last beyond the test, and stay switched on in its process.
NO_CACHE = ("--compilation-cache", "off")
