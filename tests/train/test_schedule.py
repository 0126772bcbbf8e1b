import dataclasses
import itertools

import pytest

from falcon_jax.errors import ConfigError
from falcon_jax.train.schedule import BatchRamp, Schedule, steps_in_budget


def test_warm_up_rises_by_equal_steps_to_the_peak() -> None:
    schedule = Schedule(peak=1.0, warmup=4)
    assert [schedule.rate(done, 100) for done in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_is_halfway_in_the_middle_and_lowest_at_the_end() -> None:
    schedule = Schedule(peak=2.0, warmup=10, min_ratio=0.1)
    assert schedule.rate(10 + 50, 110) == pytest.approx(2.0 * 0.55)
    assert schedule.rate(110, 110) == pytest.approx(0.2)
    rates = [schedule.rate(done, 110) for done in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_the_curve_is_the_same_in_tokens_as_in_steps() -> None:
    steps, tokens = Schedule(1.0, 10, 0.1), Schedule(1.0, 10 * 2048, 0.1)
    assert [steps.rate(done, 40) for done in range(1, 41)] == [
        tokens.rate(done * 2048, 40 * 2048) for done in range(1, 41)
    ]


def test_the_rate_can_fall_to_nothing_and_stays_lowest_past_the_end() -> None:
    schedule = Schedule(1.0, 0, min_ratio=0.0)
    assert schedule.rate(10, 10) == pytest.approx(0.0, abs=1e-12)
    assert schedule.rate(12, 10) == schedule.rate(10, 10)  # a last step that goes past the tokens asked for


def test_the_peak_is_held_while_the_length_is_open() -> None:
    schedule = Schedule(peak=1.0, warmup=2)
    assert [schedule.rate(done, None) for done in range(1, 5)] == [0.5, 1.0, 1.0, 1.0]


def test_warm_up_does_not_depend_on_the_length() -> None:
    schedule = Schedule(peak=1.0, warmup=5)
    assert [schedule.rate(done, None) for done in range(1, 6)] == [schedule.rate(done, 50) for done in range(1, 6)]


RAMPS = [
    BatchRamp(full_rows=64, length=8, start_rows=16, quantum=8, ramp_tokens=20_000),
    BatchRamp(full_rows=60, length=7, start_rows=6, quantum=6, ramp_tokens=12_345),
    BatchRamp(full_rows=16, length=4, start_rows=2, quantum=2, ramp_tokens=100),  # sizes of one step, or of none
    BatchRamp(full_rows=5, length=3),
    BatchRamp(full_rows=1152, length=2048, start_rows=12, quantum=12, ramp_tokens=1_000_000_000),
]
PUBLISHED = dataclasses.replace(RAMPS[-1], ramp_tokens=100_000_000_000)


@pytest.mark.parametrize("ramp", RAMPS)
def test_the_closed_forms_equal_counting_step_by_step(ramp: BatchRamp) -> None:
    num_sizes = (ramp.full_rows - ramp.start_rows) // ramp.quantum
    seen, sizes, num_steps = 0, set(), 400 if ramp.full_rows < 1000 else 3000
    for step in range(num_steps):
        expected = ramp.full_rows
        if seen * ramp.length < ramp.ramp_tokens:
            # The size whose share of the ramp's tokens is being used.
            share = seen * ramp.length * num_sizes // ramp.ramp_tokens
            expected = ramp.start_rows + share * ramp.quantum
        assert (ramp.rows(step), ramp.rows_before(step)) == (expected, seen)
        sizes.add(expected)
        seen += expected
    assert ramp.tokens_before(num_steps) == seen * ramp.length
    assert max(sizes) == ramp.full_rows and (not ramp.ramp_tokens or min(sizes) == ramp.start_rows)


@pytest.mark.parametrize("ramp", [*RAMPS, PUBLISHED])
def test_num_steps_is_the_fewest_that_have_the_tokens(ramp: BatchRamp) -> None:
    for total in (1, ramp.length, ramp.ramp_tokens // 3 + 1, ramp.ramp_tokens + 5, 3 * ramp.ramp_tokens + 77_777):
        steps = ramp.num_steps(total)
        assert ramp.tokens_before(steps - 1) < total <= ramp.tokens_before(steps)
    for steps in (1, 2, 30, 1000):
        assert ramp.num_steps(ramp.tokens_before(steps)) == steps


def test_rows_follow_a_straight_line_over_tokens() -> None:
    ramp = PUBLISHED
    for tenth in range(1, 10):
        step = ramp.num_steps(ramp.ramp_tokens * tenth // 10)
        assert abs(ramp.rows(step) - (12 + 1140 * tenth / 10)) <= ramp.quantum
    assert ramp.rows(ramp.num_steps(ramp.ramp_tokens)) == 1152


def test_rows_never_fall() -> None:
    for ramp in RAMPS[:4]:
        rows = [ramp.rows(step) for step in range(400)]
        assert all(one <= two for one, two in itertools.pairwise(rows))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ramp_tokens": -1}, "at least 0"),
        ({"start_rows": 0}, "begin with at least 1 row"),
        ({"start_rows": 64}, "fewer than the full batch"),
        ({"start_rows": 12}, "multiples of a micro-batch, which has 8 rows"),
        ({"full_rows": 60}, "multiples of a micro-batch"),
    ],
)
def test_ramps_that_cannot_be_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(RAMPS[0], **wrong)


def test_a_budget_pays_for_steps_and_pauses() -> None:
    assert steps_in_budget(100.0, 0.5, [], reserve_fraction=0.0) == 200
    assert steps_in_budget(100.0, 0.5, [(5.0, 10)], reserve_fraction=0.0) == 100
    assert steps_in_budget(100.0, 0.5, [(5.0, 10)], reserve_fraction=0.1) == 90


def test_a_budget_without_room_for_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="time budget"):
        steps_in_budget(-3.0, 0.5, [])


@pytest.mark.parametrize("wrong", [{"peak": 0.0}, {"warmup": -1}, {"min_ratio": 1.5}])
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Schedule(**{"peak": 1.0, "warmup": 1, **wrong})
