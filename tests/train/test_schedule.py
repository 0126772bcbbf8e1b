import pytest

from falcon_jax.errors import ConfigError
from falcon_jax.train.schedule import Schedule, steps_in_budget


def test_warm_up_rises_by_equal_steps_to_the_peak() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=4)
    assert [schedule.rate(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_is_halfway_in_the_middle_and_lowest_at_the_last_step() -> None:
    schedule = Schedule(peak=2.0, warmup_steps=10, min_ratio=0.1)
    assert schedule.rate(10 + 50 - 1, 110) == pytest.approx(2.0 * 0.55)
    assert schedule.rate(109, 110) == pytest.approx(0.2)
    rates = [schedule.rate(step, 110) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)


def test_the_rate_can_fall_to_nothing() -> None:
    assert Schedule(1.0, 0, min_ratio=0.0).rate(9, 10) == pytest.approx(0.0, abs=1e-12)


def test_the_peak_is_held_while_the_number_of_steps_is_open() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=2)
    assert [schedule.rate(step, None) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_warm_up_does_not_depend_on_the_number_of_steps() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=5)
    assert [schedule.rate(step, None) for step in range(5)] == [schedule.rate(step, 50) for step in range(5)]


def test_a_budget_pays_for_steps_and_pauses() -> None:
    assert steps_in_budget(100.0, 0.5, [], reserve_fraction=0.0) == 200
    assert steps_in_budget(100.0, 0.5, [(5.0, 10)], reserve_fraction=0.0) == 100
    assert steps_in_budget(100.0, 0.5, [(5.0, 10)], reserve_fraction=0.1) == 90


def test_a_budget_without_room_for_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="time budget"):
        steps_in_budget(-3.0, 0.5, [])


@pytest.mark.parametrize("wrong", [{"peak": 0.0}, {"warmup_steps": -1}, {"min_ratio": 1.5}])
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Schedule(**{"peak": 1.0, "warmup_steps": 1, **wrong})
