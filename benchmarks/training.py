"""Times a training step of falcon_jax and of transformers on one GPU, beside the hardware's limit, in one run.

Without --model: the table of bars, each case with some variants of ours. The limits come first. Each variant and each
peer has a process of its own on a GPU; what lacks memory there is a result with its reason. Progress goes to stderr,
the tables to stdout, and the last line is one JSON document. The exit code is 1 if one of ours failed for another
reason than memory, or if nothing of ours fits a case.

python benchmarks/training.py --save training-h200
python benchmarks/training.py --cases rw-1b --peer none --variants batch_size=16 batch_size=32,remat=products
python benchmarks/training.py --model falcon-nano --num-layers 2 --length 64 --peer hf-plain
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

    from benchmarks.clock import Clock
    from benchmarks.places import Place
    from benchmarks.training_cases import Case
    from benchmarks.training_measure import Contestant, Timing

REPOSITORY = Path(__file__).parents[1]
# Of a GPU's memory, for ours, which has it alone. The rest is for what JAX does not count: contexts, cuDNN, a profiler.
MEMORY_FRACTION = "0.92"


@dataclasses.dataclass(frozen=True)
class Arguments:
    table: Literal["bars"] | None = None
    """bars: what training is judged by, falcon-rw-1b, 8 layers of falcon-7b and its LoRA; also without --model."""
    cases: tuple[Literal["rw-1b", "7b-width", "7b-lora"], ...] = ()
    """Some of the table's cases instead of all."""
    model: str | None = None
    """A preset to train with random weights. Beside --table it takes the place of the table's models."""
    num_layers: int | None = None
    """So many of the model's layers."""
    length: int | None = None
    """Tokens a row; 2048 if left out, in a table what the case says."""
    lora: bool = False
    """Low-rank adapters of rank 16 on query_key_value instead of all weights; without peers."""
    batch_size: int | None = None
    """Rows a step of ours; 8 if left out. In a table this and the next four change all variants."""
    num_micro_batches: int | None = None
    """Parts of a batch, one after the other."""
    remat: Literal["none", "products", "block"] | None = None
    """What the backward pass computes again."""
    attention: str | None = None
    """Attention implementation: "mosaic", "cudnn" or "xla"; the best that works if left out."""
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at once."""
    variants: tuple[str, ...] = ()
    """Variants of ours, each its changed settings, as in batch_size=32,num_micro_batches=2,remat=block: the options
    above, weights (int8, int4: of a frozen model), and those of scripts/train.py's step."""
    peer: Literal["hf", "hf-plain", "hf-compiled", "none"] = "hf"
    """hf: transformers, compiled and plain."""
    peer_batch_size: int | None = None
    """Rows a step of the peers; if left out, what the table says, else as many as ours."""
    ours: bool = True
    """--no-ours measures the peers alone."""
    steps: int | None = None
    """Steps of one measurement; as many as take two seconds if left out."""
    repeats: int = 3
    """Measurements that the median is of."""
    rounds: int = 1
    """Times that all contestants are measured: a drift of the machine shows from 2 on."""
    max_seconds: float | None = None
    """Begin nobody who, as slow as the slowest of its kind so far, would not be done by then."""
    profile: Path | None = None
    """Folder for a trace of two steps of each variant; the most expensive kernels are printed."""
    compilation_cache: shared.CompilationCache = None
    save: str | None = None
    """Also writes the document to benchmarks/results/SAVE.json, anew after each result."""


def main(arguments: Arguments) -> dict[str, Any]:
    begin = time.perf_counter()
    cases = make_cases(arguments)
    entered = [(case, contestants(arguments, case)) for case in cases]
    from benchmarks import command, training_report
    from falcon_jax import commands

    commands.use_compilation_cache(arguments.compilation_cache)
    document = empty_document(arguments, cases)
    for _ in fill(document, entered, arguments, begin):
        document["load_average"][1] = os.getloadavg()[0]
        document["seconds"] = round(time.perf_counter() - begin, 1)
        command.save(document, arguments.save)
    for case in document["cases"]:
        print(*training_report.case_lines(case, document["device"]), sep="\n")
    print(*training_report.bar_lines(document), sep="\n", flush=True)
    return document


