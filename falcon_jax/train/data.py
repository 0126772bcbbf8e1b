"""From text files to batches: reading a corpus, tokenizing it once, and the order in which windows are trained on.

Owns the token cache (train.npy, valid.npy, corpus.json) and the data order. Knows nothing of models or devices but
`Prefetcher`, which runs a placing function in a thread. The one trap: a batch is a function of its step number alone,
so that a resumed run sees exactly the windows that an uninterrupted one would have seen.
"""

import dataclasses
import functools
import hashlib
import json
import queue
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt16

from falcon_jax.errors import ConfigError
from falcon_jax.tokenizer import TOKENIZER_FILE, Tokenizer

SPLITS = ("train", "valid")
LISTING = "corpus.json"  # what makes a folder a token cache


def read_documents(data: Path, split: str) -> Iterator[tuple[str, str]]:
    """Yields (file name, text) of `split`/*.txt in order of name, from a folder or a tar archive of any compression.

    Raises: ConfigError where nothing is found, or a file is not UTF-8.
    """
    if data.is_dir():
        files = sorted(data.glob(f"**/{split}/*.txt"))
        pairs: Iterator[tuple[str, bytes]] = ((path.name, path.read_bytes()) for path in files)
    elif data.is_file() and tarfile.is_tarfile(data):
        pairs = iter(_read_archive(data, split))
    else:
        raise ConfigError(f"data {str(data)!r} is neither a folder nor a tar archive; give one with train/ and valid/")
    is_empty = True
    for name, content in pairs:
        is_empty = False
        yield name, _decoded(content, f"{data}: {split}/{name}")
    if is_empty:
        raise ConfigError(f"{data} holds no {split}/*.txt; give a folder or archive with train/ and valid/ text files")


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text ({error})") from error


def _read_archive(data: Path, split: str) -> list[tuple[str, bytes]]:
    found = []
    with tarfile.open(data) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix == ".txt" and path.parent.name == split:
                file = archive.extractfile(member)
                if file is not None:
                    found.append((path.name, file.read()))
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class Split:
    """The tokens of one split: each document preceded by the end-of-text token, one after the other.

    starts: index of each document's end-of-text token. num_bytes: UTF-8 bytes of all the documents' text.
    """

    tokens: Integer[np.ndarray, " num_tokens"]
    starts: np.ndarray
    num_bytes: int

    def documents(self) -> list[np.ndarray]:
        """Each document's tokens, its leading end-of-text token included."""
        return np.split(self.tokens, self.starts[1:])


def tokenize_corpus(data: Path, tokenizer_folder: Path, cache: Path) -> dict[str, Split]:
    """The corpus as tokens, from the cache where it was made with this tokenizer, else tokenized into it.

    `data` may itself be such a cache (a folder with corpus.json), so that a machine without the text can train.

    Raises: ConfigError where the corpus lacks a split, the tokenizer has no end-of-text token or too many entries for
    16 bits, or a cache given as `data` was made with another tokenizer.
    """
    if (data / LISTING).is_file():
        return load_tokens(data, tokenizer_folder)
    source = {
        "tokenizer_sha256": _fingerprint(tokenizer_folder),
        "data": str(data.resolve()),
        "modified": _modified(data),
    }
    if (cache / LISTING).is_file():
        known = json.loads((cache / LISTING).read_text())
        if {key: known.get(key) for key in source} == source:
            return _load_cache(cache)
    _write_cache(data, tokenizer_folder, cache, source)
    return _load_cache(cache)


def load_tokens(cache: Path, tokenizer_folder: Path) -> dict[str, Split]:
    """The splits of a token cache. Raises: ConfigError where it was made with another tokenizer."""
    if json.loads((cache / LISTING).read_text())["tokenizer_sha256"] != _fingerprint(tokenizer_folder):
        vocabulary = tokenizer_folder / TOKENIZER_FILE
        raise ConfigError(f"{cache} holds tokens made with another tokenizer than {vocabulary}; tokenize again")
    return _load_cache(cache)


def read_texts(paths: Sequence[Path], tokenizer_folder: Path, split: str | None = None) -> Split:
    """The tokens of text files, and of what lies in folders and archives; or of one token cache.

    split: "train" or "valid", of a corpus. None: all *.txt at any depth of a folder, but the valid split of an archive
    or a token cache.

    Raises: ConfigError where there is no text, a file is not UTF-8, a token cache does not stand alone or was made with
    another tokenizer, or the tokenizer has no end-of-text token.
    """
    if any((path / LISTING).is_file() for path in paths):
        if len(paths) > 1:
            raise ConfigError(f"one of {', '.join(map(str, paths))} is a token cache; give it alone")
        return load_tokens(paths[0], tokenizer_folder)[split or "valid"]
    texts = (text for path in paths for text in _texts_of(path, split))
    return encode_documents(texts, Tokenizer.from_folder(tokenizer_folder), end_of_text_id(tokenizer_folder))


