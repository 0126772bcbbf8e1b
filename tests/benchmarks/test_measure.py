"""benchmarks/measure.py: turns, failures and memory, with contestants that only say what they would do."""

import dataclasses
from typing import Any, ClassVar

import jax
import pytest
import torch

from benchmarks import measure, peers, places
from benchmarks.limits import Workload
from benchmarks.measure import Case, Contestant, Peak, Times
from tests import models

CASES = [Case("short", Workload(1, 4, 3), 2), Case("long", Workload(2, 8, 1), 2)]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(measure, "PAUSE_S", 0.0)


class FakeRunner:
    def __init__(self, contestant: "Fake"):
        self.contestant = contestant

    def note(self, what: str) -> None:
        self.contestant.log.append((self.contestant.name, what))

    def begin(self) -> None:
        self.note("begin")

    def run(self, prompts, new_tokens) -> Times:
        self.note(f"run {prompts.shape[1]}")
        if self.contestant.fails == f"run {prompts.shape[1]}":
            raise RuntimeError("out of\nmemory " + 300 * "!")
        return Times(0.5, 0.5 + 0.25 * (new_tokens - 1))

    def peak(self) -> Peak | None:
        return self.contestant.peak

    def close(self) -> None:
        self.note("close")


@dataclasses.dataclass(frozen=True)
class Fake(Contestant):
    name: str
    log: list[tuple[str, str]]
    fails: str | None = None
    peak: Peak | None = None
    config: Any = dataclasses.field(default_factory=lambda: models.tiny("falcon-7b"))
    dtype: ClassVar[str] = "float32"
    weights: ClassVar[str] = "native"

    def load(self) -> FakeRunner:
        if self.fails == "load":
            raise MemoryError("too large")
        self.log.append((self.name, "load"))
        return FakeRunner(self)


class FakeOurs(Fake):
    ours: ClassVar[bool] = True


def compete(*groups: list[Fake], place: places.Place = places.here) -> list[tuple[str, list[dict]]]:
    return list(measure.compete(groups, CASES, place, lambda line: None))


def test_contestants_of_a_group_take_turns_and_are_loaded_once():
    log: list[tuple[str, str]] = []
    found = compete([Fake("a", log), Fake("b", log)])
    assert [name for name, _ in found] == ["short", "long"]
    in_order = [("a", "load"), ("b", "load")]
    for size in (4, 8):
        in_order += [(name, what) for name in "ab" for what in ("begin", f"run {size}")]
        in_order += 2 * [("a", f"run {size}"), ("b", f"run {size}")]
    assert log == [*in_order, ("a", "close"), ("b", "close")]
    assert all(result["interleaved"] for _, results in found for result in results)


def test_groups_follow_one_another():
    log: list[tuple[str, str]] = []
    found = compete([Fake("a", log)], [Fake("b", log)])
    assert log.index(("a", "close")) < log.index(("b", "load"))
    assert [(name, result["name"], result["interleaved"]) for name, (result,) in found] == [
        ("short", "a", False),
        ("long", "a", False),
        ("short", "b", False),
        ("long", "b", False),
    ]


def test_figures_are_of_the_steps_after_the_first_token():
    (_, (short,)), (_, (long,)) = compete([Fake("a", [])])
    assert (short["first_token_ms"], short["ms_per_step"], short["decode_tokens_per_s"]) == (500, 250, 4)
    assert short["tokens_per_s"] == 3 and short["runs_s"] == [[0.5, 1.0], [0.5, 1.0]]
    assert "ms_per_step" not in long and long["tokens_per_s"] == 4  # two rows, one token each


def test_a_peer_that_fails_is_a_result_and_the_others_go_on():
    log: list[tuple[str, str]] = []
    (_, short), (_, long) = compete([Fake("a", log, fails="run 4"), Fake("b", log), Fake("c", log, fails="load")])
    assert short[0]["failed"].startswith("RuntimeError: out of memory !!!")
    assert len(short[0]["failed"]) <= measure.REASON_CHARACTERS and "\n" not in short[0]["failed"]
    assert "first_token_ms" in short[1] and "first_token_ms" in long[0] and "first_token_ms" in long[1]
    assert short[2]["failed"] == long[2]["failed"] == "MemoryError: too large"
    assert [what for name, what in log if name == "a"].count("run 4") == 1


