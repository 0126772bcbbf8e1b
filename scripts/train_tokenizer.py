"""Trains a byte-level BPE vocabulary on the train split of a corpus and writes the tokenizer files."""

import dataclasses
import sys
from pathlib import Path

import tyro

from falcon_jax.errors import ConfigError
from falcon_jax.train.data import read_documents
from falcon_jax.train.vocabulary import save_tokenizer, train_tokenizer


@dataclasses.dataclass(frozen=True)
class Arguments:
    data: Path
    """Folder or .tar(.xz) with train/*.txt and valid/*.txt."""
    output: Path
    """Folder for tokenizer.json and tokenizer_config.json."""
    vocab_size: int = 8192
    max_tokens: int = 2048
    """Context length of the model that will use it."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        tokenizer = train_tokenizer((text for _, text in read_documents(arguments.data, "train")), arguments.vocab_size)
        save_tokenizer(tokenizer, arguments.output, arguments.max_tokens)
        texts = [text for _, text in read_documents(arguments.data, "valid")]
    except (ConfigError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    num_tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    rate = f"{num_bytes / num_tokens:.3f} bytes a token on the validation split"
    print(f"{arguments.output}: {arguments.vocab_size} entries, {rate}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
