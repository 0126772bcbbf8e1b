"""Meshes and remat policies for given GPUs: many by arithmetic, the promising ones compiled.

The arithmetic is rough (a factor of 1.3 off is usual) and only decides what is worth a compilation; what is reported is
of compiled steps alone. Of each mesh the arithmetically fastest variant that may fit goes on; where there are fewer
meshes than may be compiled, as for one GPU, the next best variants too.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.train import flops
from falcon_jax.train.planning import cost
from falcon_jax.train.planning.devices import GPUS_PER_MACHINE
from falcon_jax.train.planning.job import Job, Layout, mesh_of_nothing
from falcon_jax.train.planning.plan import Plan, make

MAX_STAGES = 16
ROWS_A_DEVICE = (1, 2, 4, 8, 16, 32)
MIXED_BYTES = 2 + 4  # of a parameter while a step runs: bfloat16, and its gradient's float32 sum
STATE_BYTES = 12  # of a parameter between steps: float32 weight and two moments


@dataclasses.dataclass(frozen=True, order=True)
class Guess:
    """By arithmetic, of one GPU."""

    step_s: float
    peak_bytes: float


def search(
    job: Job, num_devices: int, num_compiled: int, on_progress: Callable[[str], None] = lambda line: None
) -> list[Plan]:
    """Plans for the job's model and batch, the best first: those that fit by time, then those that do not by size.

    Args:
      job: all but its layout, which is chosen here.
      num_compiled: how many steps are compiled, each of which takes up to minutes.
      on_progress: gets a line before and after each compilation.

    Raises: ConfigError where no mesh of so many GPUs takes the batch.
    """
    found = [(guess(candidate), candidate) for candidate in candidates(job, num_devices)]
    if not found:
        raise ConfigError(
            f"no mesh of {num_devices} GPUs divides a batch of {job.rows} rows and {job.config.num_layers} layers"
        )
    chosen, num_meshes = _promising(found, num_compiled)
    on_progress(
        f"{len(found)} layouts on {num_meshes} meshes by arithmetic; the {len(chosen)} most promising are compiled"
    )
    plans = []
    for number, (guessed, candidate) in enumerate(chosen, 1):
        on_progress(
            f"[{number}/{len(chosen)}] {candidate.layout}: by arithmetic {guessed.peak_bytes / 1e9:.1f} GB, "
            f"{guessed.step_s:.2f} s"
        )
        plan = make(candidate)
        plans.append(plan)
        on_progress(
            f"[{number}/{len(chosen)}] compiled in {plan.compiled.seconds:.0f} s: {plan.peak_bytes / 1e9:.1f} GB, "
            f"{plan.times.step_s:.2f} s, {'fits' if plan.fits else 'does not fit'}"
        )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.times.step_s if plan.fits else plan.peak_bytes))


def _promising(found: list[tuple[Guess, Job]], count: int) -> tuple[list[tuple[Guess, Job]], int]:
    """So many of them, the best of each mesh before any mesh's second; and how many meshes there are."""
    firsts: list[tuple[Guess, Job]] = []
    others: list[tuple[Guess, Job]] = []
    seen: set[tuple[int, ...]] = set()
    for pair in sorted(found, key=lambda pair: _rank(*pair)):
        mesh = tuple(pair[1].layout.sizes.values())
        (others if mesh in seen else firsts).append(pair)
        seen.add(mesh)
    return [*firsts, *others][:count], len(seen)


def _rank(found: Guess, job: Job) -> tuple[bool, float]:
    """What may fit, by time; then what will not, by size."""
    may_fit = found.peak_bytes <= job.device.usable_bytes
    return not may_fit, found.step_s if may_fit else found.peak_bytes


