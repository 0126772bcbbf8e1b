"""Continues a prompt (argument, file or stdin) with the bundled falcon-nano or any Falcon checkpoint.

python scripts/generate.py "The lighthouse keeper"
echo "It was a dark night" | python scripts/generate.py --temperature 0.8 --top-p 0.95 --json
"""

import dataclasses
import functools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from falcon_jax import options as shared

if TYPE_CHECKING:
    from falcon_jax import Completion, Falcon


@dataclasses.dataclass
class Arguments:
    """Continues a prompt with a Falcon model."""

    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """The text to continue; without it, --file or stdin."""
    file: Path | None = None
    """Reads the prompt from this file."""
    model: str | None = None
    """Orbax folder, Hugging Face folder or hub id; the bundled falcon-nano if left out."""
    max_new_tokens: int = 128
    """Most tokens to make."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int | None = None
    """Chooses among the k likeliest tokens."""
    top_p: float | None = None
    """Chooses among the likeliest tokens that together reach this probability."""
    min_p: float | None = None
    """Drops tokens below this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that are there already less likely."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Ends the text before this string; may be given several times."""
    num_samples: int = 1
    """Completions to make."""
    seed: int = 0
    """The same seed gives the same text."""
    speculate: int = 0
    """Guesses that many tokens a step, up to 16, from the text so far: faster where text repeats itself."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """What the model computes in."""
    alibi: Literal["float32", "hf_bf16"] = "float32"
    """hf_bf16 rounds as transformers does."""
    max_cache_tokens: int | None = None
    """Most tokens of prompt and continuation; 8 times the trained length, at least 32768, if left out."""
    full_text: bool = False
    """Prints the prompt's text before its continuation."""
    cuda_graphs: shared.CudaGraphs = "on"
    compilation_cache: shared.CompilationCache = None
    json: bool = False
    """Prints one JSON document: text, token ids, log probabilities, finish reason, steps, timing."""


def main(arguments: Arguments) -> None:
    prompt = read_prompt(arguments)
    begin = time.perf_counter()
    # Late: --help and a missing prompt need not wait for JAX.
    from falcon_jax import Falcon, commands
    from falcon_jax.checkpoint import hub
    from falcon_jax.falcon import BUNDLED_MODEL

    import_s = time.perf_counter() - begin
    commands.use_compilation_cache(arguments.compilation_cache)
    options: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "stop": arguments.stop,
        "seed": arguments.seed,
        "return_full_text": arguments.full_text,
        "speculate": arguments.speculate,
    }
    how: dict[str, Any] = {
        "dtype": arguments.dtype,
        "alibi": arguments.alibi,
        "cuda_graphs": arguments.cuda_graphs == "on",
        "max_cache_tokens": arguments.max_cache_tokens,
    }
    num_samples = arguments.num_samples
    begin = time.perf_counter()
    folder = BUNDLED_MODEL if arguments.model is None else hub.local_folder(arguments.model)
    streamed = not arguments.json and num_samples == 1
    programs = functools.partial(
        commands.generation_programs, folder, prompt, num_samples=num_samples, streamed=streamed, **how, **options
    )
    with commands.compile_ahead(programs):
        model = Falcon.from_checkpoint(folder, **how)
    timing = {"import_s": import_s, "load_s": time.perf_counter() - begin}
    if arguments.json:
        counts = print_json(model, prompt, options, num_samples, timing)
    elif streamed:
        stream = model.stream(prompt, **options)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        counts = [(stream.num_tokens, stream.num_steps)]
    else:
        completions = model.generate(prompt, num_samples=num_samples, **options)
        counts = step_counts(completions)
        for completion in completions:
            if num_samples > 1:
                print(f"--- sample {completion.sample_index + 1} of {num_samples}")
            print(completion.text)
    if arguments.speculate:
        report_steps(counts)


def step_counts(completions: "list[Completion]") -> list[tuple[int, int]]:
    """Each completion's tokens and steps."""
    return [(len(completion.token_ids), completion.num_steps) for completion in completions]


def report_steps(counts: list[tuple[int, int]]) -> None:
    """Says on stderr what guessing was worth. Each row's first token comes from its prompt's pass: not counted."""
    num_tokens = sum(tokens - 1 for tokens, _ in counts)
    num_steps = sum(steps for _, steps in counts)
    rate = f"{num_tokens / num_steps:.2f} tokens a step" if num_steps else "none needed"
    sys.stdout.flush()  # so that the line comes after the text where both go to one place
    print(f"speculate: {num_tokens} tokens after the first in {num_steps} steps, {rate}", file=sys.stderr)


def read_prompt(arguments: Arguments) -> str:
    """The prompt's text, less the line break that ends a file or a line of stdin."""
    from falcon_jax.errors import RequestError

    if arguments.prompt is not None and arguments.file is not None:
        raise RequestError("there are two prompts: give one as the argument or with --file, not both")
    if arguments.prompt is not None:
        prompt = arguments.prompt
    elif arguments.file is not None:
        try:
            prompt = arguments.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--file {arguments.file} cannot be read: {error}") from error
    elif sys.stdin.isatty():
        raise RequestError("there is no prompt: give one as the argument, with --file or on stdin")
    else:
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt on stdin is not UTF-8: {error}") from error
    if arguments.prompt is None:
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt:
        raise RequestError("the prompt is empty: it must have at least one character")
    return prompt


def print_json(
    model: "Falcon", prompt: str, options: dict[str, Any], num_samples: int, timing: dict[str, float]
) -> list[tuple[int, int]]:
    """Prints the document; returns each completion's tokens and steps.

    Args:
      timing: of what came before: import_s, and load_s, in which programs were compiled too.
    """
    begin = time.perf_counter()
    completions = model.generate(prompt, num_samples=num_samples, logprobs=True, **options)
    generate_s = time.perf_counter() - begin
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    document = {
        "prompt": prompt,
        "completions": [dataclasses.asdict(completion) for completion in completions],
        "timing": {
            **{name: round(seconds, 4) for name, seconds in timing.items()},
            "generate_s": round(generate_s, 4),  # with what loading left to be compiled
            "num_tokens": num_tokens,
            "tokens_per_s": round(num_tokens / generate_s, 2),
        },
    }
    print(json.dumps(document, ensure_ascii=False))
    return step_counts(completions)


def run() -> int:
    """The exit code: 0 done, 2 not to be served, 130 interrupted, 141 nobody reads on."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from falcon_jax.errors import exit_code

    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    return exit_code(lambda: main(arguments))


if __name__ == "__main__":
    sys.exit(run())
