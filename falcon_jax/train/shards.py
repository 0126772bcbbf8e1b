"""Tokens on disk: files of bounded size that are mapped into memory and read as one array.

A folder of tokens holds, for each split, files of the same documents: NAME.tokens, all tokens as uint16 (uint32 for
vocabularies above 65,536), and NAME.starts, where in it each document begins, as uint32; both bare little-endian
arrays. corpus.json, written last, lists them with their sizes and checksums. Knows nothing of text. The one trap: a
file appears by a rename when it is whole, and counts only once a listing names it, so a process may be killed anywhere.
"""

import array
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer
from tqdm import tqdm

from falcon_jax.checkpoint.checksum import host_checksum
from falcon_jax.errors import ConfigError

LISTING = "corpus.json"  # what makes a folder a whole one
_PARTIAL = "corpus.incoming.json"  # the same, of a tokenization that is under way
_FORMAT = 2  # 1 had one .npy file a split
SHARD_TOKENS = 2**28  # 512 MiB of uint16
_STARTS = np.dtype("<u4")
_MAX_MAPPED = 256  # files of a split: each holds a file descriptor, of which a process has 1,024 by default
_BAR_DELAY_S = 2.0  # a bar that would be gone sooner is not shown


class Tokens:
    """Many tokens in pieces, read as one array; only what is read is in memory where the pieces are mapped files."""

    def __init__(self, pieces: Sequence[np.ndarray], sizes: Sequence[int] | None = None) -> None:
        """sizes: tokens of each piece; None asks the pieces, of which there must be one."""
        self._pieces = pieces
        self._begins = [0, *itertools.accumulate(map(len, pieces) if sizes is None else sizes)]
        self.dtype = pieces[0].dtype

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, stretch: slice) -> Integer[np.ndarray, " num_tokens"]:
        """Tokens first:end; not a copy where they lie in one piece. Raises: ValueError for a step."""
        first, end, step = stretch.indices(len(self))
        if step != 1:
            raise ValueError(f"step is {step}; tokens are read in order, without a step")
        piece = self._piece_of(first)
        begin = self._begins[piece]
        if end <= self._begins[piece + 1]:
            return self._pieces[piece][first - begin : max(first, end) - begin]
        return self.rows(np.asarray([first]), end - first)[0]

    def rows(self, starts: Integer[np.ndarray, " B"], num_columns: int) -> Integer[np.ndarray, "B columns"]:
        """The `num_columns` tokens from each start on, of all tokens taken as a ring."""
        rows = np.empty((len(starts), num_columns), self.dtype)
        for row, start in zip(rows, starts.tolist()):
            piece = self._piece_of(start % len(self))
            offset, done = start % len(self) - self._begins[piece], 0
            while done < num_columns:
                found = self._pieces[piece][offset : offset + num_columns - done]
                row[done : done + len(found)] = found
                done += len(found)
                piece, offset = (piece + 1) % len(self._pieces), 0
        return rows

    def max(self) -> int:
        """The largest id, 0 where there are none. Reads all tokens."""
        return max(int(piece.max(initial=0)) for piece in self._pieces)

    def _piece_of(self, position: int) -> int:
        return min(bisect.bisect_right(self._begins, position), len(self._pieces)) - 1


