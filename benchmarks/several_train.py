"""A training step over several devices: the step of scripts/train.py, timed as in training_measure.py."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np

from benchmarks import hardware, measure, training_measure
from benchmarks.places import Say
from benchmarks.several_decode import peaks
from benchmarks.several_jobs import Job, Layout, Result, half_dtype
from benchmarks.training_cases import Variant, Work
from benchmarks.training_measure import LEARNING_RATE, SEED, Timing
from benchmarks.training_ours import OurTrainer
from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.train import step as train_step
from falcon_jax.train.flops import peak_flops

# What one device must hold for each parameter: weights and two moments in float32, the gradient, the rounded weight.
BYTES_A_PARAMETER = 3 * 4 + 4 + 2
STATE_SHARE = 0.65  # of its memory; the rest is for activations


class MeshTrainer(OurTrainer):
    """A training state over a mesh and its compiled step."""

    def __init__(self, work: Work, variant: Variant, layout: Layout):
        mesh = layout.mesh()
        if mesh is None:
            super().__init__(work, variant)
            return
        options = variant.step
        rows = work.tokens(variant.batch_size).reshape(options.num_micro_batches, -1, work.length + 1)
        tokens = jax.device_put(rows, sharding.micro_batches_sharding(mesh))
        self.step: Any = train_step.make_train_step(work.config, options, variant.forward, mesh)
        self.state = train_step.init_state(work.config, options, SEED, mesh)
        self.arguments: tuple[Any, ...] = (tokens, np.float32(LEARNING_RATE))
        jax.block_until_ready((self.state, self.arguments))
        self.compiled: Any = None
        self.metrics: list[dict[str, jax.Array]] = []
        # Of all devices together.
        self.found: dict[str, Any] = {"state_gib": model_params.num_bytes(self.state) / measure.GIB}
        self.peak_before = hardware.peak_bytes()


@dataclasses.dataclass(frozen=True)
class OverMesh(training_measure.Contestant):
    """falcon_jax over a mesh, as data."""

    name: ClassVar[str] = measure.Ours.name
    ours: ClassVar[bool] = True
    work: Work
    variant: Variant
    platform: str
    layout: Layout

    @property
    def settings(self) -> dict[str, Any]:
        return self.variant.settings | {"layout": str(self.layout)}

    def load(self) -> MeshTrainer:
        return MeshTrainer(self.work, self.variant, self.layout)


@dataclasses.dataclass(frozen=True)
class Train(Job):
    """Tokens a second of `rows` rows a device and step."""

    part: ClassVar[str] = "train"
    model: str
    config: FalconConfig
    layout: Layout
    length: int
    rows: int
    remat: str
    timing: Timing
    timeout_s: float

    @property
    def name(self) -> str:
        return f"{self.model}, {self.config.num_layers} layers, {self.layout}"

    @property
    def process(self) -> Any:
        return self.name

    def run(self, say: Say) -> Iterator[Result]:
        work, count = Work(self.config, self.length), self.layout.num_devices
        settings = {"batch_size": self.rows * count, "remat": self.remat, "compute_dtype": half_dtype()}
        variant = Variant.of(settings)
        contestant = OverMesh(work, variant, jax.default_backend(), self.layout)
        about = {"model": self.model, "num_layers": self.config.num_layers, "layout": str(self.layout)}
        about |= {"num_devices": count, "length": self.length, "rows_a_device": self.rows}
        for found in training_measure.run(contestant, self.timing, say=say):
            figures = {key: value for key, value in found.items() if key not in ("name", "ours")}
            if "tokens_per_s" in figures:
                figures |= peaks(self.layout) | shares(self.config, figures, count)
            yield about | figures


def shares(config: FalconConfig, figures: Result, count: int) -> Result:
    """Six FLOPs a parameter and token on each device, and the share that they are of what its maker promises (MFU).

    model_mfu counts attention too, and what multiplies alone; see falcon_jax/train/flops.py.
    """
    flops = 6 * config.num_parameters * figures["tokens_per_s"] / count
    promised = peak_flops(jax.devices()[0].device_kind)
    model_mfu = None if promised is None else 1e12 * figures["model_tflops_per_s"] / count / promised
    return {
        "tflops_per_s_a_device": flops / 1e12,
        "mfu": None if promised is None else flops / promised,
        "model_mfu": model_mfu,
    }


def layers_for_one_device(config: FalconConfig, memory_bytes: int) -> int:
    """The most layers, by halves, whose training state leaves one device room for activations; at least one."""
    num_layers = config.num_layers
    while num_layers > 1:
        cut = dataclasses.replace(config, num_layers=num_layers)
        if BYTES_A_PARAMETER * cut.num_parameters <= STATE_SHARE * memory_bytes:
            break
        num_layers //= 2
    return num_layers


def jobs(
    model: str,
    config: FalconConfig,
    count: int,
    memory_bytes: int,
    length: int,
    rows: int,
    remat: str,
    timing: Timing,
    timeout_s: float,
) -> list[Job]:
    """The whole model over `count` devices, then as much of it as one device holds: on one, and over all of them."""
    cut = dataclasses.replace(config, num_layers=layers_for_one_device(config, memory_bytes))
    wanted = [
        (config, Layout(fsdp=count)),
        (cut, Layout()),
        (cut, Layout(fsdp=count)),
        (cut, Layout(data=count)),
    ]
    return [Train(model, one, layout, length, rows, remat, timing, timeout_s) for one, layout in dict.fromkeys(wanted)]
