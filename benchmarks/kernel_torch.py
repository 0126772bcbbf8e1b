"""PyTorch's contestants: they run in a process of their own, so that each library has its part of the GPU's memory.

Nothing runs there between two requests, so it takes its turns like everybody else.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from typing import Any

import jax

from benchmarks import hardware
from benchmarks.kernel_turns import Entry
from pallas_kernels.shapes import AttentionCase, DecodeCase

WORKER = (sys.executable, "-m", "benchmarks.kernel_torch_worker")


class TorchProcess:
    """kernel_torch_worker.py at the other end of two pipes; where it cannot run or has died, a reason."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.reason = reason_against()
        if self.reason is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(WORKER, cwd=hardware.REPOSITORY, stdin=pipe, stdout=pipe, text=True)

    def begin(self, kind: str, case: AttentionCase | DecodeCase, num_caches: int = 1, filler_bytes: int = 0) -> None:
        """Has the process compile all contestants of a case, meanwhile we compile ours."""
        shape = dataclasses.asdict(case)
        self.tell({"kind": kind, "shape": shape, "num_caches": num_caches, "filler_bytes": filler_bytes})

    def entries(self) -> list[Entry]:
        """Waits for what `begin` began."""
        answer = self.answer()
        if "reason" in answer:
            return [Entry("torch", reason=answer["reason"], failed=self.process is not None)]
        return [self.entry(**found) for found in answer["contestants"]]

    def entry(self, name: str, error: float | None = None, reason: str | None = None) -> Entry:
        runner = Remote(self, name) if reason is None else None
        return Entry(name, reason=reason, failed=reason is not None, error=error, runner=runner)

    def tell(self, request: dict[str, Any]) -> None:
        if self.process is not None and self.process.stdin is not None and self.reason is None:
            try:
                print(json.dumps(request), file=self.process.stdin, flush=True)
            except OSError:
                self.reason = "the process of torch has ended"

    def answer(self) -> dict[str, Any]:
        if self.reason is None and self.process is not None and self.process.stdout is not None:
            line = self.process.stdout.readline()
            if line:
                return json.loads(line)
            self.reason = f"the process of torch ended with exit code {self.process.wait()}"
        return {"reason": self.reason}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@dataclasses.dataclass(frozen=True)
class Remote:
    """A contestant in the process."""

    torch: TorchProcess
    name: str

    def seconds(self, num_calls: int) -> float:
        self.torch.tell({"time": self.name, "num_calls": num_calls})
        answer = self.torch.answer()
        if "reason" in answer:
            raise RuntimeError(answer["reason"])
        return answer["seconds"]


def reason_against() -> str | None:
    """Why PyTorch cannot take part here, or None."""
    if jax.default_backend() != "gpu":
        return "it needs an NVIDIA GPU"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return None
