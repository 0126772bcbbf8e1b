"""Checks and measures falcon_jax over all GPUs of one machine (2, 4 or 8), the most important first, in one run.

What is computed over meshes beside one device (correct), decoding beside one device and CUDA graphs with collectives
in them (decode, graphs), a training step (train), and checkpoints onto meshes (load). What fails, hangs or lacks memory
is a result with its reason, and the others go on. Progress goes to stderr, bars to stdout, and the last line is one
JSON document. The exit code is 1 if something was wrong or failed.

python benchmarks/several_gpus.py --max-seconds 540 --save several
python benchmarks/several_gpus.py --only decode --counts 1 8 --weights native --max-seconds 540 --save several-decode
python benchmarks/several_gpus.py --devices cpu --num-devices 4 --tiny
"""

import dataclasses
import functools
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from falcon_jax import options as shared
from falcon_jax.errors import RequestError

if TYPE_CHECKING:
    from benchmarks.places import Place
    from benchmarks.several_jobs import Job, Layout

REPOSITORY = Path(__file__).parents[1]
# Of a device that falcon-180b in bfloat16 is measured on: what JAX has of an H200's 141 GB, roughly.
LARGE_DEVICE_BYTES = 120e9
MAX_CPU_DEVICES = 8
Part = Literal["correct", "decode", "train", "load", "graphs"]
PARTS: tuple[Part, ...] = ("correct", "decode", "train", "load", "graphs")
ModelName = Literal["falcon-7b", "falcon-40b", "falcon-40b-alibi", "falcon-rw-1b"]
MODELS: tuple[ModelName, ...] = ("falcon-40b-alibi", "falcon-7b", "falcon-40b", "falcon-rw-1b")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What arguments are if left out. None: all layers."""

    decode_layers: int | None = None
    context: int = 4000
    new_tokens: int = 128
    train_layers: int | None = None
    length: int = 2048
    rows: int = 8
    load_layers: int | None = 8
    graph_layers: int | None = 8
    graph_steps: int = 3000


TINY = Sizes(context=64, new_tokens=8, length=32, rows=1, load_layers=None, graph_layers=None, graph_steps=96)


@dataclasses.dataclass(frozen=True)
class Arguments:
    only: tuple[Part, ...] = ()
    """Some of the parts instead of all."""
    models: tuple[ModelName, ...] = ()
    """Of the part correct: some of its shapes instead of all."""
    counts: tuple[int, ...] = ()
    """Numbers of devices, powers of two; 1, 2, 4 and 8, as far as there are, if left out. Decoding compares with 1;
    training, loading and graphs take the largest."""
    devices: Literal["cpu", "gpu"] | None = None
    """cpu: simulated devices, in this process; what JAX finds if left out."""
    num_devices: int | None = None
    """Of these so many; all if left out, of a CPU 8."""
    tiny: bool = False
    """Small shapes and short runs: the whole way without a GPU."""
    num_layers: int = 2
    """Layers that the shapes of the part correct are cut to."""
    weights: tuple[Literal["native", "int8"], ...] = ("native", "int8")
    """Of decoding."""
    batches: tuple[int, ...] = (1, 16)
    """Rows of decoding."""
    sums: Literal["peers", "xla"] | None = None
    """What adds up, in decoding, what several devices have made: the kernels, or XLA; the kernels where they can."""
    decode_layers: int | None = None
    """Layers of what decodes; all if left out."""
    context: int | None = None
    """Tokens before decoding; 4000 if left out."""
    new_tokens: int | None = None
    """Tokens to decode; 128 if left out."""
    repeats: int = 3
    """Runs or measurements that medians are of."""
    train_layers: int | None = None
    """Layers of what trains; all if left out, and on one device as many as fit."""
    length: int | None = None
    """Tokens a row in training; 2048 if left out."""
    rows: int | None = None
    """Rows a device in training; 8 if left out."""
    remat: Literal["none", "products", "block"] = "none"
    """What training's backward pass computes again."""
    train_steps: int | None = None
    """Steps of one measurement in training; as many as take two seconds if left out."""
    load_layers: int | None = None
    """Layers of the checkpoint; 8 if left out, which take 12 GB on disk."""
    folder: Path | None = None
    """Where checkpoints are put for a while; the system's folder for such if left out."""
    graph_layers: int | None = None
    """Layers of what decodes with and without graphs; 8 if left out."""
    graph_steps: int | None = None
    """Steps of it; 3000 if left out."""
    graph_timeout_s: float = 120.0
    """After so long one of these variants is ended as hung."""
    job_timeout_s: float = 300.0
    """After so long without a result anything else is."""
    max_seconds: float | None = None
    """Begin nothing that, as slow as the slowest of its part so far, would not be done by then."""
    compilation_cache: shared.CompilationCache = None
    save: str | None = None
    """Also writes the document to benchmarks/results/SAVE.json, anew after each result."""


