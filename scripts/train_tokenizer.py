"""Trains a byte-level BPE vocabulary on the train split of a corpus and writes the tokenizer files."""

import dataclasses
import sys
from pathlib import Path

import tyro

from falcon_jax.errors import ConfigError
from falcon_jax.train.sources import read_documents
from falcon_jax.train.vocabulary import save_tokenizer, train_tokenizer


@dataclasses.dataclass(frozen=True)
class Arguments:
    data: Path
    """Folder or .tar(.xz) with train/ and valid/ of text, JSON lines or parquet; or, with --valid-share, one file; or a
    Hugging Face data set, as its folder or hf:owner/name."""
    output: Path
    """Folder for tokenizer.json and tokenizer_config.json."""
    vocab_size: int = 8192
    max_tokens: int = 2048
    """Context length of the model that will use it."""
    text_field: str = "text"
    """Where JSON lines and rows have their text."""
    valid_share: float | None = None
    """Share of the documents to hold out, where the data has no valid split: as in train.py."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        where = (arguments.text_field, arguments.valid_share)
        tokenizer = train_tokenizer(read_documents(arguments.data, "train", *where), arguments.vocab_size)
        save_tokenizer(tokenizer, arguments.output, arguments.max_tokens)
        num_tokens = num_bytes = 0
        for text in read_documents(arguments.data, "valid", *where):
            num_tokens += len(tokenizer.encode(text).ids)
            num_bytes += len(text.encode())
    except (ConfigError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    rate = f"{num_bytes / num_tokens:.3f} bytes a token on the validation split"
    print(f"{arguments.output}: {arguments.vocab_size} entries, {rate}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
