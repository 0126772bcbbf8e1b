"""Runs that lose processes, in children of a process of its own; see killing.py, which also kills at random."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train import killing

ROOT = Path(__file__).parents[2]


def outcome(scenario: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.train.killing", "--folder", str(folder), "--scenario", scenario]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    logs = "".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    result = outcome("chain", tmp_path)
    assert result["codes"] == [0, *[killing.KILLED] * 4, 0]
    # Where the four go on: with nothing, still nothing, the checkpoint before the half one, and the last.
    assert result["first_steps"][:3] == [1, 1, 5]
    assert all(step in (5, None) for step in result["first_steps"][3:])  # the last one may have been whole already
    assert "loaded 8 of checkpoints" not in result["loaded"][2]
    steps = [record[1] for record in result["curve"] if record[0] == "train"]
    assert steps == list(range(1, 9))
    assert result["curve"] == result["whole_curve"]
    assert result["is_same_model"]


@pytest.mark.slow
def test_four_processes_lose_one_go_on_bit_by_bit_and_stop_together(tmp_path: Path) -> None:
    result = outcome("several", tmp_path)
    # A whole run in all four, and one that ends in all where one process is lost: none waits for it forever.
    assert all("complete at 8" in phases for phases in result["lost_phases"])
    assert result["lost_codes"][2] == killing.KILLED
    assert all(code != 0 for code in result["lost_codes"])
    for phases in result["lost_phases"]:
        second_run = phases[phases.index("complete at 8") + 1 :]
        assert "step 5" in second_run and "step 7" not in second_run
    # One is told to end, and all do so after the same step, with a checkpoint.
    assert result["resumed_codes"] == [0, 0, 0, 0]
    assert {phases[0] for phases in result["resumed_phases"]} == {"step 4"}
    [end] = {phases[-1] for phases in result["resumed_phases"]}
    assert end == "stopped at 7"
    assert all("save 7" in phases for phases in result["resumed_phases"])
    whole = [record for record in result["whole_curve"] if record[0] == "train"]
    assert [record[1] for record in whole] == list(range(1, 9))
    assert result["resumed_curve"] == whole[:7]
    # And in a validation, which is then made another time.
    assert result["paused_codes"] == [0, 0, 0, 0]
    assert all("evaluation 8" in phases and phases[-1] == "stopped at 8" for phases in result["paused_phases"])
    assert not any("model" in phases for phases in result["paused_phases"])
    assert [record for record in result["paused_curve"] if record[0] == "train"] == whole
    assert result["lost_curve"] == whole[: len(result["lost_curve"])] and len(result["lost_curve"]) >= 3
    assert {"model", "metrics.jsonl", "loss.png"} <= set(result["files"])
    # What is written once is written by process 0 alone.
    assert [sum(phase == "model" for phase in phases) for phases in result["lost_phases"]] == [1, 0, 0, 0]
