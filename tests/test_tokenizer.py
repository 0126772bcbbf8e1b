"""Text to ids and back; incremental decoding, which must never show half a character."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from falcon_jax.errors import CheckpointError
from falcon_jax.tokenizer import IncrementalDecoder, Tokenizer
from tests import hf_models

TEXT = "The lighthouse, naïve café: 東京 🦅 über \ufffd end"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    hf_models.tiny_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token a byte: the splits that a model may make and the encoder never would."""
    alphabet = _byte_alphabet()
    vocabulary = tokenizer._tokenizer.get_vocab()
    return [vocabulary[alphabet[byte]] for byte in data]


def _byte_alphabet() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def stream(tokenizer: Tokenizer, ids: list[int], size: int = 1) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [*pieces, decoder.flush()]


def test_text_survives_encode_and_decode(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size >= 257


def test_special_tokens_give_no_text_unless_asked_for(tokenizer):
    ids = [*tokenizer.encode("end"), 0]
    assert tokenizer.decode(ids) == "end"
    assert tokenizer.decode(ids, skip_special=False) == "end<|endoftext|>"


def test_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    assert Tokenizer.from_folder(tmp_path / "new").encode(TEXT) == tokenizer.encode(TEXT)


def test_padding_and_truncation_in_the_file_do_not_touch_prompts(tmp_path):
    raw = hf_models.tiny_tokenizer(tmp_path)
    raw.enable_truncation(3)
    raw.enable_padding(length=64)
    raw.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer file"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_join_to_the_decoded_text(tokenizer, size):
    ids = byte_ids(tokenizer, TEXT.encode())
    assert "".join(stream(tokenizer, ids, size)) == tokenizer.decode(ids) == TEXT


def test_a_character_of_four_tokens_comes_out_whole(tokenizer):
    assert stream(tokenizer, byte_ids(tokenizer, "a🦅b".encode())) == ["a", "", "", "", "🦅", "b", ""]


def test_text_before_half_a_character_is_not_held_back(tokenizer):
    decoder = IncrementalDecoder(tokenizer)
    ids = byte_ids(tokenizer, "word é".encode())
    assert decoder.push(ids[:-1]) == "word "
    assert decoder.push(ids[-1:]) == "é"


def test_replacement_character_in_the_text_is_kept(tokenizer):
    ids = byte_ids(tokenizer, "a\ufffd\ufffdb\ufffd".encode())
    assert "".join(stream(tokenizer, ids)) == "a\ufffd\ufffdb\ufffd"


def test_bytes_that_are_no_text_are_not_held_back_for_ever(tokenizer):
    pieces = stream(tokenizer, byte_ids(tokenizer, b"a" + b"\x80" * 20))
    assert pieces[0] == "a" and pieces[10] == "\ufffd"
    assert "".join(pieces) == "a" + "\ufffd" * 20


def test_truncated_character_is_shown_at_the_end_only(tokenizer):
    assert stream(tokenizer, byte_ids(tokenizer, b"a\xe6\x9d")) == ["a", "", "", "\ufffd"]


def test_end_of_text_within_a_stream_is_not_printed(tokenizer):
    ids = [*byte_ids(tokenizer, "é".encode()), 0, *byte_ids(tokenizer, b"b")]
    assert "".join(stream(tokenizer, ids)) == "éb"


def test_decoder_can_be_used_again_after_flush(tokenizer):
    decoder = IncrementalDecoder(tokenizer)
    decoder.push(byte_ids(tokenizer, b"old\xe6"))
    decoder.flush()
    assert decoder.push(byte_ids(tokenizer, b"new")) == "new"


@given(data=st.binary(max_size=24), size=st.integers(1, 5))
def test_any_bytes_stream_to_what_they_decode_to(tokenizer, data, size):
    ids = byte_ids(tokenizer, data)
    pieces = stream(tokenizer, ids, size)
    assert "".join(pieces) == tokenizer.decode(ids) == data.decode(errors="replace")


def test_decoders_that_drop_a_leading_space_keep_the_spaces_between(tmp_path):
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, unk_token="s"))
    raw.decoder = tokenizers.decoders.Metaspace()
    raw.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_folder(tmp_path)
    assert stream(loaded, [0, 1, 2, 0]) == ["one", " two", "s", " one", ""]
