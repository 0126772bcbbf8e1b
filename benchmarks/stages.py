"""Times the fused stages of decoding and of prompts beside the read limit and XLA's own, in one run.

What is measured: one layer's input and output stage, without attention (kernel_stages.py). Each is checked against
float32 before it is timed, and a wrong one gets no figure. Progress goes to stderr, a table to stdout, and the last
line is one JSON document. The exit code is 1 if one of ours was wrong or failed.

python benchmarks/stages.py --save stages-h200
python benchmarks/stages.py --models falcon-40b-alibi --rows 512 1024 2048 4096 --save stages-prompts-h200
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from falcon_jax.errors import RequestError

if TYPE_CHECKING:
    from benchmarks.kernel_stages import StageCase, Variant, Work

REPOSITORY = Path(__file__).parents[1]
READ_BYTES = {"cpu": 2**28, "gpu": 2**31}  # more than any cache holds
NUM_TURNS = 7
MAX_PROMPT_ROWS = 4096  # of one call


@dataclasses.dataclass(frozen=True)
class Arguments:
    models: tuple[str, ...] = ("falcon-40b-alibi", "falcon-40b", "falcon-7b", "falcon-rw-1b")
    """Presets."""
    weights: tuple[str, ...] = ("native", "int8", "int4")
    """Forms of the weights."""
    rows: tuple[int, ...] = (8, 16)
    """Rows at once: up to 64 as in decoding, by eights; more as in prompts."""
    variants: tuple[str, ...] = ()
    """Other ways of running ours, each as in cuda_graphs=false,warpgroups=6,stages=2: the last ones are fields of the
    plans of both stages (pallas_kernels/quantized_matmul/plan.py; of more than 64 rows wide_plan.py)."""
    save: str | None = None
    """Also writes the document to benchmarks/results/SAVE.json, anew after each case."""


def main(arguments: Arguments) -> dict[str, Any]:
    check(arguments)
    variants = variants_of(arguments)
    import jax

    from benchmarks import command, hardware, kernel_stages, kernel_turns
    from falcon_jax.config import PRESETS

    limit = hardware.read_bandwidth(READ_BYTES.get(jax.default_backend(), 2**30))
    print(f"limit: this device reads {limit / 1e12:.3f} TB/s", flush=True)
    document: dict[str, Any] = {"benchmark": "stages", "limit": {"read_bytes_per_s": limit}, "cases": []}
    document |= hardware.describe()
    document["command"] = shlex.join(["python", "benchmarks/stages.py", *sys.argv[1:]])
    for name in arguments.models:
        for weights in arguments.weights:
            for num_rows in arguments.rows:
                case = kernel_stages.StageCase(name, PRESETS[name], weights, num_rows)
                command.say(str(case))
                entries, work = kernel_stages.contestants(case, variants)
                kernel_turns.take_turns([entry for entry in entries if "one layer" not in entry.name], NUM_TURNS)
                document["cases"].append(result := report(case, entries, work, limit))
                print(*lines(result), sep="\n", flush=True)
                command.save(document, arguments.save)
    return document


def check(arguments: Arguments) -> None:
    from benchmarks import command
    from falcon_jax.config import PRESETS
    from falcon_jax.model.quantize import WEIGHTS

    command.check_known("models", arguments.models, PRESETS)
    command.check_known("weights", arguments.weights, WEIGHTS)
    if any(not 1 <= rows <= MAX_PROMPT_ROWS for rows in arguments.rows):
        raise RequestError(f"--rows is {arguments.rows}; each must be from 1 to {MAX_PROMPT_ROWS}")
    for variant in variants_of(arguments):
        for rows in arguments.rows:
            variant.require_plan_for(rows)
    command.check_name(arguments.save)


def variants_of(arguments: Arguments) -> "list[Variant]":
    from benchmarks import command
    from benchmarks.kernel_stages import Variant

    return [Variant.of(command.parse_variant(words)) for words in arguments.variants]


def report(case: "StageCase", entries: list[Any], work: "Work", limit: float) -> dict[str, Any]:
    """A case as it stands in the document: microseconds a layer, the share of the read limit, and TFLOP/s."""

    def figures(part: str, seconds: float) -> dict[str, float]:
        rates = {
            "share_of_read_limit": work.num_bytes[part] / seconds / limit,
            "tflops": work.flops[part] / seconds / 1e12,
        }
        return {"us": seconds * 1e6, **rates}

    results = []
    for entry in entries:
        result = {"name": entry.name, "reason": entry.reason, "failed": entry.failed, "error": entry.error}
        if entry.seconds is not None:
            result |= figures(entry.name.split(", ")[1], entry.seconds / work.num_layers)
        results.append(result)
    by_name = {result["name"]: result for result in results}
    for name in dict.fromkeys(result["name"].split(", ")[0] for result in results):
        both, output = (by_name[f"{name}, {part}"].get("us") for part in ("both", "output"))
        if both and output and both > output:
            results.append({"name": f"{name}, input"} | figures("input", (both - output) / 1e6))
    return {"case": str(case), "bytes": work.num_bytes, "flops": work.flops, "results": results}


def lines(result: dict[str, Any]) -> list[str]:
    made = [result["case"]]
    for row in result["results"]:
        if "us" in row:
            rates = f"{row['share_of_read_limit']:6.1%} of the read limit, {row['tflops']:6.1f} TFLOP/s"
            made.append(f"  {row['name']:14} {row['us']:8.1f} us  {rates}")
        elif row["reason"]:
            made.append(f"  {row['name']:14} {row['reason']}")
    return made


def failures(document: dict[str, Any]) -> list[str]:
    """What of ours should have run and did not, or was wrong."""
    return [
        f"{case['case']}: {row['name']}: {row['reason']}"
        for case in document["cases"]
        for row in case["results"]
        if row["name"].startswith("ours") and row.get("failed")
    ]


def run() -> int:
    """The exit code: 0 done, 1 one of ours wrong or failed, 2 not to be done, 130 interrupted, 141 nobody reads on."""
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.path.insert(0, str(REPOSITORY))  # for `benchmarks`, which no wheel holds
    from benchmarks import command

    return command.finish(lambda: main(arguments), failures)


if __name__ == "__main__":
    sys.exit(run())
