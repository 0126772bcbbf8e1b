"""Times steps of decoding alone, by model, form of the weights and rows, beside the read limit.

Weights are random, in bfloat16 or fewer bits, and so are the keys and values that the cache holds (decode_steps.py).
Progress goes to stderr, a line a case to stdout, and the last line is one JSON document. The exit code is 1 if a case
failed.

python benchmarks/decoding.py --save decoding-h200
python benchmarks/decoding.py --models falcon-rw-1b --cuda-graphs on off --trace traces
"""

import dataclasses
import gc
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from falcon_jax.errors import RequestError

REPOSITORY = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Arguments:
    models: tuple[str, ...] = ("falcon-40b-alibi", "falcon-40b", "falcon-7b", "falcon-rw-1b")
    """Presets."""
    weights: tuple[str, ...] = ("native",)
    """Forms of the weights."""
    rows: tuple[int, ...] = (1,)
    """Sequences at once."""
    tensor: tuple[int, ...] = (1,)
    """Devices that share out each model, by heads and the MLP's width."""
    num_layers: int | None = None
    """Of each model only so many layers; all if left out."""
    context: int = 4000
    """Tokens that each has in the cache at first."""
    cuda_graphs: tuple[Literal["on", "off"], ...] = ("on",)
    """off launches each kernel by itself."""
    trace: Path | None = None
    """Folder for a trace of four steps of each case, which names the dearest kernels."""
    save: str | None = None
    """Also writes the document to benchmarks/results/SAVE.json, anew after each model."""


def main(arguments: Arguments) -> dict[str, Any]:
    check(arguments)
    import jax

    from benchmarks import command, hardware, limits
    from benchmarks.decode_steps import StepCase

    memory = hardware.read_bandwidth(limits.MEMORY_READ_BYTES.get(jax.default_backend(), 2**30))
    print(f"limit: this device reads {memory / 1e12:.3f} TB/s", flush=True)
    document: dict[str, Any] = {"benchmark": "decoding", "limit": {"read_bytes_per_s": memory}, "cases": []}
    document |= hardware.describe()
    document["command"] = shlex.join(["python", "benchmarks/decoding.py", *sys.argv[1:]])
    cases = [
        StepCase(rows, arguments.context, graphs == "on") for rows in arguments.rows for graphs in arguments.cuda_graphs
    ]
    for name in arguments.models:
        for weights in arguments.weights:
            command.say(f"{name} {weights}")
            for tensor in arguments.tensor:
                rates = limits.Rates(memory * tensor, flops_per_s=1.0)  # of products nothing is measured
                shape = name, config_of(name, arguments), weights, tensor
                document["cases"] += measure_model(*shape, cases, rates, arguments.trace)
                command.save(document, arguments.save)
                gc.collect()
    return document


def config_of(name: str, arguments: Arguments) -> Any:
    from falcon_jax.config import PRESETS

    config = PRESETS[name]
    return dataclasses.replace(config, num_layers=min(arguments.num_layers or config.num_layers, config.num_layers))


def measure_model(
    name: str, config: Any, weights: str, tensor: int, cases: list[Any], rates: Any, trace: Path | None
) -> list[dict[str, Any]]:
    """A result a case, each printed; one with "failed" where the model cannot be made or compiled, or does not run."""
    from benchmarks import command, measure, training_profile
    from benchmarks.decode_steps import Steps

    about = {"model": name, "num_layers": config.num_layers, "weights": weights, "tensor": tensor}
    results = [about | dataclasses.asdict(case) for case in cases]

    def fail(result: dict[str, Any], error: Exception) -> None:
        result["failed"] = measure.reason(error)
        command.say(f"{name} {weights}: {result['failed']}")

    try:
        steps = Steps(config, weights, cases, tensor)
    except Exception as error:
        for result in results:
            fail(result, error)
        return results
    for case, result in zip(cases, results, strict=True):
        described = f"{name} {weights} {tensor}" if tensor > 1 else f"{name} {weights}"
        folder = None if trace is None else trace / training_profile.folder_name(f"{described} {case}")
        try:
            result |= steps.measure(case, folder)
        except Exception as error:
            fail(result, error)
            continue
        limit_ms = case.limit(config, weights, rates).ms_per_step
        result |= {"load_s": steps.load_s, "compile_all_s": steps.compile_s}
        result |= {"limit_ms_per_step": limit_ms, "share_of_read_limit": limit_ms / result["ms_per_step"]}
        print(*lines(result, str(case)), sep="\n", flush=True)
    return results


def lines(result: dict[str, Any], case: str) -> list[str]:
    over = f" on {result['tensor']} devices" if result["tensor"] > 1 else ""
    made = [
        f"{result['model']} {result['weights']} {case}{over}: {result['ms_per_step']:.3f} ms a step, "
        f"{result['decode_tokens_per_s']:.1f} tokens/s, {result['share_of_read_limit']:.1%} of the read limit "
        f"({result['waiting_ms_per_step']:.3f} ms where each call waits until the last is read)"
    ]
    for kernel in result.get("kernels", []):
        made.append(
            f"  {kernel['us_a_step']:9.1f} us a step  {kernel['calls_a_step']:6.1f} x {kernel['us_a_call']:7.2f} us  "
            f"{kernel['name'][:60]}"
        )
    return made


def check(arguments: Arguments) -> None:
    from benchmarks import command
    from falcon_jax.config import PRESETS
    from falcon_jax.model.quantize import WEIGHTS

    command.check_known("models", arguments.models, PRESETS)
    command.check_known("weights", arguments.weights, WEIGHTS)
    if min(arguments.rows) < 1:
        raise RequestError(f"--rows is {arguments.rows}; each must be at least 1")
    import jax

    if not all(1 <= tensor <= len(jax.devices()) for tensor in arguments.tensor):
        raise RequestError(f"--tensor is {arguments.tensor}; there are {len(jax.devices())} devices")
    for name, number in (("num-layers", arguments.num_layers), ("context", arguments.context)):
        if number is not None and number < 1:
            raise RequestError(f"--{name} is {number}; it must be at least 1")
    command.check_name(arguments.save)


def failures(document: dict[str, Any]) -> list[str]:
    return [f"{case['model']} {case['weights']}: {case['failed']}" for case in document["cases"] if "failed" in case]


def run() -> int:
    """The exit code: 0 done, 1 a case failed, 2 not to be done, 130 interrupted, 141 nobody reads on."""
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.path.insert(0, str(REPOSITORY))  # for `benchmarks`, which no wheel holds
    # Before JAX starts: what one model gives back the next one takes, in pieces of another size.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from benchmarks import command

    return command.finish(lambda: main(arguments), failures)


if __name__ == "__main__":
    sys.exit(run())
