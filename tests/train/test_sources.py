"""One corpus in every form that text comes in, what is held out, and what is refused."""

import gzip
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from falcon_jax.errors import ConfigError
from falcon_jax.train.sources import SPLITS, Source, read_documents, read_texts

FORMS: dict[str, Callable[[Path, dict[str, list[str]]], Path]] = {}


def form(write: Callable[[Path, dict[str, list[str]]], Path]) -> Callable[[Path, dict[str, list[str]]], Path]:
    FORMS[write.__name__] = write
    return write


def library() -> Any:
    import datasets  # late, since it takes seconds; its own types tell less than it takes

    return datasets


def texts_of(corpus: Path) -> dict[str, list[str]]:
    return {split: [path.read_bytes().decode() for path in sorted((corpus / split).glob("*"))] for split in SPLITS}


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


@form
def archive_in_another_order(folder: Path, texts: dict[str, list[str]]) -> Path:
    with tarfile.open(folder / "corpus.tar.xz", "w:xz") as archive:
        for split in reversed(SPLITS):
            for number, text in reversed(list(enumerate(texts[split]))):
                (folder / "text").write_bytes(text.encode())
                archive.add(folder / "text", f"books/{split}/{number}.txt")
    return folder / "corpus.tar.xz"


@form
def json_lines(folder: Path, texts: dict[str, list[str]]) -> Path:
    for split in SPLITS:
        (folder / "deep" / split).mkdir(parents=True)
        (folder / "deep" / split / "0.jsonl").write_bytes(lines_of(texts[split][:1]) + b"\n")
        (folder / "deep" / split / "1.jsonl.gz").write_bytes(gzip.compress(lines_of(texts[split][1:])))
    (folder / "notes.txt").write_text("in neither split")
    return folder


@form
def json_lines_in_an_archive(folder: Path, texts: dict[str, list[str]]) -> Path:
    with tarfile.open(folder / "corpus.tar", "w") as archive:
        archive.add(json_lines(folder / "lines", texts), "lines")
    return folder / "corpus.tar"


@form
def tables(folder: Path, texts: dict[str, list[str]]) -> Path:
    datasets = library()
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        datasets.Dataset.from_dict({"text": texts[split][:1], "id": [0]}).to_parquet(folder / split / "0.parquet")
        (folder / split / "1.json").write_text(json.dumps([{"text": text} for text in texts[split][1:]]))
    return folder