def candidates(job: Job, num_devices: int) -> Iterator[Job]:
    """The job with every layout worth a thought: "tensor" inside a machine, stages that divide the layers."""
    for tensor, stage in itertools.product(_divisors(num_devices), _divisors(num_devices)):
        if tensor > GPUS_PER_MACHINE or stage > MAX_STAGES or num_devices % (tensor * stage):
            continue
        if job.config.mlp_width % tensor:  # most of the work would be done on each of them
            continue
        replicas = num_devices // (tensor * stage)
        for fsdp in _divisors(replicas):
            if fsdp == 1 or job.config.width % fsdp == 0:  # else nothing would be split over it
                mesh = Layout(data=replicas // fsdp, fsdp=fsdp, tensor=tensor, stage=stage)
                yield from _variants(job, mesh)


def _variants(job: Job, mesh: Layout) -> Iterator[Job]:
    policies = ("none", "products", "block", "stage") if mesh.stage > 1 else ("none", "products", "block")
    rounds = (1, 2, 3, 4) if mesh.stage > 1 else (1,)
    splits = (False, True) if mesh.tensor > 1 and job.length % mesh.tensor == 0 else (False,)
    for rows, remat, num_rounds, split in itertools.product(ROWS_A_DEVICE, policies, rounds, splits):
        micro_batches, rest = divmod(job.rows, mesh.num_row_shards * rows)
        if rest or not micro_batches or micro_batches % mesh.stage or job.config.num_layers % (mesh.stage * num_rounds):
            continue
        layout = dataclasses.replace(
            mesh, num_micro_batches=micro_batches, remat=remat, pipeline_rounds=num_rounds, splits_sequence=split
        )
        yield dataclasses.replace(job, layout=layout)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


# The arithmetic.


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Parameters that one device holds: in the state; while they are computed with, of a layer and of the two ends; and
    of a layer whose weights were gathered over "fsdp"."""

    state: float
    layer: float
    ends: float
    gathered_layer: float


def guess(job: Job) -> Guess:
    return Guess(_step_seconds(job), _peak_bytes(job))


@functools.lru_cache(maxsize=4096)
def _sizes(config: FalconConfig, sizes: tuple[int, ...]) -> _Sizes:
    mesh = mesh_of_nothing(**dict(zip(sharding.AXES, sizes, strict=True)))
    stage, fsdp = mesh.shape["stage"], mesh.shape["fsdp"]
    by_part, state = {True: 0.0, False: 0.0}, 0.0
    for path, leaf in _leaves(config).items():
        count, in_layer = math.prod(leaf.shape), path.startswith("layers.")
        spec = sharding.state_spec(path, leaf.shape, mesh)
        over = [axis for axes in sharding.axes_by_dimension(spec) for axis in axes]
        own = count * (config.num_layers / stage if in_layer else 1)
        state += own / math.prod(mesh.shape[axis] for axis in over)
        by_part[in_layer] += count / (mesh.shape["tensor"] if "tensor" in over else 1)
    gathered = fsdp > 1 and stage == 1
    share = fsdp if gathered else 1
    return _Sizes(state, by_part[True] / share, by_part[False] / share, by_part[True] if gathered else 0.0)


@functools.lru_cache(maxsize=8)
def _leaves(config: FalconConfig) -> dict:
    """The parameters of the ends and of one layer."""
    one = dataclasses.replace(config, num_layers=1)
    return model_params.flatten(model_params.abstract(one, jnp.float32))


_flops_per_token = functools.lru_cache(maxsize=8)(flops.train_flops_per_token)


def _peak_bytes(job: Job) -> float:
    config, layout = job.config, job.layout
    sizes = _sizes(config, tuple(layout.sizes.values()))
    tokens = job.rows_a_device * job.length
    layers = config.num_layers / layout.stage
    weights = STATE_BYTES * sizes.state + MIXED_BYTES * (sizes.layer * layers + sizes.ends)
    weights += 3 * MIXED_BYTES * sizes.gathered_layer  # the next layer's weights are gathered while one's are used
    residual = 2 * tokens * config.width / (layout.tensor if layout.splits_sequence else 1)
    kept = {"none": _kept_bytes(job, tokens), "products": _kept_bytes(job, tokens) / 2}
    kept["stage"] = kept["none"]
    a_layer = kept.get(layout.remat, residual)
    working = 2 * kept["none"]  # of the block whose backward pass runs
    if layout.stage == 1:
        activations = layers * a_layer
    else:
        ticks = layout.num_micro_batches * layout.pipeline_rounds + layout.stage - 1
        in_a_tick = layers / layout.pipeline_rounds * a_layer
        activations = 2 * ticks * residual + in_a_tick * (ticks if layout.remat == "none" else 1)
    logits = 10 * min(4096, tokens) * config.vocab_size / layout.tensor
    return weights + activations + max(working, logits)


def _kept_bytes(job: Job, tokens: int) -> float:
    """What a layer's backward pass needs, bfloat16: norms, projections, and the MLP before and after its GELU."""
    config = job.config
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return 2 * tokens * (5 * config.width + (heads + 2 * config.mlp_width) / job.layout.tensor)


def _step_seconds(job: Job) -> float:
    config, layout, device = job.config, job.layout, job.device
    sizes = _sizes(config, tuple(layout.sizes.values()))
    needed = _flops_per_token(config, job.length) * job.num_tokens / job.num_devices
    # Of a step's FLOPs, what is computed again: products, all of a block; in a pipeline also the whole tick.
    again = {"none": 0.0, "products": 0.05, "block": 0.25, "stage": 0.0}[layout.remat]
    again += 0.25 if layout.stage > 1 and layout.remat != "none" else 0.0
    tokens = job.num_tokens / layout.num_row_shards  # that pass through one device's layers
    layers = config.num_layers / layout.stage
    moved = 2 * tokens * layers * (30 * config.width + 10 * config.mlp_width / layout.tensor)
    whole = (sizes.layer * layers + sizes.ends) * (layout.fsdp if layout.stage == 1 else 1)
    # Each micro-batch reads the weights in bfloat16, forward and backward, and adds to gradients in float32.
    moved += layout.num_micro_batches * (2 + 2 + 8) * whole
    computing = needed * (1 + again) / (device.product_share * device.peak_flops)
    computing += moved / (device.memory_share * device.memory_bytes_per_s)
    idle = (layout.stage - 1) / (layout.num_micro_batches * layout.pipeline_rounds)

    def exchange(axis: str, num_bytes: float) -> float:
        size = layout.sizes[axis]
        if size == 1:
            return 0.0
        together = min(size, max(1, GPUS_PER_MACHINE // _inner(layout, axis)))
        return num_bytes * (size - 1) / size / cost.bytes_per_s(size, together, device)

    block_sums = 4 if config.block == "parallel" else 8  # forward, backward, and forward again
    tensor = exchange("tensor", 2 * (block_sums - (again == 0)) * layers * tokens * 2 * config.width)
    # Gathered twice in bfloat16 and summed once in float32: for each micro-batch, in a pipeline once.
    fsdp = exchange("fsdp", 8 * whole * (layout.num_micro_batches if layout.stage == 1 else 1))
    data = exchange("data", 6 * whole / (layout.fsdp if layout.stage == 1 else 1))
    return (computing + tensor) * (1 + idle) + fsdp + data


def _inner(layout: Layout, axis: str) -> int:
    """Devices that lie between neighbours along an axis (sharding.make_mesh: tensor, fsdp, data, stage)."""
    order = ("tensor", "fsdp", "data", "stage")
    return math.prod(layout.sizes[each] for each in order[: order.index(axis)])
