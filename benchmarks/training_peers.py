"""transformers as a contestant of benchmarks/training.py, trained as its users do.

float32 weights made on the device, bfloat16 by autocast, PyTorch's attention and fused AdamW, no cache; the loss is the
model's own. Compiled: through torch.compile as it is by default. Gradients are not clipped, which spares it some time.

The trap: its process must not ask JAX for a device, whose allocator would take memory.
"""

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

from benchmarks import hardware, peers
from benchmarks.measure import Peak
from benchmarks.training_cases import Case, Work
from benchmarks.training_measure import LEARNING_RATE, SEED, Contestant
from falcon_jax.train.step import StepOptions


def transformers(case: Case, names: Sequence[str], platform: str) -> list[Contestant]:
    """Those of `names` that take part in a case.

    Raises:
      RequestError: torch or transformers is not installed, or has no CUDA where JAX has.
    """
    taken = [name for name in names if name in case.peer_rows]
    peers.transformers(case.work.config, None, "float32", taken)  # knows what they need
    return [Transformers(name, case.work, case.peer_rows[name], platform) for name in taken]


@dataclasses.dataclass(frozen=True)
class Transformers(Contestant):
    """transformers' FalconForCausalLM on so many rows a step."""

    name: str
    work: Work
    rows: int
    platform: str

    @property
    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.rows}

    def load(self) -> "TransformersTrainer":
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        torch.set_num_threads(hardware.num_cores())
        torch.manual_seed(SEED)
        return TransformersTrainer(self)


class TransformersTrainer:
    """A model with its optimizer, and one batch on the device."""

    def __init__(self, contestant: Transformers):
        import torch

        self.device = "cuda" if contestant.platform == "gpu" else "cpu"
        self.model = peers.random_model(contestant.work.config, "float32", self.device).train()
        self.model.config.use_cache = False
        options = StepOptions()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=LEARNING_RATE,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.is_compiled = contestant.name == peers.COMPILED
        self.forward: Any = torch.compile(self.model) if self.is_compiled else self.model
        rows = contestant.work.tokens(contestant.rows)[:, :-1]  # as many as ours reads; it shifts them itself
        self.token_ids = torch.from_numpy(rows.astype("int64")).to(self.device)
        self.each_loss: list[Any] = []
        self.found: dict[str, Any] = {}

    def first_step(self) -> None:
        self.take(1)
        self.wait()

    def take(self, num_steps: int) -> None:
        import torch

        for _ in range(num_steps):
            with torch.autocast(self.device, dtype=torch.bfloat16):
                loss = self.forward(input_ids=self.token_ids, labels=self.token_ids, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.each_loss.append(loss.detach())

    def wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def losses(self) -> list[float]:
        return [float(loss) for loss in self.each_loss]

    def peak(self) -> Peak | None:
        import torch

        return Peak(torch.cuda.max_memory_allocated()) if self.device == "cuda" else None

    def close(self) -> None:
        import torch

        del self.model, self.forward, self.optimizer, self.each_loss
        if self.is_compiled:
            torch.compiler.reset()
        gc.collect()