def make_cases(arguments: Arguments) -> "list[Case]":
    """What is to be measured. Raises: RequestError where the options make no sense."""
    from benchmarks import command, peers, training_cases
    from benchmarks.training_cases import Case, Variant, Work
    from falcon_jax.model.adapters import LoRA

    check(arguments)
    names = ("batch_size", "num_micro_batches", "remat", "attention", "loss_chunk_tokens")
    common = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    asked = [command.parse_variant(words) for words in arguments.variants]
    if is_table(arguments):
        chosen = [case for case in training_cases.bars() if not arguments.cases or case.name in arguments.cases]
    else:
        work = Work(model_of(arguments, None), arguments.length or 2048, LoRA() if arguments.lora else None)
        rows = arguments.batch_size or training_cases.DEFAULT_ROWS
        peer_rows: dict[str, int] = {} if arguments.lora else {peers.COMPILED: rows, peers.PLAIN: rows}
        chosen = [Case("training", training_cases.describe(work), work, (Variant(),), peer_rows)]
    made = []
    for case in chosen:
        config = model_of(arguments, case.work.config)
        work = dataclasses.replace(case.work, config=config, length=arguments.length or case.work.length)
        usual = case.variants[0].settings | common
        settings = [usual | one for one in asked] or [one.settings | common for one in case.variants]
        variants = tuple(map(Variant.of, settings))
        if not work.lora and any(variant.weights != "native" for variant in variants):
            raise RequestError(f"weights of few bits are a frozen model's, and {case.name} trains all: add --lora")
        rows = {name: arguments.peer_batch_size or rows for name, rows in case.peer_rows.items()}
        what = training_cases.describe(work)
        made.append(dataclasses.replace(case, work=work, variants=variants, peer_rows=rows, what=what))
    return made


