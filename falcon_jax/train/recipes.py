"""The published training runs of the family, as settings for `scripts/train.py --recipe`.

Source: tokens, rates, warm-up, batch, ramp length, sequence length, weight decay, z-loss, GPUs and layout are those of
the models' cards on Hugging Face (tiiuae/falcon-rw-1b, -7b, -40b, -180B). No card gives Adam's betas and epsilon; that
of falcon-rw-1b says its settings were adapted from GPT-3's, so GPT-3's stand here for all (Brown et al., 2020, appendix
B: 0.9, 0.95, 1e-8, and gradients clipped at 1). No card says how the ramp begins or in what steps it goes: ours begins
with one row a replica (in a pipeline one for each stage) and adds as many at a time. None says what is computed again
in the backward pass: ours is what fits into 40 GB, by scripts/plan.py.

The cards' data-parallel degree, with ZeRO, is data * fsdp here: in a pipeline both gather the weights once a step, so
that only what they split differs. The training state is split along the models' widths, which are 71, 29 or 1 times a
power of two: 3 divides none of them, so where the degree has that factor it is `data`, over which the state lies whole,
and the rest is `fsdp`, over which it is split.
"""

import dataclasses
from typing import Any

LENGTH = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One published run. Rows are sequences of `length` tokens; the layout's product is `gpus`, A100s of 40 GB."""

    model: str
    tokens: int
    peak_rate: float
    final_rate: float
    warmup_tokens: int
    batch_rows: int
    ramp_tokens: int
    data: int
    gpus: int
    fsdp: int = 1
    tensor: int = 1
    stage: int = 1
    remat: str = "none"
    length: int = LENGTH
    weight_decay: float = 0.1
    z_loss: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    @property
    def num_micro_batches(self) -> int:
        """Of one row a replica."""
        return self.batch_rows // (self.data * self.fsdp)

    def settings(self) -> dict[str, Any]:
        """By the names of `settings.TrainConfig` and `step.StepOptions`."""
        shared = ("model", "tokens", "warmup_tokens", "ramp_tokens", "length", "fsdp", "tensor", "stage", "remat")
        shared += ("weight_decay", "z_loss", "beta1", "beta2", "epsilon", "max_grad_norm", "num_micro_batches")
        return {name: getattr(self, name) for name in shared} | {
            "learning_rate": self.peak_rate,
            "min_rate_ratio": self.final_rate / self.peak_rate,
            "batch_size": self.batch_rows,
            "data_parallel": self.data,
        }


RECIPES: dict[str, Recipe] = {
    recipe.model: recipe
    for recipe in (
        Recipe(
            model="falcon-rw-1b",
            tokens=350_000_000_000,
            peak_rate=2e-4,
            final_rate=2e-5,
            warmup_tokens=500_000_000,
            batch_rows=512,
            ramp_tokens=4_000_000_000,
            z_loss=0.0,  # its card names none
            data=32,
            gpus=32,
        ),
        Recipe(
            model="falcon-7b",
            tokens=1_500_000_000_000,
            peak_rate=6e-4,
            final_rate=1.2e-5,
            warmup_tokens=4_000_000_000,
            batch_rows=2304,
            ramp_tokens=30_000_000_000,
            stage=2,
            data=3,
            fsdp=64,
            remat="stage",
            gpus=384,
        ),
        Recipe(
            model="falcon-40b",
            tokens=1_000_000_000_000,
            peak_rate=1.85e-4,
            final_rate=1.85e-5,
            warmup_tokens=4_000_000_000,
            batch_rows=1152,
            ramp_tokens=100_000_000_000,
            tensor=8,
            stage=4,
            data=3,
            fsdp=4,
            remat="stage",
            gpus=384,
        ),
        Recipe(
            model="falcon-180b",
            tokens=3_500_000_000_000,
            peak_rate=1.25e-4,
            final_rate=1.25e-5,
            warmup_tokens=4_000_000_000,
            batch_rows=2048,
            ramp_tokens=100_000_000_000,
            tensor=8,
            stage=8,
            data=64,
            remat="stage",
            gpus=4096,
        ),
    )
}
