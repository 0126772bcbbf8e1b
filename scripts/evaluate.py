"""Perplexity and bits per byte of a text under a checkpoint, by context length.

Every document starts from the end-of-text token and every token is counted once, in windows that do not overlap; with
--stride also in windows that slide, where each token sees a long context. Lengths may lie beyond the trained one. The
last line on stdout is JSON with everything.

python scripts/evaluate.py falcon_jax/assets/falcon-nano book.txt --lengths 512 2048 --stride 256
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from falcon_jax import options as shared

if TYPE_CHECKING:
    from collections.abc import Iterator

    import jax

    from falcon_jax.train.evaluation import Score


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: Annotated[str, tyro.conf.Positional]
    """Folder made by convert_checkpoint.py, Hugging Face folder or hub id, with a tokenizer."""
    texts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """UTF-8 text, JSON lines or parquet files, folders of them, archives with train/ and valid/, Hugging Face data sets
    (folder or hf:owner/name), or one folder of tokens made by train.py."""
    split: Literal["train", "valid"] | None = None
    """Part of a corpus; without it all of a folder, and the valid split of an archive or of tokens."""
    text_field: str = "text"
    """Where JSON lines and rows of a data set have their text."""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Tokens of context."""
    stride: int | None = None
    """Also measures windows that begin every so many tokens, at most the shortest length."""
    batch_tokens: int = 16384
    """Tokens a batch holds, at least one row."""
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    """What the model computes in."""
    attention: str | None = None
    """Attention implementation: "mosaic" (Hopper GPUs), "cudnn" or "xla"; the best that works by default."""
    weights: Literal["native", "int8", "int4"] = "native"
    """Of the blocks' projections: in dtype, or of 8 or 4 bits, stored so or rounded while they are loaded."""
    alibi: Literal["float32", "hf_bf16"] = "float32"
    """float32 is exact; hf_bf16 rounds positions as transformers does, which blurs them beyond 256 tokens."""
    compilation_cache: shared.CompilationCache = None
    quiet: bool = False
    """Shows no progress bar."""


def shapes_of(arguments: Arguments) -> list[tuple[int, int]]:
    """Each (length, stride) to measure; where the two are equal, nothing slides."""
    strides = [None] if arguments.stride is None else [None, arguments.stride]
    shapes = [(length, stride or length) for length in arguments.lengths for stride in strides]
    return list(dict.fromkeys(shapes))


def measure(arguments: Arguments) -> list["Score"]:
    from falcon_jax import commands
    from falcon_jax.checkpoint import CheckpointError, hub, load
    from falcon_jax.errors import ConfigError
    from falcon_jax.model.decoder import ForwardOptions
    from falcon_jax.tokenizer import TOKENIZER_FILE
    from falcon_jax.train import evaluation
    from falcon_jax.train.data import read_texts

    if not arguments.texts or not arguments.lengths or min(arguments.lengths) < 1:
        raise ConfigError("give at least one text, and lengths of at least 1")
    if arguments.stride is not None and not 1 <= arguments.stride <= min(arguments.lengths):
        shortest = min(arguments.lengths)
        raise ConfigError(f"--stride is {arguments.stride}; it must be from 1 to the shortest length, {shortest}")
    commands.use_compilation_cache(arguments.compilation_cache)
    folder = hub.local_folder(arguments.model)
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{arguments.model} holds no tokenizer.json, without which text means nothing")
    split = read_texts(arguments.texts, folder, arguments.split, arguments.text_field)
    how: dict[str, Any] = {
        "dtype": arguments.dtype,
        "forward": ForwardOptions(attention=arguments.attention, alibi=arguments.alibi),
        "batch_tokens": arguments.batch_tokens,
    }

    def programs() -> "Iterator[jax.stages.Lowered]":
        config, described = commands.described(folder, arguments.dtype, arguments.weights)
        yield from evaluation.lower_ahead(config, described, split, shapes_of(arguments), **how)

    with commands.compile_ahead(programs):
        config, params, _ = load(folder, dtype=arguments.dtype, weights=arguments.weights)
    scores = []
    for score in evaluation.evaluate(config, params, split, shapes_of(arguments), progress=not arguments.quiet, **how):
        beyond = ", beyond the trained length" if score.length > config.max_tokens else ""
        print(
            f"length {score.length}, stride {score.stride}: {score.bits_per_byte:.4f} bits a byte, "
            f"perplexity {score.perplexity:.3f}{beyond}",
            flush=True,
        )
        scores.append(score)
    return scores


def settings_of(arguments: Arguments) -> dict[str, str | bool]:
    """What the numbers are of, for the last line."""
    from falcon_jax.checkpoint.manifest import Manifest, is_converted

    folder = Path(arguments.model).expanduser()
    return {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "weights": arguments.weights,
        "calibrated": is_converted(folder) and Manifest.read(folder).calibrated,
        "alibi": arguments.alibi,
    }


def main() -> int:
    """The exit code: 0 done, 2 not to be done, 130 interrupted."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from falcon_jax import commands  # late: --help need not wait for JAX

    def work() -> None:
        scores = measure(arguments)
        print(json.dumps({**settings_of(arguments), "results": [score.record() for score in scores]}))

    return commands.finish(work, less="lower --batch-tokens or --lengths")


if __name__ == "__main__":
    sys.exit(main())
