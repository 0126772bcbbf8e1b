"""Measures a model's first token, decode speed and memory beside the hardware's limit and a peer, on this machine.

The limit comes first: what a decode step must read, and how fast this device reads that much. Then falcon_jax and the
peer generate the same tokens in turns, and medians count. The last line on stdout is one JSON document.

python scripts/benchmark.py --model falcon-7b --batch 1 --context 4000 --new-tokens 128 --peer hf --save falcon-7b
"""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from falcon_jax.config import FalconConfig

REPOSITORY = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str | None = None
    """A preset's name (random weights), or a folder; the bundled falcon-nano if left out."""
    batch: int = 1
    """Prompts at once."""
    context: int = 64
    """Tokens of each prompt."""
    new_tokens: int = 128
    """Tokens to make after each, at least 2."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """What falcon_jax computes in, and the peer with random weights; else the peer takes what the folder says."""
    peer: Literal["hf", "none"] = "hf"
    """hf: transformers on the same weights, in the same process."""
    repeats: int = 7
    """Runs that the medians are of."""
    start_up: bool = False
    """Also times scripts/generate.py from process start to first text; needs a folder with a tokenizer."""
    save: str | None = None
    """Also writes the document to benchmarks/results/SAVE.json."""


def main(arguments: Arguments) -> dict[str, Any]:
    from benchmarks import hardware, measure, peers
    from falcon_jax.errors import RequestError

    for name, least in (("batch", 1), ("context", 1), ("new_tokens", 2), ("repeats", 1)):
        if getattr(arguments, name) < least:
            flag = name.replace("_", "-")
            raise RequestError(f"--{flag} is {getattr(arguments, name)}; it must be at least {least}")
    if arguments.save is not None and Path(arguments.save).name != arguments.save:
        raise RequestError(f"--save is {arguments.save!r}; it must be a name, without a folder")
    name, config, folder = find_model(arguments.model)
    if arguments.start_up and (folder is None or not (folder / "tokenizer.json").is_file()):
        raise RequestError("--start-up needs a model folder with a tokenizer.json")
    contestants = [measure.ours(config, folder, arguments.dtype)]
    if arguments.peer == "hf":
        contestants += peers.transformers(config, folder, arguments.dtype)

    load_before = os.getloadavg()[0]
    if load_before > 0.5:
        say(f"warning: the machine is busy (load {load_before:.1f} before we began): times will be too long")
    workload = measure.Workload(arguments.batch, arguments.context, arguments.new_tokens)
    say(f"{name}, batch {workload.batch_size}, {workload.context_tokens} + {workload.new_tokens} tokens")
    limit = measure.Limit.of(config, workload, arguments.dtype)
    say_limit(limit, workload.batch_size)
    results = measure.compete(contestants, workload.prompts(config), workload, arguments.repeats, say)
    for result in results:
        if result["name"] == "falcon_jax":
            result["share_of_read_limit"] = limit.ms_per_step / result["ms_per_step"]
            result["share_of_flops_limit"] = limit.prefill_ms / result["first_token_ms"]
            say(
                f"falcon_jax reaches {result['share_of_read_limit']:.1%} of the read limit in decode, "
                f"{result['share_of_flops_limit']:.1%} of the arithmetic limit in the first token"
            )
    document = {
        "benchmark": "generate",
        "model": name,
        "weights": "random" if folder is None else "stored",
        **dataclasses.asdict(workload),
        "repeats": arguments.repeats,
        "limit": dataclasses.asdict(limit)
        | {
            "ms_per_step": limit.ms_per_step,
            "decode_tokens_per_s": 1e3 * workload.batch_size / limit.ms_per_step,
            "prefill_ms": limit.prefill_ms,
        },
        "results": results,
        "ratios": ratios(results),
    }
    if arguments.start_up and folder is not None:
        command = measure.generate_command(folder, arguments.dtype, new_tokens=16)
        document["start_up"] = measure.start_up_s(command)
        say(f"process start to first text: {document['start_up']['first_token_s']:.2f} s")
    document |= hardware.describe() | {
        "load_average": [load_before, os.getloadavg()[0]],
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
    }
    if arguments.save is not None:
        path = REPOSITORY / "benchmarks" / "results" / f"{arguments.save}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n")
    return document


def find_model(model: str | None) -> "tuple[str, FalconConfig, Path | None]":
    """What to call the model, its configuration, and the folder of its weights (None: random ones)."""
    from falcon_jax.checkpoint import manifest
    from falcon_jax.config import PRESETS, FalconConfig
    from falcon_jax.errors import RequestError
    from falcon_jax.falcon import BUNDLED_MODEL

    if model in PRESETS:
        return model, PRESETS[model], None
    folder = BUNDLED_MODEL if model is None else Path(model)
    if not folder.is_dir():
        raise RequestError(f"--model {model} is neither a folder nor a preset; presets are {', '.join(PRESETS)}")
    if manifest.is_converted(folder):
        return folder.name, manifest.Manifest.read(folder).config, folder
    return folder.name, FalconConfig.from_hf(folder), folder


def say_limit(limit: Any, batch_size: int) -> None:
    say(
        f"limit: a decode step reads {limit.weight_bytes / 1e6:.1f} MB of weights and {limit.cache_bytes / 1e6:.2f} MB "
        f"of cache; this device reads that much at {limit.read_bytes_per_s / 1e9:.1f} GB/s (memory alone: "
        f"{limit.memory_bytes_per_s / 1e9:.1f} GB/s), so {1e3 * batch_size / limit.ms_per_step:.1f} tokens/s "
        f"({limit.ms_per_step:.3f} ms a step)"
    )
    say(
        f"limit: the prefill is {limit.prefill_flops / 1e9:.3f} GFLOP; this device multiplies at "
        f"{limit.flops_per_s / 1e9:.0f} GFLOP/s, so {limit.prefill_ms:.2f} ms to the first token"
    )


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """How many times faster falcon_jax is than the peer at its best, figure by figure; empty without a peer."""
    ours = next(result for result in results if result["name"] == "falcon_jax")
    peers = [result for result in results if result["name"] != "falcon_jax"]
    if not peers:
        return {}
    found = {
        "decode": ours["decode_tokens_per_s"] / max(peer["decode_tokens_per_s"] for peer in peers),
        "first_token": min(peer["first_token_ms"] for peer in peers) / ours["first_token_ms"],
        "in_all": ours["tokens_per_s"] / max(peer["tokens_per_s"] for peer in peers),
    }
    say(
        f"falcon_jax over the peer's best: decode x {found['decode']:.2f}, first token x {found['first_token']:.2f}, "
        f"in all x {found['in_all']:.2f}"
    )
    return found


def say(line: str) -> None:
    print(line, flush=True)


def run() -> int:
    """The exit code: 0 done, 2 not to be done, 130 interrupted, 141 nobody reads on."""
    arguments = tyro.cli(Arguments, description=__doc__)
    sys.path.insert(0, str(REPOSITORY))  # for `benchmarks`, which no wheel holds
    # Before JAX starts: the peer needs its part of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from falcon_jax.errors import USER_ERRORS, one_line

    try:
        print(json.dumps(main(arguments)), flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, into a pipe that is gone.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