@pytest.mark.parametrize(("fails", "error"), [("load", MemoryError), ("run 8", RuntimeError)])
def test_ours_that_fails_is_an_error(fails, error):
    with pytest.raises(error):
        compete([FakeOurs("ours", [], fails=fails)])


def test_a_peer_whose_process_dies_has_failed_in_the_rest_of_the_cases():
    def dying(function, *arguments, say):
        yield next(places.here(function, *arguments, say=say))
        raise places.ProcessDiedError("its process ended with exit code -9")

    (_, (short,)), (name, (long,)) = compete([Fake("a", [])], place=dying)
    assert "failed" not in short
    assert name == "long" and long["failed"] == "ProcessDiedError: its process ended with exit code -9"
    with pytest.raises(places.ProcessDiedError):
        compete([FakeOurs("ours", [])], place=dying)


def test_ratios_are_over_the_peer_that_is_best_in_each_figure():
    def result(name, decode, first, peak):
        found = {"first_token_ms": first, "tokens_per_s": decode, "peak_gib": peak}
        return found | {"name": name, "decode_tokens_per_s": decode}

    ours = result("falcon_jax", 60, 10, 2)
    peer, other = result("transformers", 20, 30, 8), result("transformers compiled", 30, 40, 6)
    assert measure.ratios([ours, peer, other]) == {"decode": 2, "in_all": 2, "first_token": 3, "peak": 3}
    assert measure.ratios([ours, peer, {"name": other["name"], "failed": "why"}])["decode"] == 3
    assert measure.ratios([ours, {"name": peer["name"], "failed": "why"}]) == {}
    assert measure.ratios([peer]) == {}


def test_a_peak_that_the_workload_did_not_raise_bounds_it():
    (_, (result,)), _ = compete([Fake("a", [], peak=Peak(3 * 2**30, is_upper_bound=True))])
    assert result["peak_gib"] == 3 and measure.peak_text(result) == "at most 3.00 GiB"
    (_, (result,)), _ = compete([Fake("a", [], peak=Peak(3 * 2**30))])
    assert "peak_is_upper_bound" not in result and measure.peak_text(result) == "3.00 GiB"


def test_our_peak_is_the_process_s(monkeypatch):
    runner = measure.Ours(models.tiny("falcon-7b", num_layers=1), None, "float32").load()
    peaks = iter([5, 5, 5, 9])
    monkeypatch.setattr(measure.hardware, "peak_bytes", lambda: next(peaks))
    runner.begin()
    assert runner.peak() == Peak(5, is_upper_bound=True)
    runner.begin()
    assert runner.peak() == Peak(9)


def test_torch_s_memory_is_counted_for_each_model_by_itself(monkeypatch):
    now = {"held": 0, "most": 0}

    def take(size: int) -> None:
        now["held"] += size
        now["most"] = max(now["most"], now["held"])

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: now["held"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: now.update(most=now["held"]))
    small, large = peers._Memory("cuda"), peers._Memory("cuda")
    for memory, weights, activations, kept in ((small, 10, 4, 1), (large, 100, 20, 0)):
        with memory.counted():
            take(weights)
        with memory.counted():
            take(activations)
            take(kept - activations)
    with small.counted():  # what it kept counts in its next run
        take(4)
        take(-4)
    assert (small.most_bytes, small.held_bytes) == (15, 11)
    assert (large.most_bytes, large.held_bytes) == (120, 100)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the device may be full of this process's arrays")
def test_a_contestant_is_measured_in_another_process(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as conftest.py has it in this one
    ours = measure.Ours(models.tiny("falcon-7b", num_layers=1), None, "float32")
    lines = []
    case = measure.Case("tiny", Workload(1, 4, 1), repeats=1)
    ((name, (result,)),) = measure.compete([[ours]], [case], places.in_own_process, lines.append)
    assert name == "tiny" and result["name"] == "falcon_jax" and len(result["runs_s"]) == 1
    assert lines[0] == "falcon_jax float32: loads" and lines[-1].startswith("falcon_jax float32: first token")
