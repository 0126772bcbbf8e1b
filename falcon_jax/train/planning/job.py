"""What is to be trained and over which GPUs: the one description that all of a plan's parts share."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import pipeline
from falcon_jax.train import step as train_step
from falcon_jax.train.planning.devices import GPUS_PER_MACHINE, Device
from falcon_jax.train.step import StepOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh's axes, and what goes with them."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    stage: int = 1
    num_micro_batches: int = 1
    pipeline_rounds: int = 1
    remat: str = "block"
    splits_sequence: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in sharding.AXES}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def num_row_shards(self) -> int:
        return self.data * self.fsdp

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1) or "one GPU"
        extras = [f"{self.num_micro_batches} micro-batches", f"remat {self.remat}"]
        extras += [f"{self.pipeline_rounds} rounds"] if self.pipeline_rounds > 1 else []
        extras += ["tokens split over tensor"] if self.splits_sequence else []
        return ", ".join([mesh, *extras])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training step of `rows` rows of `length` tokens with `layout` on GPUs of one kind.

    packed: documents of a row do not see each other. attention: implementation by name, None for the best.

    Raises: ConfigError where rows, layers or GPUs do not come out even, or a part of the layout would change nothing.
    """

    config: FalconConfig
    device: Device
    layout: Layout
    rows: int
    length: int = 2048
    packed: bool = False
    attention: str | None = None

    def __post_init__(self) -> None:
        layout = self.layout
        sizes = {**layout.sizes, "micro-batches": layout.num_micro_batches, "rounds": layout.pipeline_rounds}
        sizes |= {"batch": self.rows, "length": self.length}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} is {size}; it must be at least 1")
        if self.num_devices > GPUS_PER_MACHINE and self.num_devices % GPUS_PER_MACHINE:
            raise ConfigError(
                f"{layout} takes {self.num_devices} GPUs; beyond {GPUS_PER_MACHINE} they come in machines of as many"
            )
        parts = layout.num_row_shards * layout.num_micro_batches
        if self.rows % parts:
            raise ConfigError(
                f"batch is {self.rows} rows; data * fsdp * micro-batches = {layout.num_row_shards} * "
                f"{layout.num_micro_batches} = {parts} must divide it"
            )
        if layout.stage > 1:
            pipeline.layers_a_round(self.config.num_layers, layout.stage, layout.pipeline_rounds)
            if layout.num_micro_batches % layout.stage:
                raise ConfigError(
                    f"there are {layout.num_micro_batches} micro-batches; a pipeline takes a multiple of its "
                    f"{layout.stage} stages"
                )
        elif layout.remat == "stage":
            raise ConfigError("remat 'stage' is for a pipeline (stage above 1); take 'block'")
        elif layout.pipeline_rounds > 1:
            raise ConfigError(
                f"rounds is {layout.pipeline_rounds}, which a pipeline alone has (stage above 1); leave it at 1"
            )
        if layout.splits_sequence and layout.tensor == 1:
            raise ConfigError("tokens are to be split over tensor, which is 1; take more, or leave splits-sequence out")

    @property
    def num_devices(self) -> int:
        return self.layout.num_devices

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.rows * self.length

    @property
    def rows_a_device(self) -> int:
        """Of a micro-batch."""
        return self.rows // (self.layout.num_row_shards * self.layout.num_micro_batches)

    def options(self) -> StepOptions:
        return StepOptions(
            num_micro_batches=self.layout.num_micro_batches,
            pipeline_rounds=self.layout.pipeline_rounds,
            splits_sequence=self.layout.splits_sequence,
            separator=0 if self.packed else None,  # which token it is changes no program's size
        )

    def forward(self) -> ForwardOptions:
        return ForwardOptions(attention=self.attention, remat=self.layout.remat)

    def tokens_shape(self) -> tuple[int, int, int]:
        """[A, R, T+1], as the step takes a batch."""
        A = self.layout.num_micro_batches
        return A, self.rows // A, self.length + 1


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """What one device holds between steps, exactly."""

    parameters: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer


def state_bytes(job: Job) -> StateBytes:
    """Without a device, and before anything is compiled."""
    state = train_step.abstract_state(job.config, job.options(), mesh_of_nothing(**job.layout.sizes))
    parameters = bytes_a_device(state.pop("params"))
    return StateBytes(parameters, bytes_a_device(state))


def unsplit_shares(job: Job) -> dict[str, float]:
    """What ZeRO loses: as sharding.unsplit_shares."""
    leaves = model_params.flatten(model_params.abstract(job.config, jnp.float32))
    return sharding.unsplit_shares(leaves, mesh_of_nothing(**job.layout.sizes))


def mesh_of_nothing(**sizes: int) -> Mesh:
    """A mesh whose devices are numbers: enough to lay arrays out over, on a machine that has no such devices."""
    return sharding.make_mesh(**sizes, devices=range(math.prod(sizes.values())))


def bytes_a_device(tree: Any) -> int:
    """Of the arrays of a tree that one device holds; its leaves are jax.ShapeDtypeStructs with a NamedSharding."""
    return sum(map(_bytes_of_leaf, jax.tree.leaves(tree)))


def _bytes_of_leaf(leaf: jax.ShapeDtypeStruct) -> int:
    where: Any = leaf.sharding
    # `shard_shape` would ask the mesh's devices what they are.
    over = [axis for axes in sharding.axes_by_dimension(where.spec) for axis in axes]
    num_shards = math.prod(where.mesh.shape[axis] for axis in over)
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize // num_shards