@dataclasses.dataclass(frozen=True)
class Split:
    """The tokens of one split: each document preceded by the end-of-text token, one after the other.

    num_bytes: UTF-8 bytes of all the documents' text. read_starts: gives `starts`, when they are first asked for.
    """

    tokens: Tokens
    num_bytes: int
    read_starts: Callable[[], np.ndarray]

    @classmethod
    def of(cls, tokens: Integer[np.ndarray, " num_tokens"], starts: np.ndarray, num_bytes: int) -> "Split":
        """A split whose tokens are in memory. starts: index of each document's end-of-text token."""
        return cls(Tokens([tokens]), num_bytes, lambda: starts)

    @functools.cached_property
    def starts(self) -> Int64[np.ndarray, " num_documents"]:
        """Index of each document's end-of-text token: 8 bytes of memory a document."""
        return np.asarray(self.read_starts(), np.int64)

    def documents(self) -> Iterator[np.ndarray]:
        """Each document's tokens, its leading end-of-text token included."""
        for first, end in itertools.pairwise([*self.starts.tolist(), len(self.tokens)]):
            yield self.tokens[first:end]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What the listing says of NAME.tokens and NAME.starts."""

    name: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    tokens_checksum: str
    starts_checksum: str

    def arrays(self, dtype: np.dtype) -> list[tuple[str, np.dtype, int, str]]:
        """(file name, dtype, elements, checksum) of each of the two."""
        return [
            (f"{self.name}.tokens", dtype, self.num_tokens, self.tokens_checksum),
            (f"{self.name}.starts", _STARTS, self.num_documents, self.starts_checksum),
        ]


@dataclasses.dataclass
class _Listing:
    """What corpus.json holds. num_documents: of all splits, so many of the source are in the shards."""

    identity: dict[str, Any]
    dtype: np.dtype
    num_documents: int
    shards: dict[str, list[_Shard]]

    @classmethod
    def read(cls, path: Path) -> "_Listing":
        """Raises: ConfigError where it is damaged or of another version of this package."""
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known.get("format", 1) != _FORMAT:
                raise ConfigError(f"{path} is of format {known.get('format', 1)}, not {_FORMAT}: tokenize again")
            shards = {split: [_Shard(**shard) for shard in listed] for split, listed in known["shards"].items()}
            dtype = np.dtype(known["dtype"])
            return cls(known["identity"], dtype, known["num_documents"], shards)
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is damaged ({error}): delete its folder and tokenize again") from error

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        shards = {split: [dataclasses.asdict(shard) for shard in listed] for split, listed in self.shards.items()}
        known = {"format": _FORMAT, "identity": self.identity, "dtype": self.dtype.str}
        known |= {"num_documents": self.num_documents, "shards": shards}
        incoming = path.with_name(f"{path.name}.writing")
        incoming.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        os.replace(incoming, path)


def is_token_folder(folder: Path) -> bool:
    """Whether the folder holds tokens, whole as far as its writer knows."""
    return (folder / LISTING).is_file()


def read_identity(folder: Path) -> dict[str, Any]:
    """What the tokens of a folder were made from. Raises: ConfigError where its listing is damaged or of old."""
    return _Listing.read(folder / LISTING).identity


def read_digest(folder: Path) -> str:
    """One number for all tokens of a folder and how they fall into splits, documents and files: from the listing's
    sizes and checksums, not from the files. Raises: ConfigError where the listing is damaged or of old."""
    listing = _Listing.read(folder / LISTING)
    shards = {split: [dataclasses.asdict(shard) for shard in listed] for split, listed in listing.shards.items()}
    return hashlib.sha256(json.dumps([listing.dtype.str, shards], sort_keys=True).encode()).hexdigest()


def open_tokens(folder: Path, check: tuple[int, int] | None = (0, 1)) -> dict[str, Split]:
    """The splits of a folder of tokens, mapped into memory. Sizes of files are always compared with the listing.

    check: (part, num_parts) also compares the checksums of every num_parts-th file, so that processes that share a disk
    can share the reading of it all, which takes a second for some 4 GB that lie in memory and as long as the disk for
    others. None: of no file.

    Raises: ConfigError naming the file that is missing, has another size or other bits than were written.
    """
    listing = _Listing.read(folder / LISTING)
    files = [
        (folder / name, dtype, size, checksum)
        for shards in listing.shards.values()
        for shard in shards
        for name, dtype, size, checksum in shard.arrays(listing.dtype)
    ]
    for path, dtype, size, _ in files:
        found = path.stat().st_size if path.is_file() else None
        if found != size * dtype.itemsize:
            what = "is missing" if found is None else f"has {found} bytes instead of {size * dtype.itemsize}"
            raise ConfigError(f"{path} {what}: delete {folder} and tokenize again")
    if check is not None:
        _compare_checksums(folder, files[check[0] :: check[1]])
    return {split: _open_split(folder, listing.dtype, shards) for split, shards in listing.shards.items()}


def _compare_checksums(folder: Path, files: Sequence[tuple[Path, np.dtype, int, str]]) -> None:
    total = sum(dtype.itemsize * size for _, dtype, size, _ in files)
    with tqdm(total=total, desc="checking tokens", unit="B", unit_scale=True, delay=_BAR_DELAY_S) as bar:
        for path, dtype, size, checksum in files:
            if host_checksum(_map_file(path, dtype)) != checksum:
                raise ConfigError(f"{path} has changed since it was written: delete {folder} and tokenize again")
            bar.update(size * dtype.itemsize)


def _open_split(folder: Path, dtype: np.dtype, shards: Sequence[_Shard]) -> Split:
    sizes = [shard.num_tokens for shard in shards]

    def read_starts() -> np.ndarray:
        begins = itertools.accumulate(sizes[:-1], initial=0)
        local = (np.fromfile(folder / f"{shard.name}.starts", _STARTS) for shard in shards)
        return np.concatenate([begin + part.astype(np.int64) for begin, part in zip(begins, local)])

    pieces = _MappedFiles([folder / f"{shard.name}.tokens" for shard in shards], dtype)
    return Split(Tokens(pieces, sizes), sum(shard.num_bytes for shard in shards), read_starts)


class _MappedFiles(Sequence[np.ndarray]):
    """Arrays in files, each mapped when it is asked for; the last few stay so."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype) -> None:
        self._paths = paths
        self._map = functools.lru_cache(_MAX_MAPPED)(lambda number: _map_file(paths[number], dtype))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: Any) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._map(number)


