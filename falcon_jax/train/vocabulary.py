"""Trains a byte-level BPE vocabulary and writes it as the tokenizer part of a Hugging Face folder.

Owns the splitting rule and the tokenizer files. Knows nothing of models. The one trap: `decode` must give back any text
exactly, so no normaliser, no prefix space and no clean-up of spaces is ever set.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from falcon_jax.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"

# Tokens never cross these pieces. On English novels at 8192 entries it gives 3.99 bytes a token, where GPT-2's rule
# gives 3.86: words keep their apostrophes ("don't" is one piece) and punctuation may swallow the line breaks after it.
# Digits stand alone, because numbers are rare in prose and would only waste entries.
SPLIT_PATTERN = (
    r" ?\p{L}+(?:['’]\p{L}+)*"  # a word with its leading space
    r"| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"  # spaces but the last, which belongs to the next word
    r"|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a byte-level BPE of exactly `vocab_size` entries: <|endoftext|> is id 0, then the 256 bytes, then merges.

    Raises: ConfigError where `vocab_size` is below 257 (the bytes and <|endoftext|>) or the texts have too few distinct
    pieces to fill it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise ConfigError(f"vocab_size is {vocab_size}; the bytes and {END_OF_TEXT} alone take {len(alphabet) + 1}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        found = tokenizer.get_vocab_size()
        raise ConfigError(f"vocab_size is {vocab_size}, but the texts give only {found} entries: take at most that")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json so that transformers' AutoTokenizer loads the folder.

    `max_tokens` is the trained context length, which transformers warns beyond.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
