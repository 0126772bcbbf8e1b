from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import falcon_jax
from falcon_jax.errors import ConfigError
from falcon_jax.train.vocabulary import END_OF_TEXT, train_tokenizer

BUNDLED = Path(falcon_jax.__file__).parent / "assets" / "falcon-nano"


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


@settings(max_examples=200)
@given(text=st.text())
def test_any_text_comes_back_exactly(text: str, bundled: Tokenizer) -> None:
    assert bundled.decode(bundled.encode(text).ids, skip_special_tokens=False) == text


def test_the_bundled_vocabulary_has_8192_entries_and_starts_with_end_of_text(bundled: Tokenizer) -> None:
    assert bundled.get_vocab_size() == 8192
    assert bundled.token_to_id(END_OF_TEXT) == 0
    assert bundled.encode(f"a{END_OF_TEXT}").ids[-1] == 0


def test_words_keep_their_apostrophe_and_digits_stand_alone(bundled: Tokenizer) -> None:
    assert bundled.encode(" don't").tokens == ["Ġdon't"]
    assert len(bundled.encode("1984").ids) == 4


def test_transformers_loads_the_folder_and_agrees(bundled: Tokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(BUNDLED)
    assert (loaded.eos_token_id, loaded.bos_token_id) == (0, 0)
    for text in ("It was a dark night.\n\n“Who’s there?”", " two  spaces , n't", "\tx\r\n naïve 日本\u0301"):
        ids = loaded(text)["input_ids"]
        assert ids == bundled.encode(text).ids
        assert loaded.decode(ids) == text


def test_a_vocabulary_has_exactly_the_size_asked_for(tokenizer_folder: Path) -> None:
    assert Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).get_vocab_size() == 290


def test_a_size_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 256"):
        train_tokenizer(["some text"], 256)
    with pytest.raises(ConfigError, match="only"):
        train_tokenizer(["some text"], 5000)
