import tarfile
from pathlib import Path

import numpy as np
import pytest

from falcon_jax.errors import ConfigError
from falcon_jax.tokenizer import Tokenizer
from falcon_jax.train import data as train_data
from falcon_jax.train.data import Prefetcher, TrainingOrder, read_texts, tokenize_corpus


def test_an_epoch_trains_on_each_token_once() -> None:
    order = TrainingOrder(np.arange(1, 1001, dtype=np.uint16), batch_size=4, length=8, seed=3)
    assert order.num_windows == 125
    targets = np.concatenate([order.batch(step)[:, 1:].ravel() for step in range(32)])[: 125 * 8]
    assert sorted(targets) == list(range(1, 1001))


def test_rows_hold_a_stretch_of_the_stream_taken_as_a_ring() -> None:
    order = TrainingOrder(np.arange(50, dtype=np.uint16), batch_size=5, length=9, seed=0)
    for step in range(6):
        batch = order.batch(step)
        assert batch.shape == (5, 10)
        np.testing.assert_array_equal(batch, (batch[:, :1] + np.arange(10)) % 50)


def test_batches_depend_on_the_step_and_the_seed_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first, again = (TrainingOrder(tokens, 4, 16, seed=7) for _ in range(2))
    backwards = {step: again.batch(step) for step in reversed(range(40))}
    for step in range(40):
        np.testing.assert_array_equal(first.batch(step), backwards[step])
    assert not np.array_equal(first.batch(0), TrainingOrder(tokens, 4, 16, seed=8).batch(0))


def test_cuts_fall_elsewhere_in_each_epoch() -> None:
    order = TrainingOrder(np.arange(1000, dtype=np.uint16), 4, 16)
    assert set(order.starts(0)) != set(order.starts(1))


def test_a_corpus_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 10 tokens"):
        TrainingOrder(np.arange(10, dtype=np.uint16), 1, 16)


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


def test_an_archive_gives_the_same_tokens_as_its_folder(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "corpus.tar.xz", "w:xz") as archive:
        archive.add(corpus, "books")
    packed = tokenize_corpus(tmp_path / "corpus.tar.xz", tokenizer_folder, tmp_path / "a")
    unpacked = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "b")
    for split in train_data.SPLITS:
        np.testing.assert_array_equal(packed[split].tokens, unpacked[split].tokens)


def test_the_corpus_is_tokenized_once_and_its_tokens_can_stand_for_it(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenize_corpus(corpus, tokenizer_folder, tmp_path)
    monkeypatch.setattr(train_data, "read_documents", lambda *_: pytest.fail("tokenized again"))
    for data in (corpus, tmp_path):
        np.testing.assert_array_equal(
            tokenize_corpus(data, tokenizer_folder, tmp_path)["train"].tokens, first["train"].tokens
        )


def test_tokens_of_another_vocabulary_are_refused(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "tokens")
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ConfigError, match="another tokenizer"):
        tokenize_corpus(tmp_path / "tokens", other, tmp_path)


def test_texts_may_be_files_folders_archives_or_tokens(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    made = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "tokens")
    with tarfile.open(tmp_path / "corpus.tar", "w") as archive:
        archive.add(corpus, "books")
    files = sorted((corpus / "valid").glob("*.txt"))
    for paths, split in (
        (files, None),
        ([corpus / "valid"], None),
        ([corpus], "valid"),
        ([tmp_path / "corpus.tar"], None),
        ([tmp_path / "tokens"], None),
    ):
        read = read_texts(paths, tokenizer_folder, split)
        np.testing.assert_array_equal(read.tokens, made["valid"].tokens)
        np.testing.assert_array_equal(read.starts, made["valid"].starts)
        assert read.num_bytes == made["valid"].num_bytes
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


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a tar archive"):
        list(train_data.read_documents(tmp_path / "nowhere", "train"))
    with pytest.raises(ConfigError, match=r"no train/\*\.txt"):
        list(train_data.read_documents(tmp_path, "train"))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"train/a\.txt is not UTF-8"):
        list(train_data.read_documents(tmp_path, "train"))


def test_the_prefetcher_goes_in_order_and_passes_errors_on() -> None:
    def make(step: int) -> int:
        if step == 7:
            raise ValueError("no seven")
        return step

    with Prefetcher(make, 5) as batches:
        assert [batches.next(), batches.next()] == [5, 6]
        with pytest.raises(ValueError, match="no seven"):
            batches.next()


def test_leaving_the_prefetcher_ends_its_thread() -> None:
    with Prefetcher(lambda step: step, 0) as batches:
        batches.next()
    assert not batches._thread.is_alive()
