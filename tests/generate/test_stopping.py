"""Stop strings across any borders, and the text and ids of a row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_jax.errors import RequestError
from falcon_jax.generate.stopping import RowText, StopMatcher, check_stop_strings
from falcon_jax.tokenizer import Tokenizer
from tests import hf_models

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    hf_models.tiny_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def run_matcher(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.flush(), matcher.matched


def first_completion(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """The rule in plain: where a character first completes a stop string, cut before the longest such."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_one_string_is_a_tuple_of_one():
    assert check_stop_strings("\n\n") == ("\n\n",)
    assert check_stop_strings(["a", "b"]) == ("a", "b")


def test_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match=r"stop=''"):
        check_stop_strings(["a", ""])


def test_text_that_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(("\nUser",))
    assert matcher.push("Hello\nUs") == "Hello"
    assert matcher.push("ed") == "\nUsed"
    assert matcher.push("\n") == ""
    assert matcher.push("User: next") == ""
    assert matcher.matched
    assert matcher.push("more") == ""


def test_what_was_held_comes_out_at_the_end():
    matcher = StopMatcher(("abc",))
    assert matcher.push("xab") == "x"
    assert matcher.flush() == "ab"


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=6),
)
def test_cutting_into_pieces_never_changes_the_result(stops, pieces):
    stops = tuple(stops)
    assert run_matcher(stops, pieces) == first_completion(stops, "".join(pieces))


def test_ids_end_with_the_token_that_completes_the_stop_string(tokenizer):
    ids = [*tokenizer.encode("He said so. "), *tokenizer.encode("U"), *tokenizer.encode("ser then")]
    row = RowText(tokenizer, (". User",), (EOS,))
    row.push(ids)
    assert row.stopped
    assert row.text == "He said so"
    assert tokenizer.decode(row.token_ids).startswith("He said so. User")
    assert ". User" not in tokenizer.decode(row.token_ids[:-1])


def test_end_of_text_token_is_kept_in_ids_and_not_in_text(tokenizer):
    row = RowText(tokenizer, (), (EOS,))
    ids = tokenizer.encode("one two")
    row.push([*ids, EOS, *ids])
    assert row.stopped
    assert row.token_ids == [*ids, EOS]
    assert row.text == "one two"


def test_half_a_stop_string_before_the_end_of_text_is_text(tokenizer):
    row = RowText(tokenizer, ("two three",), (EOS,))
    row.push([*tokenizer.encode("one two"), EOS])
    assert row.text == "one two"


def test_row_that_runs_out_gives_up_its_held_text(tokenizer):
    row = RowText(tokenizer, ("two three",), (EOS,))
    shown = row.push(tokenizer.encode("one two"))
    assert shown == "one "
    assert row.finish() == "two"
    assert row.text == "one two"
    assert not row.stopped


def test_without_a_tokenizer_ids_are_collected():
    row = RowText(None, (), (EOS,))
    row.push([5, 6, EOS, 7])
    assert (row.token_ids, row.text, row.stopped) == ([5, 6, EOS], "", True)
