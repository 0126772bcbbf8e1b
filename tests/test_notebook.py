"""The quickstart notebook: it runs as a reader would run it, and is kept without output."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
MAX_BYTES = 40_000
# Cells that must end in a chart.
CHARTS = {"logprobs", "alibi", "attention", "cache"}


def test_the_notebook_is_small_and_holds_no_output():
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    # As plain JSON: reading through nbformat may mend what is wrong.
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        # Names, not the random ids that editors make: diffs stay small.
        assert re.fullmatch(r"[a-z-]+", cell["id"]), f"cell id {cell['id']!r}: give it a name"
        assert cell["metadata"] == {}, f"cell {cell['id']} has metadata"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"cell {cell['id']} has output"


# A kernel is sockets, an event loop and a subprocess of other projects, whose warnings are not this project's to mend.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_every_cell_runs_on_the_cpu_and_leaves_no_file(tmp_path, monkeypatch):
    empty = [tmp_path / name for name in ("work", "temporary")]
    for folder in empty:
        folder.mkdir()
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec | {"display_name": "this interpreter"}))
    # This interpreter and no start-up files, whatever kernels and profiles the user has.
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(empty[1]))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))  # made on import, used or not
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Raises CellExecutionError, with the cell's own traceback, where one fails.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(empty[0])}}).execute()

    assert {cell.id for cell in notebook.cells if has_chart(cell)} == CHARTS
    assert [list(folder.iterdir()) for folder in empty] == [[], []]


def has_chart(cell: Any) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
