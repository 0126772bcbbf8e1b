"""Where a run's numbers go (JSON lines, TensorBoard), and what they are made of: bits per byte, speed, memory.

A record has a kind ("train" or "valid"), a step (how many were done) and values; reporting.py says which.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from falcon_jax.errors import ConfigError


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Total nats of a text over its UTF-8 bytes, in bits: comparable between vocabularies, unlike nats a token."""
    return nats / math.log(2) / num_bytes


class Sink(Protocol):
    """What takes records."""

    def write(self, kind: str, step: int, **values: Any) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """Appends one JSON object a line, each with a "kind" ("train" or "valid") and a "step"; flushed at once."""

    def __init__(self, path: Path, resume_step: int, validated_step: int) -> None:
        """Drops what a lost run wrote after `resume_step` (0: all of it), so that no step stands in the file twice.

        validated_step: the last one whose validation is not done again, which may be an earlier one.
        """
        last_steps = {"valid": min(resume_step, validated_step)}
        known = read_records(path) if resume_step else []
        kept = [record for record in known if record["step"] <= last_steps.get(record["kind"], resume_step)]
        # By a rename: a process that is lost right here must not take the curve so far with it.
        incoming = path.with_name(f"{path.name}.incoming")
        incoming.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(incoming, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; without the half line that a killed process leaves at the end."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := _parse(line)) is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class TensorBoard:
    """Event files that TensorBoard reads: each number of a record as the scalar "kind/name"."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """What a lost run wrote after `resume_step` is not shown. Raises: ConfigError where the package is missing."""
        self._writer = _event_writer()(str(folder), purge_step=resume_step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", float(value), step)

    def close(self) -> None:
        self._writer.close()


def require_tensorboard() -> None:
    """Raises: ConfigError where the package that writes event files is missing."""
    _event_writer()


def _event_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboardX, which is not installed: "
            "pip install 'falcon-jax[tensorboard]', or leave the option out"
        ) from error
    return SummaryWriter


class Stopwatch:
    """Seconds of training since the last reading, without the pauses for validation and checkpoints."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._since = time.monotonic()
        self._paused_s = 0.0

    def add_pause(self, seconds: float) -> None:
        self._paused_s += seconds

    def read_s(self) -> float:
        """Seconds since the last reading; starts anew."""
        seconds = time.monotonic() - self._since - self._paused_s
        self.start()
        return max(seconds, 1e-9)


def device_memory(devices: Sequence[Any]) -> dict[str, int]:
    """Bytes in use and their peak, of the one of JAX's devices that has most; nothing where none counts them."""
    counts = [device.memory_stats() for device in devices]
    names = {"memory_bytes": "bytes_in_use", "peak_memory_bytes": "peak_bytes_in_use"}
    return {
        ours: max(int(count[theirs]) for count in counts if count)
        for ours, theirs in names.items()
        if any(count and theirs in count for count in counts)
    }