def _texts_of(path: Path, split: str | None) -> Iterator[str]:
    if path.is_file() and not tarfile.is_tarfile(path):
        yield _decoded(path.read_bytes(), str(path))
    elif path.is_dir() and split is None:
        files = sorted(path.glob("**/*.txt"))
        if not files:
            raise ConfigError(f"{path} holds no *.txt; give text files or folders of them")
        for file in files:
            yield _decoded(file.read_bytes(), str(file))
    elif path.exists():
        yield from (text for _, text in read_documents(path, split or "valid"))
    else:
        raise ConfigError(f"{path} does not exist; give text files or folders of them")


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer, separator: int) -> Split:
    """The texts as tokens, int32, each preceded by `separator`."""
    pieces, starts, num_bytes, position = [np.zeros(0, np.int32)], [], 0, 0
    for text in texts:
        piece = np.asarray([separator, *tokenizer.encode(text)], np.int32)
        pieces.append(piece)
        starts.append(position)
        position += len(piece)
        num_bytes += len(text.encode("utf-8"))
    return Split(np.concatenate(pieces), np.asarray(starts), num_bytes)


def _fingerprint(tokenizer_folder: Path) -> str:
    vocabulary = tokenizer_folder / TOKENIZER_FILE
    if not vocabulary.is_file():
        raise ConfigError(f"{vocabulary} does not exist; make one with scripts/train_tokenizer.py")
    return hashlib.sha256(vocabulary.read_bytes()).hexdigest()


def _modified(data: Path) -> float:
    """Newest change of the corpus, in seconds, so that an edited corpus is tokenized again."""
    files = [data, *data.glob("**/*.txt")] if data.is_dir() else [data]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def _write_cache(data: Path, tokenizer_folder: Path, cache: Path, source: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    if tokenizer.vocab_size > 2**16:
        raise ConfigError(f"{tokenizer_folder} has {tokenizer.vocab_size} entries; the token cache holds up to 65536")
    separator = end_of_text_id(tokenizer_folder)
    cache.mkdir(parents=True, exist_ok=True)
    listing: dict[str, Any] = dict(source)
    for split in SPLITS:
        encoded = encode_documents((text for _, text in read_documents(data, split)), tokenizer, separator)
        np.save(cache / f"{split}.npy", encoded.tokens.astype(np.uint16))
        listing[split] = {"starts": encoded.starts.tolist(), "num_bytes": encoded.num_bytes}
    # Written last: a cache without its listing does not count.
    (cache / LISTING).write_text(json.dumps(listing) + "\n")


def _load_cache(cache: Path) -> dict[str, Split]:
    listing = json.loads((cache / LISTING).read_text())
    return {
        split: Split(
            np.load(cache / f"{split}.npy"),
            np.asarray(listing[split]["starts"]),
            int(listing[split]["num_bytes"]),
        )
        for split in SPLITS
    }


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


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Which windows a step trains on: a function of (seed, step) alone.

    An epoch cuts the stream, taken as a ring, into windows of `length` targets from a random phase, and visits them in
    a random permutation; so no token is trained on twice in an epoch, at most `length - 1` are left out, and the cuts
    fall elsewhere in each epoch. Rows run on across epochs: a batch may hold the end of one and the start of the next.
    """

    tokens: np.ndarray
    batch_size: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise ConfigError(
                f"length is {self.length}, but the train split has only {len(self.tokens)} tokens: shorten the length"
            )

    @property
    def num_windows(self) -> int:
        """Windows in an epoch."""
        return len(self.tokens) // self.length

    def starts(self, epoch: int) -> np.ndarray:
        """First input index of each window of an epoch, in the order of training."""
        return _epoch_starts(len(self.tokens), self.length, self.seed, epoch)

    def batch(self, step: int) -> UInt16[np.ndarray, "B columns"]:
        """Rows of `length + 1` tokens: inputs are all but the last, targets all but the first."""
        rows = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = rows // self.num_windows, rows % self.num_windows
        starts = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            starts[chosen] = self.starts(int(epoch))[places[chosen]]
        return self.tokens.take(starts[:, None] + np.arange(self.length + 1), mode="wrap")


@functools.lru_cache(maxsize=2)  # batches ask for the same epoch many times, at its border for two
def _epoch_starts(num_tokens: int, length: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.default_rng([seed, epoch])
    phase = int(generator.integers(num_tokens))
    return (phase + length * generator.permutation(num_tokens // length)) % num_tokens


class Prefetcher:
    """Makes batches for the steps first, first + 1, ... in a thread, `depth` ahead of the reader.

    An error in the thread is raised at the reader. Use as a context manager: leaving it ends the thread.
    """

    def __init__(self, make: Callable[[int], Any], first: int, depth: int = 4) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, first), daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[int], Any], step: int) -> None:
        while not self._stopped.is_set():
            try:
                item: Any = make(step)
            except Exception as error:
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            step += 1

    def next(self) -> Any:
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
