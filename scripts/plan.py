"""Does it fit, and how fast would it be: before anything is loaded, for GPUs that need not be there.

With --train the real training step is compiled for the GPUs named: memory of each, what it exchanges, an estimate of
its time. With --search meshes are chosen for --gpus. Without --train: the weights and the cache of a model that only
runs. The exit code is 0 where it fits, 1 where it does not, 2 where the question makes no sense.

python scripts/plan.py --train --model falcon-40b --device a100-40 --data 3 --fsdp 4 --tensor 8 --stage 4 --remat stage
python scripts/plan.py --train --model falcon-7b --device h100 --gpus 64 --batch 512 --search
python scripts/plan.py --model falcon-40b --device h100 --tensor 2 --batch 4 --length 8192
"""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from falcon_jax.train.planning.devices import Device
    from falcon_jax.train.planning.job import Job, Layout

# What one kind of plan alone has a use for; --fsdp and --stage are refused where the mesh of a model that only runs is.
TRAINING = ("micro_batches", "rounds", "remat", "splits_sequence", "packed", "attention", "network")
SERVING = ("dtype", "weights")
CHOSEN = ("data", "fsdp", "tensor", "stage", "micro_batches", "rounds", "remat", "splits_sequence")  # by a search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    model: str = "falcon-40b"
    """Name of a preset, or path of a Hugging Face config.json."""
    device: str = "a100-40"
    """a100-40, a100-80, h100 or h200: the SXM modules, eight in a machine."""
    train: bool = False
    """Plan a training step; else a model that only runs."""
    search: bool = False
    """Try meshes and remat policies for --gpus: all by arithmetic, the best --compile of them in earnest."""
    compile: int | None = None
    """Layouts that a search compiles; 4 if left out."""
    gpus: int | None = None
    """GPUs in all; what --fsdp, --tensor and --stage leave of them is --data."""
    batch: int | None = None
    """Rows a step, over all GPUs; the published run's if left out. Of a model that only runs: rows at a time (1)."""
    length: int = 2048
    """Tokens a row."""
    micro_batches: int | None = None
    """Parts of a batch that follow one another; one row a GPU each if left out, which takes the least memory and,
    outside of a pipeline, the most time."""
    data: int | None = None
    """GPUs that split the rows, and the training state where fsdp * data divides the model's width."""
    fsdp: int | None = None
    """GPUs that split the rows and the weights; 1 if left out, as the next three."""
    tensor: int | None = None
    """GPUs that split heads, MLP and vocabulary."""
    stage: int | None = None
    """GPUs that split the layers, as stages of a pipeline."""
    rounds: int | None = None
    """Times that a micro-batch goes around a pipeline's stages."""
    remat: Literal["none", "block", "products", "stage"] | None = None
    """What the backward pass computes again, as for train.py; block if left out."""
    splits_sequence: bool = False
    """Between blocks, split tokens over --tensor."""
    packed: bool = False
    """Rows hold several documents that do not see each other."""
    attention: str | None = None
    """Attention implementation: "mosaic" (Hopper GPUs), "cudnn" or "xla"; the best that works by default."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Of a model that only runs; bfloat16 if left out."""
    weights: Literal["native", "int8", "int4"] | None = None
    """Of a model that only runs: its blocks' projections in dtype (native, if left out), or in 8 or 4 bits."""
    network: float | None = None
    """GB/s that a GPU can send to another machine, where not the device's usual (25 x 0.91 for A100s, twice that for
    Hopper). A cloud's machine with 400 Gb/s for eight GPUs has 6.25."""
    memory_share: float | None = None
    """Share of a device's memory that a plan may fill; 0.8 if left out."""
    json: bool = False
    """Also everything as JSON, as the last line."""


def check(arguments: Arguments) -> None:
    """Refuses what would change nothing."""
    from falcon_jax.errors import ConfigError

    def refuse(names: tuple[str, ...], why: str) -> None:
        for name in names:
            value = getattr(arguments, name)
            if value is not None and value is not False:
                raise ConfigError(f"--{name.replace('_', '-')} {why}")

    if not arguments.train:
        refuse(("search", "compile", *TRAINING), "is for training: add --train")
        return
    refuse(SERVING, "is for a model that only runs: leave it out, or --train")
    if arguments.search:
        refuse(CHOSEN, "is what --search chooses: leave one of the two out")
    else:
        refuse(("compile",), "is for a search: add --search")


def device_of(arguments: Arguments) -> "Device":
    from falcon_jax.train.planning import devices

    changes: dict[str, float] = {}
    if arguments.network is not None:
        changes["network_bytes_per_s"] = arguments.network * 1e9
    if arguments.memory_share is not None:
        changes["usable_share"] = arguments.memory_share
    return dataclasses.replace(devices.named(arguments.device), **changes)


