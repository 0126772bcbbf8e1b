"""Measures a model's first token, decode speed and memory beside the hardware's limit and a peer, on this machine.

The limit comes first: what a decode step must read, and how fast this device reads that much. Then falcon_jax and the
peer, plain and compiled, generate the same tokens in turns, and medians count. The last line on stdout is one JSON
document. `--table seed` measures four rows of both 40B shapes instead; benchmarks/README.md shows it in parts.

python scripts/benchmark.py --model falcon-7b --batch 1 --context 4000 --new-tokens 128 --peer hf --save falcon-7b
python scripts/benchmark.py --table seed --save seed-h200
python scripts/benchmark.py --table seed --model falcon-40b --weights int8 --rows decode --peer none
"""

import dataclasses
import functools
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from falcon_jax import options as shared
from falcon_jax.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.measure import Contestant
    from benchmarks.places import Place
    from falcon_jax.config import FalconConfig

REPOSITORY = Path(__file__).parents[1]
# Of a single measurement; a table's rows have their own.
BATCH, CONTEXT, NEW_TOKENS, REPEATS = 1, 64, 128, 7


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: tuple[str, ...] = ()
    """A preset's name (random weights), or a folder; the bundled falcon-nano if left out. A table takes several."""
    batch: int | None = None
    """Prompts at once; 1 if left out."""
    context: int | None = None
    """Tokens of each prompt; 64 if left out."""
    new_tokens: int | None = None
    """Tokens to make after each, at least 2; 128 if left out. In a table: of the rows that decode."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """What falcon_jax computes in, and the peer with random weights; else the peer takes what the folder says."""
    weights: Literal["native", "int8", "int4"] = "native"
    """What falcon_jax keeps the blocks' projections in; native: the dtype. The peer's are always native."""
    peer: Literal["hf", "hf-plain", "hf-compiled", "none"] = "hf"
    """hf: transformers on the same weights, plain, and compiled with a static cache."""
    ours: bool = True
    """--no-ours measures the peer alone."""
    repeats: int | None = None
    """Runs that the medians are of; 7 if left out, in a table what the row says."""
    table: Literal["seed"] | None = None
    """seed: first token, decode speed, memory and 12,000 tokens of falcon-40b-alibi and falcon-40b."""
    rows: tuple[Literal["first_token", "decode", "peak", "long"], ...] = ()
    """Some of the table's rows instead of all."""
    scale: float | None = None
    """Multiplies the table's contexts: 0.01 tries it on a small machine."""
    start_up: bool = False
    """Also times scripts/generate.py from process start to first text; needs a folder with a tokenizer."""
    cuda_graphs: shared.CudaGraphs = "on"
    compilation_cache: shared.CompilationCache = None
    save: str | None = None
    """Also writes the document to benchmarks/results/SAVE.json; a table anew after each result."""


