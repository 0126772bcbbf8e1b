import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from falcon_jax.errors import ConfigError
from falcon_jax.train import metrics, plot
from falcon_jax.train.metrics import MetricsFile, TensorBoard, device_memory, read_records


def test_what_a_lost_run_wrote_past_its_checkpoint_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, -1)
    for step in (1, 2, 3):
        file.write("train", step, loss=1 / step)
    file.close()
    with path.open("a") as half:
        half.write('{"kind": "train", "st')
    file = MetricsFile(path, 2, 2)
    file.write("train", 3, loss=0.25)
    file.close()
    assert [(record["step"], record["loss"]) for record in read_records(path)] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_a_validation_that_is_made_again_stands_there_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(f'{{"kind": "{kind}", "step": {step}}}\n' for step in (3, 8) for kind in ("train", "valid"))
    )
    MetricsFile(path, 8, 3).close()
    assert [(record["kind"], record["step"]) for record in read_records(path)] == [
        ("train", 3),
        ("valid", 3),
        ("train", 8),
    ]


def test_a_run_that_begins_anew_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "valid", "step": 0}\n{"kind": "train", "step": 1}\n')
    MetricsFile(path, 0, -1).close()
    assert read_records(path) == []


def test_a_process_lost_while_it_drops_records_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n')

    def lost(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics.os, "replace", lost)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, 1, 1)
    assert read_records(path) == [{"kind": "train", "step": 1}]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboardX.proto import event_pb2  # whose classes are made at run time

    events: Any = event_pb2

    board = TensorBoard(tmp_path, 0)
    board.write("train", 7, loss=2.5, tokens=1000)
    board.write("valid", 8, is_best=True)
    board.close()
    [path] = tmp_path.iterdir()
    found, content = {}, path.read_bytes()
    while content:  # length, its checksum, the event, its checksum
        [size] = struct.unpack("<Q", content[:8])
        event = events.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert found == {("train/loss", 7): 2.5, ("train/tokens", 7): 1000, ("valid/is_best", 8): 1}


def test_tensorboard_that_is_missing_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"tensorboardX, which is not installed: pip install"):
        metrics.require_tensorboard()


def test_memory_is_that_of_the_fullest_device_or_left_out() -> None:
    def device(stats: dict | None) -> SimpleNamespace:
        return SimpleNamespace(memory_stats=lambda: stats)

    devices = [device({"bytes_in_use": 5, "peak_bytes_in_use": 9}), device({"bytes_in_use": 7, "peak_bytes_in_use": 8})]
    assert device_memory(devices) == {"memory_bytes": 7, "peak_memory_bytes": 9}
    assert device_memory([device(None)]) == {}


def write_run(path: Path, num_records: int) -> None:
    records = [
        {"kind": "train", "step": step, "tokens": 5000 * step, "loss": 3 + 2 / step, "learning_rate": 1e-3 / step}
        for step in range(1, num_records + 1)
    ]
    records += [
        {"kind": "valid", "step": step, "tokens": 5000 * step, "nats_per_token": 3.1}
        for step in range(1, num_records, 9)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(("num_records", "is_drawn"), [(0, (False, False)), (1, (True, False)), (150, (True, True))])
def test_a_run_of_any_length_has_a_picture(tmp_path: Path, num_records: int, is_drawn: tuple[bool, bool]) -> None:
    write_run(tmp_path / "metrics.jsonl", num_records)
    plot.plot_run(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).reshape(-1, 3)
    colours = (plot.TRAIN_COLOUR, plot.VALID_COLOUR)
    wanted = [[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in colours]
    assert tuple(bool((pixels == colour).all(axis=1).sum() > 20) for colour in wanted) == is_drawn


def test_smoothing_moves_neither_lines_nor_ends() -> None:
    line = np.linspace(5.0, 1.0, 200)
    np.testing.assert_allclose(plot._smoothed(line), line)
    noise = np.random.default_rng(0).normal(size=1000)
    smooth = plot._smoothed(noise)
    assert smooth[100:900].std() < 0.4 and smooth[[0, -1]] == pytest.approx(noise[[0, -1]])