def mesh_of(arguments: Arguments) -> "Layout":
    """One micro-batch yet. Raises: ConfigError where the sizes do not come out as --gpus."""
    from falcon_jax.errors import ConfigError
    from falcon_jax.train.planning.job import Layout

    fsdp, tensor, stage = (1 if size is None else size for size in (arguments.fsdp, arguments.tensor, arguments.stage))
    inner = fsdp * tensor * stage
    if min(fsdp, tensor, stage) < 1:
        raise ConfigError("--fsdp, --tensor and --stage must be at least 1")
    data, gpus = arguments.data, arguments.gpus
    if data is None:
        data, rest = divmod(inner if gpus is None else gpus, inner)
        if rest or not data:
            raise ConfigError(f"--gpus is {gpus}; fsdp * tensor * stage = {inner} must divide it")
    layout = Layout(data=data, fsdp=fsdp, tensor=tensor, stage=stage)
    if gpus is not None and layout.num_devices != gpus:
        raise ConfigError(f"--gpus is {gpus}, but data * fsdp * tensor * stage = {layout.num_devices}")
    return layout


def job_of(arguments: Arguments) -> "Job":
    from falcon_jax.config import FalconConfig
    from falcon_jax.errors import ConfigError
    from falcon_jax.train.planning.job import Job
    from falcon_jax.train.recipes import RECIPES

    config, device, layout = FalconConfig.named(arguments.model), device_of(arguments), mesh_of(arguments)
    rows = arguments.batch
    if rows is None:
        if arguments.model not in RECIPES:
            raise ConfigError(f"give --batch: the batch of no published run of {arguments.model} is known")
        rows = RECIPES[arguments.model].batch_rows
    micro_batches = arguments.micro_batches
    if micro_batches is None:
        micro_batches = max(1, rows // layout.num_row_shards)
    layout = dataclasses.replace(
        layout,
        num_micro_batches=micro_batches,
        pipeline_rounds=1 if arguments.rounds is None else arguments.rounds,
        remat=arguments.remat or "block",
        splits_sequence=arguments.splits_sequence,
    )
    return Job(
        config=config,
        device=device,
        layout=layout,
        rows=rows,
        length=arguments.length,
        packed=arguments.packed,
        attention=arguments.attention,
    )


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def plan_training(arguments: Arguments) -> tuple[bool, dict[str, Any]]:
    """Whether it fits, and all that is known."""
    from falcon_jax.train.planning import plan, report

    job = job_of(arguments)
    progress(f"compiling the step of {arguments.model} for {job.num_devices} x {job.device.name}: {job.layout}")
    made = plan.make(job)
    print("\n".join(report.lines(made)))
    return made.fits, {"model": arguments.model, **made.record()}


def search_meshes(arguments: Arguments) -> tuple[bool, dict[str, Any]]:
    from falcon_jax.errors import ConfigError
    from falcon_jax.train.planning import report
    from falcon_jax.train.planning.search import search

    num_compiled = 4 if arguments.compile is None else arguments.compile
    if arguments.gpus is None or arguments.gpus < 1 or num_compiled < 1:
        raise ConfigError("--search takes --gpus of at least 1, and --compile of at least 1")
    # Of the mesh only its size counts.
    job = job_of(dataclasses.replace(arguments, gpus=None, micro_batches=1))
    plans = search(job, arguments.gpus, num_compiled, progress)
    print("\n".join([*report.table(plans), "", *report.lines(plans[0], is_chosen=True)]))
    return plans[0].fits, {"model": arguments.model, "plans": [plan.record() for plan in plans]}


def plan_serving(arguments: Arguments) -> tuple[bool, dict[str, Any]]:
    from falcon_jax.config import FalconConfig
    from falcon_jax.errors import ConfigError
    from falcon_jax.train.planning import report
    from falcon_jax.train.planning.serving import serve

    layout = mesh_of(arguments)
    if layout.fsdp * layout.stage > 1:
        raise ConfigError("a model that only runs takes --tensor, and no --fsdp or --stage")
    rows, rest = divmod(1 if arguments.batch is None else arguments.batch, layout.data)
    if rest:
        raise ConfigError(f"batch is {arguments.batch} rows; data = {layout.data} must divide it")
    made = serve(
        FalconConfig.named(arguments.model),
        device_of(arguments),
        rows=rows,
        length=arguments.length,
        tensor=layout.tensor,
        dtype=arguments.dtype or "bfloat16",
        weights=arguments.weights or "native",
    )
    print("\n".join(report.serving_lines(made)))
    return made.fits, {"model": arguments.model, **made.record()}


def main() -> int:
    """The exit code: 0 it fits, 1 it does not, 2 not to be planned, 130 interrupted."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from falcon_jax.errors import exit_code  # late: --help need not wait for JAX

    def work() -> int:
        check(arguments)
        training = search_meshes if arguments.search else plan_training
        fits, record = (training if arguments.train else plan_serving)(arguments)
        if arguments.json:
            print(json.dumps(record))
        return 0 if fits else 1

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
