"""Perplexity and bits per byte of text files under a checkpoint, by context length.

Non-overlapping windows of each length over each file, which starts from the end-of-text token: every byte is
counted once, and no token sees anything before its own window.

python scripts/evaluate.py falcon_jax/assets/falcon-nano book.txt --lengths 512 2048
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from falcon_jax.checkpoint.load import load
from falcon_jax.errors import CheckpointError, ConfigError
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.tokenizer import Tokenizer
from falcon_jax.train.data import Split, end_of_text_id, validation_windows
from falcon_jax.train.metrics import bits_per_byte
from falcon_jax.train.step import StepOptions, make_eval_step


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: Annotated[str, tyro.conf.Positional]
    """Orbax folder, Hugging Face folder or hub id, with a tokenizer."""
    texts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """UTF-8 text files."""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Tokens of context."""
    batch_tokens: int = 16384
    """Tokens a batch holds, at least one row."""
    dtype: str = "bfloat16"
    """What the model computes in."""
    attention: str | None = None
    """Attention implementation; the best that works by default."""


def read_split(paths: tuple[Path, ...], tokenizer_folder: Path) -> Split:
    tokenizer, separator = Tokenizer.from_folder(tokenizer_folder), end_of_text_id(tokenizer_folder)
    documents, num_bytes = [], 0
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text ({error})") from error
        documents.append(np.asarray([separator, *tokenizer.encode(text)], np.int32))
        num_bytes += len(text.encode("utf-8"))
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
    return Split(np.concatenate(documents), starts, num_bytes)


def evaluate(arguments: Arguments) -> list[dict[str, float]]:
    """For each length: bits per byte, perplexity a token, and how many tokens and bytes were counted."""
    config, params, tokenizer_folder = load(arguments.model, dtype=arguments.dtype)
    if tokenizer_folder is None:
        raise CheckpointError(f"{arguments.model} holds no tokenizer.json, without which text means nothing")
    split = read_split(arguments.texts, tokenizer_folder)
    if not split.num_bytes:
        raise ConfigError("the text files are empty; give at least one byte of text")
    options = StepOptions(compute_dtype=arguments.dtype)
    step = make_eval_step(config, options, ForwardOptions(attention=arguments.attention))
    results = []
    for length in arguments.lengths:
        tokens, counts = validation_windows(split, length)
        rows, nats = max(1, arguments.batch_tokens // length), 0.0
        for start in range(0, len(tokens), rows):
            missing = max(0, start + rows - len(tokens))  # one shape for all batches: one compilation
            batch = np.pad(tokens[start : start + rows], ((0, missing), (0, 0)))
            real = np.pad(counts[start : start + rows], (0, missing))
            nats += float(np.sum(np.asarray(step(params, batch, real)), dtype=np.float64))
        num_tokens = int(counts.sum())
        results.append(
            {
                "length": length,
                "bits_per_byte": bits_per_byte(nats, split.num_bytes),
                "perplexity": math.exp(nats / num_tokens),
                "num_tokens": num_tokens,
                "num_bytes": split.num_bytes,
            }
        )
    return results


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    if not arguments.lengths or min(arguments.lengths) < 1 or not arguments.texts:
        print("evaluate: give at least one text file, and lengths of at least 1", file=sys.stderr)
        return 2
    try:
        for result in evaluate(arguments):
            print(json.dumps(result))
    except (CheckpointError, ConfigError, OSError, NotImplementedError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
