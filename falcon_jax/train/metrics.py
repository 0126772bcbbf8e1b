"""What a run reports: a file of JSON lines, bits per byte, and throughput that leaves out pauses."""

import json
import math
import time
from pathlib import Path
from typing import Any


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Total nats of a text over its UTF-8 bytes, in bits: comparable between vocabularies, unlike nats a token."""
    return nats / math.log(2) / num_bytes


class MetricsFile:
    """Appends one JSON object a line, each with a "kind" ("train" or "valid") and a "step"; flushed at once."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Drops what a lost run wrote after `resume_step`, so that no step stands in the file twice."""
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                record = _parse(line)
                if record is not None and record["step"] <= resume_step:
                    kept.append(line + "\n")
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._file.flush()

    def write(self, kind: str, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _parse(line: str) -> dict[str, Any] | None:
    """None for the half line that a killed process leaves at the end."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


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
