"""Schedules: frozen values that say how sparse a model should be, and when its masks are made anew."""

from __future__ import annotations

import doctest
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunectl.errors import UsageError, WorkError
from prunectl.pruning import schedules
from prunectl.pruning.schedules import CURVES, ChainedSchedule, SparsitySchedule
from prunectl.training.config import TrainConfig
from prunectl.training.mask_schedule import make_schedule
from prunectl.training.request import ScheduleOptions, parse_time_point

ratios = st.floats(0.0, 0.99)
RISING = sorted(CURVES.keys() - {"constant"})


def test_the_numbers_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(schedules).failed == 0


@given(st.sampled_from(sorted(CURVES)), ratios, ratios, st.integers(0, 300), st.integers(1, 500))
def test_every_schedule_ends_where_it_says(name: str, low: float, high: float, begin: int, length: int) -> None:
    ramp = SparsitySchedule(name, max(low, high), begin, begin + length, min(low, high))
    assert ramp.sparsity_at(begin + length) == pytest.approx(max(low, high), abs=1e-12)
    assert ramp.sparsity_at(10**6) == ramp.sparsity_at(begin + length)


@given(st.sampled_from(RISING), ratios, ratios, st.integers(1, 200))
def test_no_schedule_goes_down_on_its_way_up(name: str, low: float, high: float, length: int) -> None:
    ramp = SparsitySchedule(name, max(low, high), 0, length, min(low, high))
    found = [ramp.sparsity_at(step) for step in range(length + 1)]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(found))


@pytest.mark.parametrize("name", sorted(set(RISING) - {"step"}))
def test_a_ramp_begins_at_its_initial_sparsity(name: str) -> None:
    assert SparsitySchedule(name, 0.9, 10, 20, 0.3).sparsity_at(10) == pytest.approx(0.3)


def test_turns_are_counted_from_the_beginning() -> None:
    ramp = SparsitySchedule("linear", 0.5, 7, 30, frequency=10)
    assert [step for step in range(60) if ramp.prunes_at(step)] == [7, 17, 27]


def test_then_follows_one_schedule_and_then_another_from_its_own_zero() -> None:
    both = ChainedSchedule(
        SparsitySchedule("constant", 0.3), 100, SparsitySchedule("linear", 0.8, 0, 50, 0.3, frequency=25)
    )
    assert [both.sparsity_at(step) for step in (0, 99, 100, 125, 150, 999)] == [0.3, 0.3, 0.3, 0.55, 0.8, 0.8]
    assert [step for step in range(140, 200) if both.prunes_at(step)] == [150]
    assert (both.final, both.last_update_step) == (0.8, 150)


def test_a_curve_of_somebody_else_survives_being_saved(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def root(done, initial, final, *, degree: float = 2.0):\n    return final * done ** (1 / degree)\n")
    ramp = SparsitySchedule(f"{own}:root", 0.8, 0, 100, params=("degree=4",))
    again = pickle.loads(pickle.dumps(ramp))
    assert again == ramp
    assert again.sparsity_at(50) == pytest.approx(0.8 * 0.5**0.25)


def test_a_curve_that_leaves_its_range_is_told(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def wild(done, initial, final):\n    return 2 * done\n")
    with pytest.raises(WorkError, match="returned a sparsity of 2"):
        SparsitySchedule(f"{own}:wild", 0.8, 0, 100).sparsity_at(100)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"final": 80.0}, "must be from 0 to 1"),
        ({"final": 0.8, "begin": 9, "end": 3}, "cannot run from step 9 to step 3"),
        ({"final": 0.8, "end": 9, "frequency": 0}, "at least 1"),
        ({"final": 0.8}, "needs an end"),
        ({"final": 0.8, "end": 9, "params": ("pwer=2",)}, "no parameter pwer"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(words: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SparsitySchedule("polynomial", **words)  # type: ignore[arg-type]


def test_a_slip_in_the_name_of_a_schedule_is_answered() -> None:
    with pytest.raises(UsageError) as caught:
        SparsitySchedule("polynomal", 0.5, 0, 10)
    assert caught.value.did_you_mean[0] == "polynomial"


@pytest.mark.parametrize(
    ("text", "step"), [("2000", 2000), ("20%", 200), ("29 %", 290), ("3ep", 300), ("0.5ep", 50), ("1 epoch", 100)]
)
def test_points_in_time_are_steps_shares_and_epochs(text: str, step: int) -> None:
    assert parse_time_point(text).step(1000, 100) == step


@pytest.mark.parametrize("text", ["", "-5", "1.5", "120%", "soon", "3 years", "1e3"])
def test_what_is_no_point_in_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_time_point(text)


def test_a_schedule_that_would_end_after_training_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match="end at step 500, but training has only 100 steps"):
        make_schedule(ScheduleOptions("polynomial", end="500"), 0.8, TrainConfig(100, 50, 32))


def test_a_short_training_has_turns_enough() -> None:
    schedule = make_schedule(ScheduleOptions("polynomial"), 0.8, TrainConfig(40, 10, 32))
    assert sum(schedule.prunes_at(step) for step in range(40)) >= 20