@form
def saved_data_sets(folder: Path, texts: dict[str, list[str]]) -> Path:
    datasets = library()
    parts = {"train": texts["train"], "validation": texts["valid"], "test": ["in neither split"]}
    saved = {name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_the_documents_of_the_text_files(name: str, corpus: Path, tmp_path: Path) -> None:
    texts = texts_of(corpus)
    expected = [(split, text) for split in SPLITS for text in texts[split]]
    data = FORMS[name](tmp_path, texts)
    # Their order counts within a split.
    assert sorted(Source(data).documents(), key=lambda pair: pair[0]) == expected == list(Source(corpus).documents())
    for split in SPLITS:
        assert list(read_documents(data, split)) == list(read_texts(data, split)) == texts[split]


def test_a_data_set_of_the_hub_is_asked_for_by_name_and_streamed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = library()
    texts = texts_of(corpus)
    found = datasets.load_from_disk(saved_data_sets(tmp_path, texts))
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options))
        return datasets.IterableDatasetDict({name: part.to_iterable_dataset() for name, part in found.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents(Path("hf:owner/name:english@v2"), "valid")) == texts["valid"]
    assert list(read_documents(Path("hf:owner/name"), "train")) == texts["train"]
    assert asked == [
        ("owner/name", "english", {"revision": "v2", "streaming": True}),
        ("owner/name", None, {"revision": None, "streaming": True}),
    ]


def test_a_share_of_the_documents_is_held_out_by_their_text(tmp_path: Path) -> None:
    texts = [f"number {number // 2}" for number in range(400)]  # each twice
    (tmp_path / "all.jsonl").write_bytes(lines_of(texts))
    source = Source(tmp_path / "all.jsonl", valid_share=0.2)
    split_of = {}
    for split, text in source.documents():
        assert split_of.setdefault(text, split) == split
    assert list(split_of) == list(dict.fromkeys(texts))
    assert 20 <= list(split_of.values()).count("valid") <= 60
    (tmp_path / "more.jsonl").write_bytes(lines_of(["another", *texts]))
    assert split_of.items() <= {text: split for split, text in source.documents()}.items()


def test_the_end_of_a_book_is_held_out_from_a_paragraph_on(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Paragraph {number}\nof the book." for number in range(100)))
    (_, train), (_, valid) = Source(book, valid_share=0.1).documents()
    assert train + valid == book.read_text()
    assert valid.startswith("Paragraph 9") and 0.08 < len(valid) / len(book.read_text()) <= 0.1


def test_what_decides_the_documents_makes_the_identity(corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")  # with its times
    first = Source(corpus).identity()
    assert Source(copy).identity() == first == json.loads(json.dumps(first))
    assert Source(copy, text_field="body").identity() != first != Source(copy, valid_share=0.1).identity()
    (copy / "notes.txt").write_text("not read")
    assert Source(copy).identity() == first
    (copy / "valid" / "0.txt").write_text("another text")
    assert Source(copy).identity() != first
    assert Source(Path("hf:a/b")).identity() != Source(Path("hf:a/c")).identity()


def write_bad(folder: Path) -> None:
    line = lines_of(["fine"])
    for name, content in {
        "latin.txt": b"caf\xe9",
        "not_json.jsonl": line + b"\n{'text'}\n",
        "list.jsonl": line + b"[1]\n",
        "field.jsonl": line + b'{"body": "a", "id": 3}\n',
        "null.jsonl": b'{"text": null}\n',
        "half.jsonl": b'{"text": "\\ud800"}\n',
        "cut.jsonl.gz": gzip.compress(line * 1000, mtime=0)[:-20],
        "bad.parquet": b"PAR1 but no more",
        "bad.json": b"[{",
        "cut.tar.gz": gzip.compress(b"0" * 300)[:-5],
        "two/train/a.txt": b"text",
        "whole/train/a.jsonl": line,
        "whole/valid/b.jsonl": b"\xff\n",
        "own/train/a.txt": b"text",
        "own/valid/b.jsonl": line,
        "empty/README.md": b"no corpus",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with tarfile.open(folder / "whole.tar", "w") as archive:
        archive.add(folder / "whole", "whole")


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("nowhere", None, r"nowhere does not exist; give a text file, a folder, a tar archive or hf:owner/name"),
        ("empty", None, r"empty holds no train and no valid documents; give train/ and valid/ with \*\.txt, .*share"),
        ("two", None, r"two holds no valid documents"),
        ("latin.txt", None, r"latin\.txt holds no train and no valid documents; .* valid_share to hold some"),
        ("latin.txt", 0.5, r"latin\.txt is not UTF-8 text"),
        ("not_json.jsonl", 0.5, r"not_json\.jsonl line 3 is not JSON .*; give one object a line"),
        ("list.jsonl", 0.5, r"list\.jsonl line 2 is no JSON object; give one with 'text' a line"),
        ("field.jsonl", 0.5, r"field\.jsonl line 2 has no text under 'text', only body, id; name the text_field"),
        ("null.jsonl", 0.5, r"null\.jsonl line 1 has no text under 'text', only text"),
        ("half.jsonl", 0.5, r"half\.jsonl line 1 is no text .*surrogates"),
        ("cut.jsonl.gz", 0.5, r"cut\.jsonl\.gz cannot be read after line \d+ .*; make it again"),
        ("bad.parquet", 0.5, r"bad\.parquet cannot be read by `datasets` \("),
        ("bad.json", 0.5, r"bad\.json cannot be read by `datasets` \("),
        ("whole", None, r"whole: valid/b\.jsonl line 1 is not UTF-8"),
        ("whole.tar", None, r"whole\.tar: whole/valid/b\.jsonl line 1 is not UTF-8"),
        ("own", 0.1, r"own has a valid split of its own; leave out valid_share \(0\.1\)"),
        ("two", 1e-9, r"two holds no valid documents; take another valid_share than 1e-09"),
        ("two", 1.0, r"valid_share is 1\.0; it must be above 0 and below 1"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    name: str, share: float | None, message: str, tmp_path: Path
) -> None:
    write_bad(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        list(Source(tmp_path / name, valid_share=share).documents())
    assert "\n" not in str(caught.value)


def test_a_column_that_a_table_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    datasets = library()
    datasets.Dataset.from_dict({"body": ["a"], "id": [0]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet has no text under 'text', only body, id; name the text_field"):
        list(read_texts(tmp_path / "x.parquet", None))
    assert list(read_texts(tmp_path / "x.parquet", None, "body")) == ["a"]


def test_without_the_library_text_is_read_and_tables_name_the_extra(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(list(Source(corpus).documents())) == 4
    (tmp_path / "x.parquet").touch()
    for data in (tmp_path / "x.parquet", Path("hf:owner/name")):
        with pytest.raises(ConfigError, match=r"install falcon-jax\[datasets\]"):
            list(Source(data, valid_share=0.1).documents())
