"""Tokenized once into files that no accident leaves half made or changed unnoticed."""

import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from falcon_jax.errors import ConfigError
from falcon_jax.tokenizer import Tokenizer
from falcon_jax.train import data as train_data
from falcon_jax.train import shards
from falcon_jax.train.data import read_texts, tokenize_corpus
from falcon_jax.train.shards import LISTING, Split, Tokens
from falcon_jax.train.sources import SPLITS, Source
from falcon_jax.train.vocabulary import END_OF_TEXT

NUM_DOCUMENTS = 30


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The toy corpus, cut into documents of uneven lengths and some more that are short."""
    text = "".join(path.read_text() for path in sorted((corpus / "train").glob("*.txt")))
    path = tmp_path_factory.mktemp("lines") / "corpus.jsonl"
    pieces = [text[37 * number * number // 10 :][: 5 + 11 * (number % 13)] for number in range(NUM_DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return path


def same(one: dict[str, Split], other: dict[str, Split]) -> bool:
    return all(
        np.array_equal(one[split].tokens[:], other[split].tokens[:])
        and np.array_equal(one[split].starts, other[split].starts)
        and one[split].num_bytes == other[split].num_bytes
        for split in SPLITS
    )


def test_tokens_in_pieces_read_as_one_array() -> None:
    whole = np.arange(100, dtype=np.uint16)
    tokens = Tokens(np.split(whole, [30, 31, 77]))
    for first, end in itertools.product((0, 1, 29, 30, 31, 50, 76, 77, 99, 100), repeat=2):
        np.testing.assert_array_equal(tokens[first:end], whole[first:end])
    np.testing.assert_array_equal(
        tokens.rows(np.asarray([99, 0, 75]), 250), np.add.outer([99, 0, 75], np.arange(250)) % 100
    )
    assert (len(tokens), tokens.max(), tokens.dtype) == (100, 99, np.uint16)


def test_documents_follow_an_end_of_text_token_and_decode_to_their_files(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    valid = tokenize_corpus(corpus, tokenizer_folder, tmp_path)["valid"]
    files = [path.read_bytes() for path in sorted((corpus / "valid").glob("*.txt"))]
    assert valid.num_bytes == sum(map(len, files))
    for document, content in zip(valid.documents(), files, strict=True):
        assert document[0] == 0
        text = Tokenizer.from_folder(tokenizer_folder).decode(document[1:].tolist())
        assert text.encode() == content


def test_many_files_hold_what_one_holds(
    lines: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_data, "_GROUP_DOCUMENTS", 7)
    monkeypatch.setattr(shards, "_MAX_MAPPED", 2)
    one = tokenize_corpus(lines, tokenizer_folder, tmp_path / "one", valid_share=0.3)
    many = tokenize_corpus(lines, tokenizer_folder, tmp_path / "many", valid_share=0.3, shard_tokens=150)
    assert same(one, many)
    sizes = [path.stat().st_size // 2 for path in sorted((tmp_path / "many").glob("train-*.tokens"))]
    assert len(sizes) > 3 and all(size < 150 + 140 for size in sizes)  # no document has 140 tokens
    assert len(list((tmp_path / "one").glob("*.tokens"))) == 2
    in_memory = read_texts([lines], tokenizer_folder)
    assert len(in_memory.starts) == NUM_DOCUMENTS == sum(len(split.starts) for split in many.values())
    assert in_memory.num_bytes == sum(split.num_bytes for split in many.values())


def test_the_corpus_is_tokenized_once_and_its_tokens_can_stand_for_it(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenize_corpus(corpus, tokenizer_folder, tmp_path)
    monkeypatch.setattr(Source, "documents", lambda *_: pytest.fail("tokenized again"))
    for data in (corpus, tmp_path):
        assert same(tokenize_corpus(data, tokenizer_folder, tmp_path), first)


def test_another_corpus_in_its_place_is_tokenized_anew(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "tokens", shard_tokens=50)
    for split in SPLITS:
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "a.txt").write_text(f"the {split} text")
    tokens = tokenize_corpus(tmp_path / "data", tokenizer_folder, tmp_path / "tokens")
    assert tokens["valid"].num_bytes == len("the valid text")
    assert len(list((tmp_path / "tokens").iterdir())) == 5  # and the old files are gone


class KilledError(BaseException):
    """Nothing catches it, as nothing catches the end of a process."""


def test_a_tokenization_that_is_killed_anywhere_never_counts_and_goes_on_from_its_files(
    lines: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_data, "_GROUP_DOCUMENTS", 3)
    how: dict[str, Any] = {"valid_share": 0.3, "shard_tokens": 400}
    whole = tokenize_corpus(lines, tokenizer_folder, tmp_path / "whole", **how)
    replace, add = os.replace, shards.TokenWriter.add
    calls, limit, calls_to_the_end = 0, 0, []

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise KilledError
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "replace", counted(replace))
    monkeypatch.setattr(shards.TokenWriter, "add", counted(add))
    for moment in itertools.count(1):
        folder, calls, limit = tmp_path / str(moment), 0, moment
        try:
            tokenize_corpus(lines, tokenizer_folder, folder, **how)
            break
        except KilledError:
            assert not shards.is_token_folder(folder)
        calls, limit = 0, -1
        assert same(tokenize_corpus(lines, tokenizer_folder, folder, **how), whole)
        calls_to_the_end.append(calls)
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in (tmp_path / "whole").iterdir()
        )
    assert moment > NUM_DOCUMENTS + 10
    assert calls_to_the_end[-1] < calls_to_the_end[0] / 4  # files that were whole are not made again


def test_a_flipped_bit_or_a_lost_byte_is_found_and_named(lines: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenize_corpus(lines, tokenizer_folder, tmp_path, valid_share=0.3, shard_tokens=400)
    files = sorted([*tmp_path.glob("*.tokens"), *tmp_path.glob("*.starts")])
    assert len(files) >= 8
    for number, path in enumerate(files):
        content = path.read_bytes()
        bit = 97 * number % (8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(
            ConfigError, match=f"{path.name} has changed since it was written: delete .* tokenize again"
        ):
            tokenize_corpus(tmp_path, tokenizer_folder, tmp_path)
        found = 0
        for part in range(3):  # processes that share the work
            try:
                tokenize_corpus(tmp_path, tokenizer_folder, tmp_path, check=(part, 3))
            except ConfigError:
                found += 1
        assert found == 1
        tokenize_corpus(tmp_path, tokenizer_folder, tmp_path, check=None)
        path.write_bytes(content[:-1])
        with pytest.raises(ConfigError, match=rf"{path.name} has {len(content) - 1} bytes instead of {len(content)}"):
            tokenize_corpus(tmp_path, tokenizer_folder, tmp_path, check=None)
        path.write_bytes(content)
    files[0].unlink()
    with pytest.raises(ConfigError, match=f"{files[0].name} is missing"):
        tokenize_corpus(tmp_path, tokenizer_folder, tmp_path, check=None)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_beyond_16_bits_take_32(vocab_size: int, dtype: type, tmp_path: Path) -> None:
    words = {END_OF_TEXT: 0, **{f"w{number}": number for number in range(1, vocab_size)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, END_OF_TEXT))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    (tmp_path / "book.txt").write_text(f"w1 w2 w{vocab_size - 1}\n\nw3 w4")
    tokens = tokenize_corpus(tmp_path / "book.txt", tmp_path, tmp_path / "tokens", valid_share=0.3)
    assert tokens["train"].tokens.dtype == dtype
    assert tokens["train"].tokens[:].tolist() == [0, 1, 2, vocab_size - 1]
    assert tokens["valid"].tokens[:].tolist() == [0, 3, 4]


def test_texts_may_be_files_folders_archives_or_tokens(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    made = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "tokens")
    with tarfile.open(tmp_path / "corpus.tar", "w") as archive:
        archive.add(corpus, "books")
    assert same(tokenize_corpus(tmp_path / "corpus.tar", tokenizer_folder, tmp_path / "again"), made)
    assert not [path for path in (tmp_path / "again").iterdir() if path.is_dir()]  # it was unpacked there
    files = sorted((corpus / "valid").glob("*.txt"))
    for paths, split in (
        (files, None),
        ([corpus / "valid"], None),
        ([corpus], "valid"),
        ([tmp_path / "corpus.tar"], None),
        ([tmp_path / "tokens"], None),
    ):
        read = read_texts(paths, tokenizer_folder, split)
        assert same({"train": made["train"], "valid": read}, made)
    everything = made["train"].num_bytes + made["valid"].num_bytes
    assert read_texts([corpus], tokenizer_folder).num_bytes == everything


def test_texts_that_are_none_are_refused(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "tokens")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for names, message in (
        (["nowhere"], "nowhere does not exist"),
        (["empty"], r"holds no \*\.txt"),
        (["latin.txt"], r"latin\.txt is not UTF-8"),
        (["latin.txt", "tokens"], "give it alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_texts([tmp_path / name for name in names], tokenizer_folder)


def test_tokens_that_do_not_fit_are_refused(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokens, other = tmp_path / "tokens", tmp_path / "other"
    tokenize_corpus(corpus, tokenizer_folder, tokens)
    other.mkdir()
    (other / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ConfigError, match="another tokenizer"):
        tokenize_corpus(tokens, other, tmp_path)
    with pytest.raises(ConfigError, match="eos_token is None, which is no special token"):
        tokenize_corpus(corpus, other, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    for listing, message in (('{"train": {}}', "is of format 1, not 2: tokenize again"), ("{", "is damaged")):
        (tokens / LISTING).write_text(listing)
        with pytest.raises(ConfigError, match=message):
            tokenize_corpus(tokens, tokenizer_folder, tmp_path)
