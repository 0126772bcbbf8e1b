"""The recipes against the models' cards, typed in here a second time."""

import math
from pathlib import Path

import pytest

from falcon_jax.config import PRESETS
from falcon_jax.train import flops
from falcon_jax.train.planning import devices
from falcon_jax.train.planning.job import Job, Layout, state_bytes, unsplit_shares
from falcon_jax.train.recipes import RECIPES
from falcon_jax.train.settings import TrainConfig
from falcon_jax.train.step import StepOptions

# GPUs, tensor, stage, data parallel | tokens, highest and last rate, warm-up | batch, ramp, z-loss
CARDS = {
    "falcon-rw-1b": ((32, 1, 1, 32), (350e9, 2e-4, 2e-5, 0.5e9), (512, 4e9, 0.0)),
    "falcon-7b": ((384, 1, 2, 192), (1.5e12, 6e-4, 1.2e-5, 4e9), (2304, 30e9, 1e-4)),
    "falcon-40b": ((384, 8, 4, 12), (1e12, 1.85e-4, 1.85e-5, 4e9), (1152, 100e9, 1e-4)),
    "falcon-180b": ((4096, 8, 8, 64), (3.5e12, 1.25e-4, 1.25e-5, 4e9), (2048, 100e9, 1e-4)),
}
STEP_NAMES = {"weight_decay", "z_loss", "beta1", "beta2", "epsilon", "max_grad_norm", "num_micro_batches"}


def config_of(name: str) -> TrainConfig:
    settings = RECIPES[name].settings()
    step = StepOptions(**{key: settings.pop(key) for key in STEP_NAMES})
    return TrainConfig(data=Path("data"), output=Path("output"), step=step, **settings)


def test_there_is_a_recipe_for_each_card() -> None:
    assert RECIPES.keys() == CARDS.keys()


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_says_what_the_card_says(name: str) -> None:
    (gpus, tensor, stage, replicas), (tokens, highest, last, warmup), (batch, ramp, z_loss) = CARDS[name]
    recipe, config = RECIPES[name], config_of(name)
    assert (recipe.gpus, config.num_devices) == (gpus, gpus)
    assert (config.tensor, config.stage, config.data_parallel * config.fsdp) == (tensor, stage, replicas)
    assert (config.tokens, config.warmup_tokens, config.ramp_tokens) == (tokens, warmup, ramp)
    assert (config.batch_size, config.length, config.model) == (batch, 2048, name)
    step = config.step
    assert (step.weight_decay, step.z_loss) == (0.1, z_loss)
    assert (step.beta1, step.beta2, step.epsilon, step.max_grad_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert step.num_micro_batches % stage == 0

    total = config.total_steps
    assert total is not None
    assert config.ramp.tokens_before(total - 1) < tokens <= config.ramp.tokens_before(total)
    assert config.rate(config.num_warmup_steps - 1, total) == pytest.approx(highest, rel=1e-3)
    assert max(config.rate(step, total) for step in range(0, total, 97)) <= highest
    assert config.rate(total - 1, total) == pytest.approx(last)
    # Halfway between warm-up and end the cosine is halfway between its ends.
    middle = config.ramp.num_steps(int(warmup + tokens) // 2)
    assert config.rate(middle - 1, total) == pytest.approx((highest + last) / 2, rel=1e-3)
    # The ramp is over after the tokens it was given, and not before.
    full = config.ramp.num_steps(int(ramp))
    assert (config.ramp.rows(full), config.ramp.rows(0)) == (batch, replicas * stage)
    assert config.ramp.rows(full - 1) < batch


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_splits_its_state_over_all_gpus_but_a_factor_of_three(name: str) -> None:
    recipe, model, config = RECIPES[name], PRESETS[name], config_of(name)
    layout = Layout(
        data=config.data_parallel,
        fsdp=config.fsdp,
        tensor=config.tensor,
        stage=config.stage,
        num_micro_batches=config.step.num_micro_batches,
        remat=config.remat,
    )
    job = Job(config=model, device=devices.named("a100-40"), layout=layout, rows=config.batch_size)
    whole_over = 3 if recipe.gpus % 3 == 0 else 1
    assert unsplit_shares(job) == ({"data": pytest.approx(1, abs=1e-4)} if whole_over == 3 else {})
    assert config.data_parallel == whole_over or whole_over == 1
    # Norms lie whole everywhere, and on each stage embedding and head.
    evenly = 12 * model.num_parameters / recipe.gpus * whole_over
    assert evenly < state_bytes(job).total < 1.06 * evenly
    assert state_bytes(job).total < 0.15 * job.device.usable_bytes  # the rest is for gradients and activations


def test_model_flops_are_six_a_multiplying_parameter_and_the_causal_half_of_attention() -> None:
    rw, tied, untied = (PRESETS[name] for name in ("falcon-rw-1b", "falcon-7b", "falcon2-11b"))
    # Matrices of falcon-rw-1b: query, key, value, output, up and down of 24 layers, and the tied head.
    matrices = 24 * (4 * 2048 * 2048 + 2 * 2048 * 8192) + 50304 * 2048
    assert flops.multiplying_parameters(rw) == matrices
    # All queries against all keys would be 2 * 2 * N H * T a token forward; half of it, and twice as much backward.
    assert flops.train_flops_per_token(rw, 2048) == 6 * matrices + 24 * 3 * (4 * 32 * 64 * 2048) / 2
    norms = 32 * 2 * 4544 + 2 * 4544
    assert flops.multiplying_parameters(tied) == tied.num_parameters - norms
    # Untied, the embedding is a lookup: of the two as large as it is, one counts.
    without_lookup = untied.num_parameters - 65024 * 4096
    assert flops.multiplying_parameters(untied) == without_lookup - (60 * 2 * 4096 + 2 * 4096)
    # Frozen, they have no gradients of their own.
    assert flops.train_flops_per_token(rw, 2048, is_frozen=True) == flops.train_flops_per_token(rw, 2048) - 2 * matrices
    # Measured by hand elsewhere: 48,700 tokens/s of falcon-rw-1b at 2048 are 413 TFLOP/s.
    assert 48_700 * flops.train_flops_per_token(rw, 2048) == pytest.approx(413e12, rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_stated_or_left_out(kind: str, teraflops: float | None) -> None:
    peak = flops.peak_flops(kind)
    assert peak is None if teraflops is None else math.isclose(peak or 0, teraflops * 1e12)
