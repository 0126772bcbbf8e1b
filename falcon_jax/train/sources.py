"""Where text comes from: files, folders, archives, JSON lines and Hugging Face datasets, one document at a time.

Owns what counts as a document, the order of documents and which of them are held out for validation. Knows nothing of
tokens. The one trap: the same data must give the same documents in the same order each time, since a tokenization that
was interrupted goes on by their number.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from falcon_jax.errors import ConfigError

SPLITS = ("train", "valid")
HUB_PREFIX = "hf:"
UNPACKED_PREFIX = "falcon_jax-unpacked-"
_LINES = (".jsonl", ".jsonl.gz")
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json"}  # read by the `datasets` library, as what
SUFFIXES = (".txt", *_LINES, *_TABLES)
# What Dataset.save_to_disk and DatasetDict.save_to_disk leave.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_SPLIT_OF_NAME = {"train": "train", "valid": "valid", "validation": "valid"}
_ROWS_AT_ONCE = 256  # of a table


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents, each in the split "train" or "valid".

    data: a folder with train/ and valid/ at any depth, of .txt (one document a file), .jsonl and .jsonl.gz (one a line)
    or .parquet, .arrow and .json (one a row); or a tar archive of such a folder. A folder made by `save_to_disk`, or
    "hf:owner/name", "hf:owner/name:config", "hf:owner/name@revision" of the Hugging Face hub, with the splits train and
    validation (or valid). Or, with valid_share, any of these without a valid split, or one file.
    text_field: where lines and rows have their text.
    valid_share: share of the documents, above 0 and below 1, that make the valid split. A document's own hash decides,
    so that equal ones fall into one split and others do not move when the data grows. Of a single .txt file it is the
    end, from a paragraph's start.
    scratch: folder for the temporary one that an archive is unpacked into; None: the system's.
    """

    data: Path
    text_field: str = "text"
    valid_share: float | None = None
    scratch: Path | None = None

    def __post_init__(self) -> None:
        if self.valid_share is not None and not 0 < self.valid_share < 1:
            raise ConfigError(f"valid_share is {self.valid_share}; it must be above 0 and below 1, such as 0.01")

    def documents(self, splits: Collection[str] = SPLITS) -> Iterator[tuple[str, str]]:
        """Yields (split, text) of these splits, in the same order each time.

        One document, or a few rows, are in memory. An archive is unpacked into a temporary folder for that long.

        Raises: ConfigError where there is nothing to read, a file is damaged or not UTF-8, the text field is missing,
        or a split has no document.
        """
        lacking = dict.fromkeys(splits)
        for split, text in self._split(splits):
            lacking.pop(split, None)
            if split in splits:
                yield split, text
        if lacking:
            raise ConfigError(f"{self.data} holds no {' and no '.join(lacking)} documents; {self._advice()}")

    def labelled(self, labels: Collection[str | None] = (*SPLITS, None)) -> Iterator[tuple[str | None, str]]:
        """Yields (label, text) of the documents with these labels: the split that the data has them in, None where it
        tells none."""
        data = self.data
        if _is_on_hub(data) or _is_saved(data):
            yield from self._from_library(labels)
        elif data.is_dir():
            yield from self._from_folder(data, labels)
        elif _is_archive(data):
            with tempfile.TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=self.scratch) as folder:
                _unpack(data, Path(folder))
                yield from self._from_folder(Path(folder), labels)
        elif not data.is_file():
            raise ConfigError(
                f"{data} does not exist; give a text file, a folder, a tar archive or {HUB_PREFIX}owner/name"
            )
        elif None in labels:
            yield from ((None, text) for text in _read_file(data, self.text_field, str(data)))

    def identity(self) -> dict[str, Any]:
        """What decides the documents, JSON-able: settings, and names, sizes and times of the files that are read.

        A corpus that is moved stays the same; a data set of the hub does while its name and revision do.
        """
        data = self.data
        files = [data] if data.is_file() else []
        if _is_saved(data):
            files = sorted(path for path in data.rglob("*") if path.is_file())
        elif data.is_dir():
            files = _files(data, SPLITS if self.valid_share is None else (*SPLITS, None))
        digest = hashlib.sha256()
        for path in files:
            about = path.stat()
            digest.update(f"{path.relative_to(data)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
        return {
            "hub": str(data) if _is_on_hub(data) else None,
            "files_sha256": digest.hexdigest(),
            "text_field": self.text_field,
            "valid_share": self.valid_share,
        }

    def _split(self, splits: Collection[str]) -> Iterator[tuple[str, str]]:
        share = self.valid_share
        if share is None:
            yield from ((label, text) for label, text in self.labelled(splits) if label is not None)
        elif self.data.is_file() and self.data.suffix == ".txt":
            (text,) = _read_file(self.data, self.text_field, str(self.data))
            cut = _paragraph_start(text, 1 - share)
            yield from (("train", text[:cut]), ("valid", text[cut:]))
        else:
            for _ in self.labelled(("valid",)):
                raise ConfigError(f"{self.data} has a valid split of its own; leave out valid_share ({share})")
            for _, text in self.labelled():
                digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
                yield "valid" if int.from_bytes(digest) < share * 2**64 else "train", text

    def _advice(self) -> str:
        if self.valid_share is not None:
            return f"take another valid_share than {self.valid_share}, or more documents"
        kinds = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        return f"give train/ and valid/ with {kinds}, or a valid_share to hold some of the documents out"

    def _from_folder(self, folder: Path, labels: Collection[str | None]) -> Iterator[tuple[str | None, str]]:
        for path in _files(folder, labels):
            where = f"{self.data}: {path.relative_to(folder)}"  # also where the folder is an archive's temporary one
            yield from ((_label(path), text) for text in _read_file(path, self.text_field, where))

    def _from_library(self, labels: Collection[str | None]) -> Iterator[tuple[str | None, str]]:
        """From a data set of the `datasets` library, or from those of a dict that are for training and validation."""
        with _told(self.data):
            if _is_saved(self.data):
                loaded = _datasets().load_from_disk(str(self.data))
            else:
                name, _, revision = str(self.data).removeprefix(HUB_PREFIX).partition("@")
                name, _, config = name.partition(":")
                loaded = _datasets().load_dataset(name, config or None, revision=revision or None, streaming=True)
        parts = loaded.items() if isinstance(loaded, dict) else [(None, loaded)]
        for name, part in parts:
            label = _SPLIT_OF_NAME.get(str(name))
            if (name is None or label is not None) and label in labels:
                where = str(self.data) if name is None else f"{self.data}, split {name}"
                yield from ((label, text) for text in _table_texts(part, self.text_field, where))


def read_documents(data: Path, split: str, text_field: str = "text", valid_share: float | None = None) -> Iterator[str]:
    """Yields the texts of one split. Raises: ConfigError, as `Source.documents`."""
    return (text for _, text in Source(data, text_field, valid_share).documents((split,)))


def read_texts(data: Path, split: str | None, text_field: str = "text") -> Iterator[str]:
    """Yields the texts of one split. None: of valid, in an archive or a data set with splits; else all texts.

    Raises: ConfigError where there are none, or as `Source.documents`.
    """
    is_empty = True
    labels = (*SPLITS, None) if split is None else (split,)
    if split is None and _is_archive(data):
        labels = ("valid",)
    elif split is None and (_is_on_hub(data) or _is_saved(data)):
        labels = ("valid", None)
    for _, text in Source(data, text_field).labelled(labels):
        is_empty = False
        yield text
    if is_empty:
        where = "" if split is None else f"{split}/"
        kinds = ", ".join(f"{where}*{suffix}" for suffix in SUFFIXES)
        raise ConfigError(f"{data} holds no {kinds}; give text files or folders of them")


def _read_file(path: Path, text_field: str, where: str) -> Iterator[str]:
    """Yields the documents of one file, of the kind that its name tells; a name of no known kind is a text."""
    if path.suffix in _TABLES:
        with _told(where):
            table = _datasets().load_dataset(
                _TABLES[path.suffix], data_files=[str(path)], split="train", streaming=True
            )
        yield from _table_texts(table, text_field, where)
    elif path.name.endswith(_LINES):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from _line_texts(file, text_field, where)
    else:
        yield _decoded(path.read_bytes(), where)


def _line_texts(file: Iterable[bytes], text_field: str, where: str) -> Iterator[str]:
    lines = iter(file)
    for number in itertools.count(1):
        try:
            line = next(lines, None)
        except (EOFError, OSError, zlib.error) as error:  # of a gzip file that is cut off or damaged
            raise ConfigError(f"{where} cannot be read after line {number - 1} ({error}); make it again") from error
        if line is None:
            return
        if not line.strip():
            continue
        try:
            record = json.loads(_decoded(line, f"{where} line {number}"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} line {number} is not JSON ({error}); give one object a line") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{where} line {number} is no JSON object; give one with {text_field!r} a line")
        yield _checked(record.get(text_field), text_field, record, f"{where} line {number}")


def _table_texts(table: Any, text_field: str, where: str) -> Iterator[str]:
    """Texts of a data set of the `datasets` library, read a few rows at a time."""
    columns = table.column_names
    if columns is not None and text_field not in columns:
        _checked(None, text_field, columns, where)
    if columns is not None:
        table = table.select_columns(text_field)
    number = 0
    with _told(where):
        for rows in table.iter(_ROWS_AT_ONCE):
            for text in rows.get(text_field, [None]):
                number += 1
                yield _checked(text, text_field, rows, f"{where} row {number}")


def _checked(text: Any, text_field: str, columns: Iterable[str], where: str) -> str:
    if not isinstance(text, str):
        found = ", ".join(columns) or "nothing"
        raise ConfigError(f"{where} has no text under {text_field!r}, only {found}; name the text_field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} is no text ({error}); mend or drop it") from error
    return text


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text ({error})") from error


def _files(folder: Path, labels: Collection[str | None]) -> list[Path]:
    """The files of a folder that hold documents with these labels, at any depth, in order of path.

    A .json file counts in train/ and valid/ alone: elsewhere it is seldom text.
    """
    found = [
        Path(where, name)
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(SUFFIXES)
    ]
    labelled = ((path, _label(path)) for path in found)
    return sorted(path for path, label in labelled if label in labels and (label or path.suffix != ".json"))


def _label(path: Path) -> str | None:
    return path.parent.name if path.parent.name in SPLITS else None


def _is_on_hub(data: Path) -> bool:
    return str(data).startswith(HUB_PREFIX)


def _is_saved(data: Path) -> bool:
    return (data / _SAVED).is_file() or (data / _SAVED_SPLITS).is_file()


def _is_archive(data: Path) -> bool:
    return data.is_file() and tarfile.is_tarfile(data)


def _unpack(data: Path, folder: Path) -> None:
    try:
        with tarfile.open(data) as archive:
            members = (member for member in archive if member.isfile() and member.name.endswith(SUFFIXES))
            archive.extractall(folder, members=members, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{data} cannot be unpacked ({error}); make the archive again") from error


def _paragraph_start(text: str, share: float) -> int:
    """Where the first paragraph begins that lies wholly beyond `share` of the text; or line, or character."""
    about = int(len(text) * share)
    for border in ("\n\n", "\n"):
        found = text.find(border, about)
        if 0 <= found < len(text) - len(border):
            return found + len(border)
    return about


@contextlib.contextmanager
def _told(where: Path | str) -> Iterator[None]:
    """Turns what `datasets` raises of data that it cannot read into one line that names the data."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, LookupError, NotImplementedError, ArithmeticError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{where} cannot be read by `datasets` ({type(error).__name__}: {message})") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"parquet, arrow, json and Hugging Face data sets need the `datasets` library ({error}); "
            "install falcon-jax[datasets]"
        ) from error
    return datasets