def main(arguments: Arguments) -> dict[str, Any]:
    begin = time.perf_counter()
    check(arguments)
    import jax

    from benchmarks import command, hardware, several_decode, several_jobs, several_report
    from benchmarks.clock import Clock
    from falcon_jax import commands

    counts = counts_of(arguments, len(jax.devices()))
    commands.use_compilation_cache(arguments.compilation_cache)
    jobs = make_jobs(arguments, counts, hardware.memory_bytes())
    document: dict[str, Any] = {
        "benchmark": "several GPUs",
        "counts": counts,
        "tiny": arguments.tiny,
        "results": [],
        "bars": [],
        "load_average": [os.getloadavg()[0], None],
        "seconds": 0.0,
        "command": shlex.join(["python", "benchmarks/several_gpus.py", *sys.argv[1:]]),
        "environment": {name: os.environ.get(name) for name in ("NCCL_NVLS_ENABLE", "XLA_FLAGS")},
        **hardware.describe(),
        "num_devices": len(jax.devices()),
    }
    tokens: dict[str | None, tuple[str, list[int]]] = {}
    place = functools.partial(place_of, arguments)
    for result in several_jobs.run(jobs, place, Clock(begin, arguments.max_seconds), command.say):
        document["results"].append(several_decode.with_agreement(result, tokens))
        document["bars"] = several_report.bars(document["results"])
        document["load_average"][1] = os.getloadavg()[0]
        document["seconds"] = round(time.perf_counter() - begin, 1)
        command.save(document, arguments.save)
    print(*several_report.lines(document), sep="\n", flush=True)
    return document


def check(arguments: Arguments) -> None:
    """Refuses numbers out of range. Raises: RequestError."""
    from benchmarks import command

    numbers = dataclasses.asdict(arguments).items()
    for name, value in numbers:
        least = 2 if name in ("num_devices", "new_tokens") else 1
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int | float) and not isinstance(one, bool) and one < least:
                raise RequestError(f"--{name.replace('_', '-')} is {one:g}; it must be at least {least}")
    command.check_name(arguments.save)


def counts_of(arguments: Arguments, num_found: int) -> list[int]:
    """Ascending numbers of devices. Raises: RequestError where there are too few."""
    num_devices = arguments.num_devices or num_found
    if num_devices > num_found:
        raise RequestError(f"--num-devices is {num_devices}; there are {num_found}")
    counts = sorted(set(arguments.counts)) or [2**i for i in range(num_devices.bit_length())]
    for count in counts:
        if count.bit_count() != 1 or count > num_devices:
            raise RequestError(f"--counts has {count}; it must be a power of two up to the {num_devices} devices")
    if counts[-1] < 2:
        raise RequestError(f"there must be several devices; --counts has {counts[-1]} at most, of {num_devices}")
    return counts


def make_jobs(arguments: Arguments, counts: list[int], memory_bytes: int) -> "list[Job]":
    """All that is to be measured, the most important first."""
    from benchmarks import several_decode, several_load, several_train
    from benchmarks.several_jobs import Layout, shape
    from benchmarks.training_measure import Timing

    sizes, most = sizes_of(arguments), counts[-1]
    shapes = functools.partial(shape, tiny=arguments.tiny)
    limit_s = arguments.job_timeout_s
    alibi = "falcon-40b-alibi"
    made: dict[str, list[Job]] = {
        "correct": list(compare_jobs(arguments, counts)),
        "decode": list(decode_jobs(arguments, counts, memory_bytes)),
        "train": several_train.jobs(
            "falcon-7b",
            shapes("falcon-7b", sizes.train_layers),
            most,
            memory_bytes,
            sizes.length,
            sizes.rows,
            arguments.remat,
            Timing(arguments.train_steps, arguments.repeats),
            limit_s,
        ),
        "load": several_load.jobs(
            alibi,
            shapes(alibi, sizes.load_layers),
            ("falcon-rw-1b", shapes("falcon-rw-1b", arguments.num_layers)),
            most,
            arguments.folder,
            limit_s,
        ),
        "graphs": [
            several_decode.Graphs(
                alibi,
                shapes(alibi, sizes.graph_layers),
                Layout(tensor=most),
                captured,
                sizes.graph_steps,
                arguments.graph_timeout_s,
            )
            for captured in several_decode.GRAPHS
        ],
    }
    return [job for part in PARTS if part in (arguments.only or PARTS) for job in made[part]]