def check(arguments: Arguments) -> None:
    """Refuses numbers out of range, and what does not go together."""
    from benchmarks import command

    for name in ("num_layers", "length", "batch_size", "peer_batch_size", "steps", "repeats", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    command.check_name(arguments.save)
    if not arguments.ours and (arguments.peer == "none" or arguments.lora):
        raise RequestError("--no-ours leaves nobody to measure with --peer none or --lora; leave one of them out")
    if not arguments.ours and arguments.profile is not None:
        raise RequestError("--profile is of ours, which --no-ours leaves out; leave one of them out")
    if is_table(arguments) and arguments.lora:
        raise RequestError("--lora is of one --model; of the table say --cases 7b-lora")
    if not is_table(arguments) and arguments.cases:
        raise RequestError("--cases are the table's; add --table bars, or leave --model out")


def is_table(arguments: Arguments) -> bool:
    return arguments.table is not None or arguments.model is None


def model_of(arguments: Arguments, usual: Any) -> Any:
    """The configuration to train: --model, else the usual one; of so many layers as are asked for."""
    from falcon_jax.config import PRESETS

    if arguments.model is not None and arguments.model not in PRESETS:
        raise RequestError(f"--model {arguments.model} is unknown; presets are {', '.join(PRESETS)}")
    config = usual if arguments.model is None else PRESETS[arguments.model]
    return config if arguments.num_layers is None else dataclasses.replace(config, num_layers=arguments.num_layers)


def contestants(arguments: Arguments, case: "Case") -> "list[Contestant]":
    """Who takes part: the likely best of ours, the peer at its best, then the rest. Raises: RequestError."""
    import jax

    from benchmarks import peers, training_peers
    from benchmarks.training_ours import Ours

    platform = jax.default_backend()
    ours = [Ours(case.work, variant, platform) for variant in case.variants] if arguments.ours else []
    names = sorted(peers.CHOICES[arguments.peer], key=lambda name: name != peers.COMPILED)
    others = training_peers.transformers(case, names, platform)
    return [*ours[:1], *others[:1], *ours[1:], *others[1:]]


def empty_document(arguments: Arguments, cases: "list[Case]") -> dict[str, Any]:
    """What stands in it before anything is measured."""
    from benchmarks import training_cases

    return {
        "benchmark": "training",
        "table": "bars" if is_table(arguments) else None,
        "flops": training_cases.FLOPS,
        "rounds": arguments.rounds,
        "cases": [
            {
                "name": case.name,
                "what": case.what,
                "lora": case.work.lora is not None,
                "num_layers": case.work.config.num_layers,
                "num_parameters": case.work.config.num_parameters,
                "length": case.work.length,
                "flops_a_token": case.work.flops(1) / case.work.length,
                "model_flops_a_token": case.work.model_flops(1) / case.work.length,
                "results": [],
                "bars": [],
            }
            for case in cases
        ],
        "load_average": [os.getloadavg()[0], None],
        "seconds": 0.0,
        "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
    }


def fill(
    document: dict[str, Any], entered: "list[tuple[Case, list[Contestant]]]", arguments: Arguments, begin: float
) -> "Iterator[None]":
    """Measures into `document`, one result between two yields: it is worth saving after each."""
    from benchmarks import command, training_measure, training_report
    from benchmarks.clock import Clock
    from benchmarks.training_measure import Timing
    from falcon_jax.train.flops import peak_flops

    ((machine, rates),) = place_of(arguments, None)(training_measure.rates, say=command.say)
    document |= machine | {"limit": dataclasses.asdict(rates)}
    for case, _ in entered:
        print(*training_report.limit_lines(case, rates), sep="\n", flush=True)
    clock = Clock(begin, arguments.max_seconds)
    for number in range(1, arguments.rounds + 1):
        for (case, taking_part), entry in zip(entered, document["cases"]):
            # One trace of a variant is enough.
            folder = arguments.profile / case.name if arguments.profile is not None and number == 1 else None
            timing = Timing(arguments.steps, arguments.repeats, folder)
            for contestant in taking_part:
                result = measured(contestant, timing, arguments, entry, clock) | {"round": number}
                result = training_report.with_limits(result, case, rates, peak_flops(machine["device"]))
                tell_profile(training_report.take_profile(result, case.what), folder, contestant)
                entry["results"].append(result)
                entry["bars"] = training_report.bars(case, entry["results"])
                yield


def tell_profile(lines: list[str], folder: Path | None, contestant: "Contestant") -> None:
    """Prints a profile's tables at once, and keeps them beside the trace."""
    from benchmarks.training_profile import folder_name

    if lines and folder is not None:
        print(*lines, sep="\n", flush=True)
        (folder / f"{folder_name(str(contestant))}.txt").write_text("\n".join(lines[1:]) + "\n")


def measured(
    contestant: "Contestant", timing: "Timing", arguments: Arguments, entry: dict[str, Any], clock: "Clock"
) -> dict[str, Any]:
    """A result, unless there is no time left or the contestant failed in the round before."""
    from benchmarks import command, training_measure

    result = training_measure.record(contestant)
    for earlier in entry["results"]:
        if earlier["name"] == result["name"] and earlier["settings"] == result["settings"] and "failed" in earlier:
            return result | {"left_out": f"it failed in round {earlier['round']}"}
    if clock.is_late(contestant.name):
        return result | {"left_out": f"it would not be done within --max-seconds {arguments.max_seconds:g}"}
    command.say(f"{entry['name']}, {contestant}")
    with clock.running(contestant.name):
        return training_measure.compete(contestant, timing, place_of(arguments, contestant), command.say)


def place_of(arguments: Arguments, contestant: "Contestant | None") -> "Place":
    """On a GPU a process of its own, whose end gives the memory back."""
    import jax

    from benchmarks import places

    if jax.default_backend() != "gpu":
        return places.here
    if contestant is None or not contestant.ours:
        return places.in_own_process
    return functools.partial(places.in_own_process, prepare=functools.partial(prepare, arguments.compilation_cache))


def prepare(compilation_cache: str | None) -> None:
    """In a process of ours, before JAX starts: the GPU's memory in one piece, as scripts/train.py has it."""
    from falcon_jax import commands

    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    commands.use_compilation_cache(compilation_cache)


def run() -> int:
    """The exit code: 0 done, 1 one of ours failed, 2 not to be done, 130 interrupted, 141 nobody reads on."""
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.path.insert(0, str(REPOSITORY))  # for `benchmarks`, which no wheel holds
    # Before JAX starts: this process must leave the GPU's memory to those that train.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from benchmarks import command, training_report

    return command.finish(lambda: main(arguments), training_report.failures)


if __name__ == "__main__":
    sys.exit(run())