def main(arguments: Arguments) -> dict[str, Any]:
    check(arguments)
    from benchmarks import command
    from falcon_jax import commands

    commands.use_compilation_cache(arguments.compilation_cache)
    begin = time.perf_counter()
    load_before = os.getloadavg()[0]

    def finish(document: dict[str, Any]) -> dict[str, Any]:
        document |= {
            "load_average": [load_before, os.getloadavg()[0]],
            "seconds": round(time.perf_counter() - begin, 1),
            "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        }
        command.save(document, arguments.save)
        return document

    if arguments.table is None:
        return finish(measure_one(arguments))
    document: dict[str, Any] = {"benchmark": "table", "table": arguments.table}
    for _ in fill_table(document, arguments):
        finish(document)
    return finish(document)


def check(arguments: Arguments) -> None:
    """Refuses numbers out of range, and what does not go together."""
    from benchmarks import command

    for name, least in (("batch", 1), ("context", 1), ("new_tokens", 2), ("repeats", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise RequestError(f"--{flag} is {value}; it must be at least {least}")
    if arguments.scale is not None and not 0 < arguments.scale < float("inf"):
        raise RequestError(f"--scale is {arguments.scale}; it must be a number above 0")
    command.check_name(arguments.save)
    if not arguments.ours and arguments.peer == "none":
        raise RequestError("--no-ours with --peer none leaves nobody to measure; leave one of them out")
    if arguments.table is None:
        if arguments.rows or arguments.scale is not None:
            raise RequestError("--rows and --scale are a table's; add --table seed, or say --batch and --context")
        if len(arguments.model) > 1:
            raise RequestError(f"--model names {len(arguments.model)} models; one at a time, except in a --table")
    elif arguments.batch is not None or arguments.context is not None or arguments.start_up:
        raise RequestError("--batch, --context and --start-up are no table's; use --rows and --scale, or no --table")


def measure_one(arguments: Arguments) -> dict[str, Any]:
    """The document of one model and one workload."""
    from benchmarks import measure
    from benchmarks.limits import Workload, measured_limits

    name, config, folder = find_model(arguments.model[0] if arguments.model else None)
    if arguments.start_up and (folder is None or not (folder / "tokenizer.json").is_file()):
        raise RequestError("--start-up needs a model folder with a tokenizer.json")
    entered = contestants(arguments, config, folder)
    together = measure.fit_together(entered)
    groups = [entered] if together else [[contestant] for contestant in entered]
    place = choose_place(arguments, together)
    workload = Workload(arguments.batch or BATCH, arguments.context or CONTEXT, arguments.new_tokens or NEW_TOKENS)
    case = measure.Case("generate", workload, arguments.repeats or REPEATS)

    warn_if_busy()
    say(f"{name}, batch {workload.batch_size}, {workload.context_tokens} + {workload.new_tokens} tokens")
    ((machine, (limit,)),) = place(measured_limits, [(config, workload)], arguments.dtype, arguments.weights, say=say)
    for line in limit.lines(workload.batch_size):
        say(line)
    results = [result for _, found in measure.compete(groups, [case], place, say) for result in found]
    for result in results:
        if result["name"] == measure.Ours.name:
            result |= limit.shares(result)
            say(
                f"falcon_jax reaches {result['share_of_read_limit']:.1%} of the read limit in decode, "
                f"{result['share_of_flops_limit']:.1%} of the arithmetic limit in the first token"
            )
    document = {
        "benchmark": "generate",
        "model": name,
        "parameters": "random" if folder is None else "stored",
        "weights": arguments.weights,
        "cuda_graphs": arguments.cuda_graphs,
        **dataclasses.asdict(workload),
        "repeats": case.repeats,
        "limit": limit.record(workload.batch_size),
        "results": results,
        "ratios": measure.ratios(results),
    }
    if document["ratios"]:
        found = ", ".join(f"{figure.replace('_', ' ')} x {ratio:.2f}" for figure, ratio in document["ratios"].items())
        say(f"falcon_jax over the peer's best: {found}")
    if arguments.start_up and folder is not None:
        document["start_up"] = measure.start_up_s(
            measure.generate_command(folder, arguments.dtype, 16, arguments.cuda_graphs)
        )
        say(f"process start to first text: {document['start_up']['first_token_s']:.2f} s")
    return document | machine


def fill_table(document: dict[str, Any], arguments: Arguments) -> "Iterator[None]":
    """Measures a table into `document`, one result between two yields, and prints it."""
    from benchmarks import seed_table

    models = []
    for wanted in arguments.model or seed_table.MODELS:
        name, config, folder = find_model(wanted)
        models.append(seed_table.Model(name, config, folder, tuple(contestants(arguments, config, folder))))
    plan = seed_table.Plan(
        arguments.dtype,
        arguments.weights,
        arguments.rows or tuple(seed_table.ROWS),
        arguments.scale or 1.0,
        arguments.new_tokens,
        arguments.repeats,
    )
    warn_if_busy()
    settings = {name: getattr(arguments, name) for name in ("dtype", "weights", "cuda_graphs")}
    document |= {**settings, "scale": plan.scale}
    yield from seed_table.fill(document, models, plan, choose_place(arguments, together=False), say)
    for line in seed_table.text(document):
        say(line)


def contestants(arguments: Arguments, config: "FalconConfig", folder: Path | None) -> "list[Contestant]":
    """falcon_jax and the peers, as far as they are asked for."""
    from benchmarks import measure, peers

    ours: list[Contestant] = (
        [measure.Ours(config, folder, arguments.dtype, arguments.weights, arguments.cuda_graphs == "on")]
        if arguments.ours
        else []
    )
    if arguments.peer == "none":
        return ours
    return ours + peers.transformers(config, folder, arguments.dtype, peers.CHOICES[arguments.peer])


def choose_place(arguments: Arguments, together: bool) -> "Place":
    """A CPU's memory comes back when it is freed; a GPU's when a process ends."""
    import jax

    from benchmarks import places
    from falcon_jax import commands

    if jax.default_backend() != "gpu" or together:
        return places.here
    prepare = functools.partial(commands.use_compilation_cache, arguments.compilation_cache)
    return functools.partial(places.in_own_process, prepare=prepare)


def warn_if_busy() -> None:
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"warning: the machine is busy (load {load:.1f} before we began): times will be too long")


def find_model(model: str | None) -> "tuple[str, FalconConfig, Path | None]":
    """What to call the model, its configuration, and the folder of its weights (None: random ones)."""
    from falcon_jax.checkpoint import manifest
    from falcon_jax.config import PRESETS, FalconConfig
    from falcon_jax.falcon import BUNDLED_MODEL

    if model in PRESETS:
        return model, PRESETS[model], None
    folder = BUNDLED_MODEL if model is None else Path(model)
    if not folder.is_dir():
        raise RequestError(f"--model {model} is neither a folder nor a preset; presets are {', '.join(PRESETS)}")
    if manifest.is_converted(folder):
        return folder.name, manifest.Manifest.read(folder).config, folder
    return folder.name, FalconConfig.from_hf(folder), folder


def say(line: str) -> None:
    print(line, flush=True)


def run() -> int:
    """The exit code: 0 done, 1 a row of ours failed, 2 not to be done, 130 interrupted, 141 nobody reads on."""
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.path.insert(0, str(REPOSITORY))  # for `benchmarks`, which no wheel holds
    # Before JAX starts: the peer needs its part of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from benchmarks import command, seed_table

    def failures(document: dict[str, Any]) -> list[str]:
        return seed_table.our_failures(document) if document["benchmark"] == "table" else []

    return command.finish(lambda: main(arguments), failures)


if __name__ == "__main__":
    sys.exit(run())
