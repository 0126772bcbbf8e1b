"""Times the attention kernels beside the hardware's limits and everything else that computes the same, in one run.

The limits come first. Each kernel is checked against float32 before it is timed, and a wrong one gets no figure. Then
contestants take turns, and medians count. Those that cannot run here say why. Progress goes to stderr, a table to
stdout, and the last line is one JSON document. The exit code is 1 if one of ours was wrong or failed.

python benchmarks/kernels.py --save kernels-h100
"""

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from falcon_jax.errors import RequestError

if TYPE_CHECKING:
    from benchmarks.kernel_torch import TorchProcess
    from pallas_kernels.shapes import AttentionCase, DecodeCase

REPOSITORY = Path(__file__).parents[1]
# More than any cache holds.
READ_BYTES = {"cpu": 2**28, "gpu": 2**31}
TOKENS, LONG_TOKENS = 4096, 16384
# Batch and keys, for every model and for the first one alone.
DECODE = ((1, 4096), (16, 4096), (1, 32768))
MORE_DECODE = ((1, 512), (4, 4096), (1, 131072))
NUM_TURNS, NUM_QUICK_TURNS = 9, 5


@dataclasses.dataclass(frozen=True)
class Arguments:
    only: Literal["flash", "decode"] | None = None
    """One kernel instead of all."""
    models: tuple[str, ...] = ("falcon-40b-alibi", "falcon-40b", "falcon-7b", "falcon-rw-1b")
    """Whose heads: names of pallas_kernels.shapes.HEADS."""
    tokens: tuple[int, ...] = ()
    """Lengths of prompts, and of the caches in decoding, instead of those that fit the models."""
    backward: bool = True
    """Also times the gradients of whole prompts."""
    quick: bool = False
    """Ours, cuDNN and XLA alone, fewer turns, fewer caches."""
    save: str | None = None
    """Also writes the document to benchmarks/results/SAVE.json, anew after each case."""


def main(arguments: Arguments) -> dict[str, Any]:
    check(arguments)
    import jax

    from benchmarks import command, hardware, kernel_memory, kernel_report
    from benchmarks.kernel_torch import TorchProcess

    begin = time.perf_counter()
    limit = {
        "read_bytes_per_s": hardware.read_bandwidth(READ_BYTES.get(jax.default_backend(), 2**30)),
        "bfloat16_flops_per_s": hardware.matrix_rate("bfloat16"),
    }
    print(
        f"limit: this device reads {limit['read_bytes_per_s'] / 1e12:.3f} TB/s and multiplies large bfloat16 matrices "
        f"at {limit['bfloat16_flops_per_s'] / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    document: dict[str, Any] = {"benchmark": "kernels", "limit": limit, "memory": [], "cases": [], "ratios": {}}
    document |= hardware.describe()
    document["command"] = shlex.join(["python", "benchmarks/kernels.py", *sys.argv[1:]])
    if arguments.only != "decode":
        command.say("memory")
        document["memory"] = kernel_memory.report()
    with contextlib.ExitStack() as stack:
        torch = None if arguments.quick else stack.enter_context(contextlib.closing(TorchProcess()))
        for result in results(arguments, torch, limit["read_bytes_per_s"]):
            document["cases"].append(result)
            document["ratios"] |= kernel_report.ratios(result)
            document["seconds"] = round(time.perf_counter() - begin, 1)
            command.save(document, arguments.save)
    for lines in (*map(kernel_report.memory_lines, document["memory"]), *map(kernel_report.table, document["cases"])):
        print(*lines, sep="\n", flush=True)
    return document


def check(arguments: Arguments) -> None:
    from benchmarks import command
    from pallas_kernels.shapes import HEADS

    for model in arguments.models:
        if model not in HEADS:
            raise RequestError(f"--models {model} is unknown; known are {', '.join(HEADS)}")
    if any(tokens < 1 for tokens in arguments.tokens):
        raise RequestError(f"--tokens is {min(arguments.tokens)}; it must be at least 1")
    command.check_name(arguments.save)


def results(arguments: Arguments, torch: "TorchProcess | None", read_bytes_per_s: float) -> Iterator[dict[str, Any]]:
    """One case after the other, as it stands in the document."""
    from benchmarks import command
    from benchmarks.kernel_prefill import BACKWARD, FORWARD

    kinds = (FORWARD, BACKWARD) if arguments.backward else (FORWARD,)
    num_turns = NUM_QUICK_TURNS if arguments.quick else NUM_TURNS
    if arguments.only != "decode":
        for kind in kinds:
            for case in prefill_cases(arguments, kind):
                command.say(f"{case}, {kind}")
                yield run_prefill(case, kind, torch, num_turns)
    if arguments.only != "flash":
        for case in decode_cases(arguments):
            command.say(f"{case}, decode")
            yield run_decode(case, torch, num_turns, read_bytes_per_s)


def prefill_cases(arguments: Arguments, kind: str) -> "Iterator[AttentionCase]":
    from benchmarks.kernel_prefill import FORWARD
    from pallas_kernels.shapes import HEADS, attention_case

    for model in arguments.models:
        long = HEADS[model].H == 128 and kind == FORWARD
        for T in arguments.tokens or ((TOKENS, LONG_TOKENS) if long else (TOKENS,)):
            yield attention_case(model, T)


def decode_cases(arguments: Arguments) -> "Iterator[DecodeCase]":
    from pallas_kernels.shapes import decode_case

    for model in arguments.models:
        sizes = DECODE
        if arguments.tokens:
            sizes = tuple((1, context) for context in arguments.tokens)
        elif model == arguments.models[0] and not arguments.quick:
            sizes += MORE_DECODE
        for batch, context in sizes:
            yield decode_case(model, context, batch)


def run_prefill(case: "AttentionCase", kind: str, torch: "TorchProcess | None", num_turns: int) -> dict[str, Any]:
    from benchmarks import kernel_prefill, kernel_report, kernel_turns

    if torch is not None:
        torch.begin(kind, case)
    entries = kernel_prefill.contestants(case, kind, quick=torch is None)
    if torch is not None:
        entries += torch.entries()
    kernel_turns.take_turns(entries, num_turns)
    return kernel_report.prefill(case, kind, entries)


def run_decode(
    case: "DecodeCase", torch: "TorchProcess | None", num_turns: int, read_bytes_per_s: float
) -> dict[str, Any]:
    from benchmarks import kernel_decode, kernel_report, kernel_turns

    if torch is not None:
        torch.begin("decode", case, kernel_decode.num_caches(case), kernel_decode.filler_bytes(case))
    entries = kernel_decode.contestants(case, quick=torch is None)
    if torch is not None:
        entries += torch.entries()
    kernel_turns.take_turns(entries, num_turns)
    return kernel_report.decode(case, entries, read_bytes_per_s)


def run() -> int:
    """The exit code: 0 done, 1 one of ours wrong or failed, 2 not to be done, 130 interrupted, 141 nobody reads on."""
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.path.insert(0, str(REPOSITORY))  # for `benchmarks`, which no wheel holds
    # Before JAX starts: PyTorch's process needs its part of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from benchmarks import command, kernel_report

    return command.finish(lambda: main(arguments), kernel_report.failures)


if __name__ == "__main__":
    sys.exit(run())