def sizes_of(arguments: Arguments) -> Sizes:
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sizes)}
    chosen = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(TINY if arguments.tiny else Sizes(), **chosen)


def compare_jobs(arguments: Arguments, counts: list[int]) -> "Iterator[Job]":
    """Every shape over all devices' tensor axis, over mixed meshes, in training, and over fewer devices."""
    from benchmarks import several_correct
    from benchmarks.several_jobs import Layout, shape

    most, limit_s = counts[-1], arguments.job_timeout_s
    chosen = [name for name in MODELS if name in (arguments.models or MODELS)]
    shapes = {name: shape(name, arguments.num_layers, arguments.tiny) for name in chosen}

    def over(*layouts: "Layout") -> "Iterator[Job]":
        for name, config in shapes.items():
            yield from several_correct.jobs(name, config, list(layouts), limit_s)

    yield from over(Layout(tensor=most))
    yield from over(Layout(data=2, tensor=most // 2), Layout(fsdp=2, tensor=most // 2))
    for name, config in shapes.items():
        yield from several_correct.step_jobs(name, config, most, limit_s)
    yield from over(*(Layout(tensor=count) for count in reversed(counts[:-1]) if count > 1))


def decode_jobs(arguments: Arguments, counts: list[int], memory_bytes: int) -> "Iterator[Job]":
    """All devices and one, for each form of weights; falcon-180b after the first; then what lies between."""
    from benchmarks.limits import Workload
    from benchmarks.several_decode import Decode
    from benchmarks.several_jobs import Layout, shape

    sizes, most = sizes_of(arguments), counts[-1]

    def decode(model: str, count: int, weights: str, batches: tuple[int, ...]) -> "Job":
        config = shape(model, sizes.decode_layers, arguments.tiny)
        workloads = tuple(Workload(batch, sizes.context, sizes.new_tokens) for batch in batches)
        limit_s = arguments.job_timeout_s
        sums = arguments.sums if count > 1 else None
        return Decode(model, config, Layout(tensor=count), weights, workloads, arguments.repeats, limit_s, sums)

    ends = [most, *(count for count in counts if count == 1)]
    between = [count for count in reversed(counts) if count not in ends]
    for weights in arguments.weights:
        for count in ends:
            yield decode("falcon-40b-alibi", count, weights, arguments.batches)
        if weights == "native" and most >= 8 and memory_bytes >= LARGE_DEVICE_BYTES:
            yield decode("falcon-180b", most, weights, (1,))
    for weights in arguments.weights:
        for count in between:
            yield decode("falcon-40b-alibi", count, weights, arguments.batches)


def place_of(arguments: Arguments, job: "Job") -> "Place":
    """On GPUs a process of its own, whose end gives the memory back."""
    import jax

    from benchmarks import places, training

    if jax.default_backend() != "gpu":
        return places.here
    prepared = functools.partial(training.prepare, arguments.compilation_cache)

    def place(function: Any, *work: Any, say: Any) -> Iterator[Any]:
        # Here and not by `prepare`: a process reads the flags while it imports what it is to call.
        before = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{before} {job.xla_flags}".strip()
        try:
            yield from places.in_own_process(function, *work, say=say, prepare=prepared)
        finally:
            os.environ["XLA_FLAGS"] = before

    return place


def run() -> int:
    """The exit code: 0 done, 1 something was wrong or failed, 2 not to be done, 130 interrupted, 141 no reader."""
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.path.insert(0, str(REPOSITORY))  # for `benchmarks`, which no wheel holds
    from benchmarks import training

    # Before JAX starts, and for all processes. NVLink's multicast is off on some machines of several GPUs, where a
    # program that tries it does harm.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # This process must leave the GPUs' memory to those that measure.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", training.MEMORY_FRACTION)
    if arguments.devices is not None:
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[arguments.devices]
    if arguments.devices == "cpu":
        os.environ["JAX_NUM_CPU_DEVICES"] = str(arguments.num_devices or MAX_CPU_DEVICES)
    from benchmarks import command, several_report

    return command.finish(lambda: main(arguments), several_report.failures)


if __name__ == "__main__":
    sys.exit(run())