def _map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, mode="r")


class TokenWriter:
    """Fills a folder of tokens, a document at a time. Leave it as a context manager; `finish` makes the folder whole.

    Where an earlier writer with the same identity was interrupted there, its shards are kept and `num_documents` says
    how many of the source's first documents they hold; anything else in the way is deleted.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], vocab_size: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        """shard_tokens: a file that has so many is ended, with its document, and the other split's beside it."""
        self._folder, self._shard_tokens = folder, shard_tokens
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LISTING).unlink(missing_ok=True)  # before any file that it names changes
        dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._listing = _Listing(json.loads(json.dumps(identity)), dtype, 0, {})
        with contextlib.suppress(ConfigError, FileNotFoundError):  # what cannot be read is made again
            known = _Listing.read(folder / _PARTIAL)
            if (known.identity, known.dtype) == (self._listing.identity, dtype):
                self._listing = known
        kept = {f"{shard.name}.tokens" for shards in self._listing.shards.values() for shard in shards}
        for path in [*folder.glob("*-?????.tokens*"), *folder.glob("*-?????.starts*")]:
            if path.with_suffix(".tokens").name not in kept:
                path.unlink()
        self.num_documents = self._listing.num_documents
        self._open: dict[str, _OpenShard] = {}

    @property
    def dtype(self) -> np.dtype:
        return self._listing.dtype

    def add(self, split: str, tokens: Integer[np.ndarray, " num_tokens"], num_bytes: int) -> None:
        """Adds one document: its tokens, the leading end-of-text token included, and the UTF-8 bytes of its text.

        Where that ends the open files, all documents so far stay if the process is lost.
        """
        if split not in self._open:
            name = f"{split}-{len(self._listing.shards.get(split, [])):05d}"
            self._open[split] = _OpenShard(self._folder, name, self.dtype)
        self._open[split].add(tokens, num_bytes)
        self.num_documents += 1
        if self._open[split].num_tokens >= self._shard_tokens:
            self._end_shards()

    def finish(self) -> None:
        self._end_shards()
        os.replace(self._folder / _PARTIAL, self._folder / LISTING)

    def _end_shards(self) -> None:
        for split, shard in self._open.items():
            self._listing.shards.setdefault(split, []).append(shard.end())
        self._open.clear()
        self._listing.num_documents = self.num_documents
        self._listing.write(self._folder / _PARTIAL)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._open.values():
            shard.close()


class _OpenShard:
    """A shard that is being written, under names that count for nothing until `end`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._file = (folder / f"{name}.tokens.incoming").open("wb")
        self._starts = array.array("I")
        self._num_bytes = 0
        self.num_tokens = 0

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        self._starts.append(self.num_tokens)
        self._file.write(memoryview(np.ascontiguousarray(tokens, self._dtype)).cast("B"))
        self.num_tokens += len(tokens)
        self._num_bytes += num_bytes

    def end(self) -> _Shard:
        """Closes and renames the files, and says what is in them."""
        self.close()
        starts = np.asarray(self._starts, _STARTS)
        starts.tofile(self._folder / f"{self._name}.starts.incoming")
        for suffix in ("tokens", "starts"):
            os.replace(self._folder / f"{self._name}.{suffix}.incoming", self._folder / f"{self._name}.{suffix}")
        written = _map_file(self._folder / f"{self._name}.tokens", self._dtype)
        checksums = host_checksum(written), host_checksum(starts)
        return _Shard(self._name, self.num_tokens, len(starts), self._num_bytes, *checksums)

    def close(self) -> None:
        self._file.close()
