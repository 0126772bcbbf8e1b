"""From text to tokens: a corpus is tokenized once into a folder of mapped files; small texts are in memory.

Ties the parts together: sources.py knows where documents are, shards.py how tokens lie on disk, order.py which of them
a step trains on. The one trap: tokens mean something with their tokenizer alone, so a folder of them carries the
tokenizer's fingerprint.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from falcon_jax.errors import ConfigError
from falcon_jax.tokenizer import TOKENIZER_FILE, Tokenizer
from falcon_jax.train import shards
from falcon_jax.train.shards import Split
from falcon_jax.train.sources import UNPACKED_PREFIX, Source
from falcon_jax.train.sources import read_texts as read_source_texts

# Documents go to the tokenizer in groups: enough of them for all its threads, few enough to lie in memory.
_GROUP_DOCUMENTS = 1024
_GROUP_CHARACTERS = 2**22
_GROUPS_AHEAD = 2  # one is cut into tokens while another's become an array


def tokenize_corpus(
    data: Path,
    tokenizer_folder: Path,
    cache: Path,
    *,
    text_field: str = "text",
    valid_share: float | None = None,
    check: tuple[int, int] | None = (0, 1),
    shard_tokens: int = shards.SHARD_TOKENS,
    accept: Callable[[str], None] = lambda digest: None,
) -> dict[str, Split]:
    """The splits "train" and "valid" as tokens, from `cache` where this corpus lies there, else tokenized into it.

    An interrupted tokenization goes on where its last whole file ends. `data` may itself be a folder of tokens, so that
    a machine without the text can train. One process at a time may tokenize into a folder.

    data, text_field, valid_share: see `sources.Source`. check: which files' checksums are compared, see
    `shards.open_tokens`. shard_tokens: at which a file ends, with the document. accept: told the tokens' digest
    (`shards.read_digest`) before they take the place of others in `cache`, which stay as they are if it raises.

    Raises: ConfigError where the corpus cannot be read or lacks a split, the tokenizer has no end-of-text token, or
    tokens are damaged or were made with another tokenizer.
    """
    if shards.is_token_folder(data):
        accept(shards.read_digest(data))
        return load_tokens(data, tokenizer_folder, check)
    source = Source(data, text_field, valid_share)
    identity = {"tokenizer_sha256": _fingerprint(tokenizer_folder), **source.identity()}
    incoming = cache.with_name(f"{cache.name}.incoming")
    if _holds(cache, identity):
        shutil.rmtree(incoming, ignore_errors=True)  # of a process that was lost
        accept(shards.read_digest(cache))
        return shards.open_tokens(cache, check)
    # Whole tokens may be those of a run: others are made beside them.
    making = incoming if any(map(shards.is_token_folder, (cache, incoming))) else cache
    if not _holds(making, identity):
        tokenizer, separator = Tokenizer.from_folder(tokenizer_folder), end_of_text_id(tokenizer_folder)
        with shards.TokenWriter(making, identity, tokenizer.vocab_size, shard_tokens) as writer:
            for stale in making.glob(f"{UNPACKED_PREFIX}*"):  # of a process that was lost
                shutil.rmtree(stale)
            _write_tokens(dataclasses.replace(source, scratch=making), tokenizer, separator, writer)
    try:
        accept(shards.read_digest(making))
    except ConfigError:
        if making != cache:
            shutil.rmtree(making)
        raise
    if making != cache:
        (cache / shards.LISTING).unlink(missing_ok=True)  # first: a folder that is half deleted counts for nothing
        shutil.rmtree(cache, ignore_errors=True)
        making.rename(cache)
    return shards.open_tokens(cache, check)


def describe_corpus(
    data: Path, tokenizer_folder: Path, *, text_field: str = "text", valid_share: float | None = None
) -> dict[str, Any]:
    """What is known of a corpus's tokens before they are made, JSON-able: what they are made with, and how.

    Files that are moved or touched change nothing here. A folder of tokens answers as the corpus that it was made of.

    Raises: ConfigError where there is no tokenizer, or a folder of tokens cannot be read.
    """
    if shards.is_token_folder(data):
        made_of = shards.read_identity(data)
    else:
        made_of = Source(data, text_field, valid_share).identity()
    known = {"tokenizer_sha256": _fingerprint(tokenizer_folder)}
    return known | {name: made_of[name] for name in ("hub", "text_field", "valid_share")}


def load_tokens(folder: Path, tokenizer_folder: Path, check: tuple[int, int] | None = (0, 1)) -> dict[str, Split]:
    """The splits of a folder of tokens. Raises: ConfigError where it is damaged or was made with another tokenizer."""
    if shards.read_identity(folder)["tokenizer_sha256"] != _fingerprint(tokenizer_folder):
        vocabulary = tokenizer_folder / TOKENIZER_FILE
        raise ConfigError(f"{folder} holds tokens made with another tokenizer than {vocabulary}; tokenize again")
    return shards.open_tokens(folder, check)


def read_texts(
    paths: Sequence[Path], tokenizer_folder: Path, split: str | None = None, text_field: str = "text"
) -> Split:
    """The tokens of text files, and of what lies in folders, archives and data sets, in memory; or of one token folder.

    split: "train" or "valid", of a corpus. None: the valid split of an archive, a data set with splits or a token
    folder, and all documents of others.

    Raises: ConfigError where there is no text, a file is not UTF-8, a token folder does not stand alone or was made
    with another tokenizer, or the tokenizer has no end-of-text token.
    """
    if any(shards.is_token_folder(path) for path in paths):
        if len(paths) > 1:
            raise ConfigError(f"one of {', '.join(map(str, paths))} is a folder of tokens; give it alone")
        return load_tokens(paths[0], tokenizer_folder)[split or "valid"]
    texts = (text for path in paths for text in read_source_texts(path, split, text_field))
    return encode_documents(texts, Tokenizer.from_folder(tokenizer_folder), end_of_text_id(tokenizer_folder))


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer, separator: int) -> Split:
    """The texts as tokens in memory, int32, each preceded by `separator`."""
    pieces, starts, num_bytes, position = [np.zeros(0, np.int32)], [], 0, 0
    for _, piece, size in _encoded((("", text) for text in texts), tokenizer, separator, np.dtype(np.int32)):
        pieces.append(piece)
        starts.append(position)
        position += len(piece)
        num_bytes += size
    return Split.of(np.concatenate(pieces), np.asarray(starts, np.int64), num_bytes)


def end_of_text_id(tokenizer_folder: Path) -> int:
    """Id of the eos token that tokenizer_config.json names. Raises: ConfigError where there is none."""
    path = tokenizer_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    token = settings.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    added = json.loads((tokenizer_folder / TOKENIZER_FILE).read_text(encoding="utf-8")).get("added_tokens", [])
    ids = [entry["id"] for entry in added if entry["content"] == text]
    if not ids:
        raise ConfigError(f"{path}: eos_token is {text!r}, which is no special token of {TOKENIZER_FILE}")
    return int(ids[0])


def _fingerprint(tokenizer_folder: Path) -> str:
    vocabulary = tokenizer_folder / TOKENIZER_FILE
    if not vocabulary.is_file():
        raise ConfigError(f"{vocabulary} does not exist; make one with scripts/train_tokenizer.py")
    return hashlib.sha256(vocabulary.read_bytes()).hexdigest()


def _holds(cache: Path, identity: dict[str, object]) -> bool:
    """Whether the folder has the tokens of just this corpus. One whose listing cannot be read has not."""
    if not shards.is_token_folder(cache):
        return False
    with contextlib.suppress(ConfigError):
        return shards.read_identity(cache) == identity
    return False


def _write_tokens(source: Source, tokenizer: Tokenizer, separator: int, writer: shards.TokenWriter) -> None:
    documents = itertools.islice(source.documents(), writer.num_documents, None)
    with tqdm(desc="tokenizing", unit="B", unit_scale=True, mininterval=0.5) as bar:
        num_tokens = 0
        for split, tokens, num_bytes in _encoded(documents, tokenizer, separator, writer.dtype):
            writer.add(split, tokens, num_bytes)
            num_tokens += len(tokens)
            bar.update(num_bytes)
            bar.set_postfix_str(f"{num_tokens:,} tokens", refresh=False)
    writer.finish()


def _encoded(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, separator: int, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray, int]]:
    """(split, tokens with the leading separator, UTF-8 bytes) of each document, in order; other threads work ahead."""

    def encode(group: list[tuple[str, str]]) -> list[tuple[str, np.ndarray, int]]:
        ids = tokenizer.encode_batch([text for _, text in group])
        return [
            (split, np.asarray([separator, *tokens], dtype), len(text.encode("utf-8")))
            for (split, text), tokens in zip(group, ids)
        ]

    with ThreadPoolExecutor(_GROUPS_AHEAD) as pool:
        pending: collections.deque[Future[list[tuple[str, np.ndarray, int]]]] = collections.deque()
        for group in _groups(documents):
            pending.append(pool.submit(encode, group))
            if len(pending) > _GROUPS_AHEAD:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _groups(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    group, num_characters = [], 0
    for split, text in documents:
        group.append((split, text))
        num_characters += len(text)
        if len(group) == _GROUP_DOCUMENTS or num_characters >= _GROUP_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group
