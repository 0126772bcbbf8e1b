"""benchmarks/places.py: what a process of its own gives back, and how it can end.

Each process imports this file, which therefore imports neither JAX nor PyTorch.
"""

import multiprocessing
import os

import pytest

from benchmarks import places


def count(number, *, say):
    for i in range(number):
        say(f"line {i}")
        yield i, os.getpid()


def raise_after_one(error, *, say):
    yield 1
    raise error


def read_switch(*, say):
    yield os.environ.get("PLACES_SWITCH")


def switch():
    os.environ["PLACES_SWITCH"] = "on"


def die_after_one(*, say):
    yield 1
    os._exit(7)


class UnpicklableError(Exception):
    """Takes two arguments and passes on one, so that a copy cannot be made."""

    def __init__(self, first, second):
        super().__init__(first)


def raise_unpicklable(*, say):
    raise UnpicklableError("first", "second")
    yield


def test_values_and_lines_come_from_another_process():
    lines = []
    values = list(places.in_own_process(count, 2, say=lines.append))
    assert [value for value, _ in values] == [0, 1] and lines == ["line 0", "line 1"]
    (process,) = {process for _, process in values}
    assert process != os.getpid()
    assert [value for value, process in places.here(count, 2, say=lines.append) if process == os.getpid()] == [0, 1]


def test_a_process_is_prepared_before_anything_else():
    assert list(places.in_own_process(read_switch, say=print, prepare=switch)) == ["on"]
    assert list(places.in_own_process(read_switch, say=print)) == [None]


def test_an_error_comes_with_its_traceback():
    values = places.in_own_process(raise_after_one, KeyError("what was missing"), say=print)
    assert next(values) == 1
    with pytest.raises(KeyError, match="what was missing") as caught:
        next(values)
    assert "in raise_after_one" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="UnpicklableError: first"):
        list(places.in_own_process(raise_unpicklable, say=print))


def test_a_process_that_dies_is_an_error_with_its_exit_code():
    values = places.in_own_process(die_after_one, say=print)
    assert next(values) == 1
    with pytest.raises(places.ProcessDiedError, match="exit code 7"):
        next(values)


def test_nothing_runs_on_when_nobody_asks_for_more():
    values = places.in_own_process(count, 10**9, say=lambda line: None)
    next(values)
    values.close()
    assert multiprocessing.active_children() == []
