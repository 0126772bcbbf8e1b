"""Runs the files of scripts/ inside the test's own process, where they need not import JAX again."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py as a module of its own name, made anew."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def exit_code(script: ModuleType, monkeypatch, *arguments: object) -> int | str | None:
    """What `script.main()` returns or exits with, given these command-line arguments."""
    monkeypatch.setattr(sys, "argv", [Path(str(script.__file__)).name, *map(str, arguments)])
    try:
        return script.main()
    except SystemExit as stop:
        return stop.code
