from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunectl.errors import UsageError
from prunectl.pruning.schedules import ChainedSchedule, Schedule, SparsitySchedule
from prunectl.training.wrap import ResumedSchedule, read_schedule
from tests.networks import tf_keras

tf_keras()
tfmot = pytest.importorskip("prunectl.training.tfmot.wrappers").load_tfmot()
schedules = importlib.import_module("prunectl.training.tfmot.schedules")
tensorflow = importlib.import_module("tensorflow")

ratios = st.integers(0, 99).map(lambda hundredths: hundredths / 100)
begins = st.integers(0, 40)


def asked(schedule: Any, steps: int) -> list[tuple[bool, float]]:
    found = [schedule(tensorflow.constant(step, tensorflow.int64)) for step in range(steps)]
    return [(bool(turn), float(wanted)) for turn, wanted in found]


def said(schedule: Schedule, steps: int) -> list[tuple[bool, Any]]:
    return [(schedule.prunes_at(step), pytest.approx(schedule.sparsity_at(step), abs=2e-6)) for step in range(steps)]


@settings(max_examples=25, deadline=None)
@given(final=ratios, begin=begins, length=st.one_of(st.none(), st.integers(0, 40)), frequency=st.integers(1, 30))
def test_a_constant_ramp_is_the_constant_sparsity_of_tfmot_at_every_step(
    final: float, begin: int, length: int | None, frequency: int
) -> None:
    end = None if length is None else begin + length
    theirs = tfmot.ConstantSparsity(final, begin, -1 if end is None else end, frequency)
    ours = SparsitySchedule("constant", final, begin, end, frequency=frequency)
    assert asked(theirs, 90) == said(ours, 90)
    assert type(schedules.to_tfmot_schedule(ours)) is type(theirs)
    assert schedules.to_tfmot_schedule(ours).get_config() == theirs.get_config()
    assert read_schedule(theirs.get_config()) == ours


@settings(max_examples=25, deadline=None)
@given(
    initial=ratios,
    final=ratios,
    begin=begins,
    length=st.integers(1, 40),
    frequency=st.integers(1, 30),
    power=st.sampled_from([1.0, 2.0, 3.0, 0.5]),
)
def test_a_polynomial_ramp_is_the_polynomial_decay_of_tfmot_at_every_step(
    initial: float, final: float, begin: int, length: int, frequency: int, power: float
) -> None:
    theirs = tfmot.PolynomialDecay(initial, final, begin, begin + length, power, frequency)
    ours = SparsitySchedule("polynomial", final, begin, begin + length, initial, frequency, (f"power={power!r}",))
    assert asked(theirs, 90) == said(ours, 90)
    assert type(schedules.to_tfmot_schedule(ours)) is type(theirs)
    assert schedules.to_tfmot_schedule(ours).get_config() == theirs.get_config()
    assert read_schedule(theirs.get_config()) == ours


@pytest.mark.parametrize(
    "schedule",
    [
        SparsitySchedule("cosine", 0.8, 3, 20, 0.1, 4),
        SparsitySchedule("step", 0.75, 0, 12, 0.0, 5, ("stairs=3",)),
        SparsitySchedule("polynomial", 0.5, 7, 7, 0.2, 1),
        ChainedSchedule(
            SparsitySchedule("constant", 0.3, 2, 4, frequency=2), 6, SparsitySchedule("linear", 0.9, 0, 9, 0.3, 3)
        ),
        ResumedSchedule(SparsitySchedule("cosine", 0.8, 3, 20, 0.1, 4), 5),
    ],
    ids=["cosine", "step", "polynomial in no time", "then", "begun"],
)
class TestSchedulesThatTfmotDoesNotHave:
    def test_turn_when_ours_do_and_reach_the_end(self, schedule: Schedule) -> None:
        found = asked(schedules.to_tfmot_schedule(schedule), 40)
        turns = [step for step in range(40) if schedule.prunes_at(step) and step <= schedule.last_update_step]
        assert [step for step, (turn, _) in enumerate(found) if turn] == sorted({*turns, schedule.last_update_step})
        for step, (turn, wanted) in enumerate(found):
            if turn:
                assert wanted == pytest.approx(schedule.sparsity_at(step), abs=1e-6)
        assert found[-1][1] == pytest.approx(schedule.final, abs=1e-6)

    def test_work_inside_a_graph(self, schedule: Schedule) -> None:
        found = schedules.to_tfmot_schedule(schedule)
        assert asked(tensorflow.function(found), 25) == asked(found, 25)

    @pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
    def test_survive_being_saved_and_loaded_with_their_layer(self, schedule: Schedule, tmp_path: Any) -> None:
        k = tf_keras()
        dense = tfmot.prune_low_magnitude(
            k.layers.Dense(3, name="d"), pruning_schedule=schedules.to_tfmot_schedule(schedule)
        )
        model = k.Sequential([k.layers.Input((2,)), dense])
        model.save(tmp_path / "wrapped.h5", include_optimizer=False)
        with tfmot.prune_scope():
            layer = k.models.load_model(tmp_path / "wrapped.h5").layers[0]
        assert layer.pruning_schedule.schedule == schedule
        assert read_schedule(layer.pruning_schedule.get_config()) == schedule


def test_a_plugin_survives_by_its_name(tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def sudden(done, initial, final, *, at=0.5):\n    return final if done >= at else initial\n")
    schedule = SparsitySchedule(f"{path}:sudden", 0.6, 0, 10, 0.1, 2, ("at=0.4",))
    kept = schedules.to_tfmot_schedule(schedule).get_config()
    assert read_schedule(kept) == schedule
    assert asked(schedules.ScheduleAdapter.from_config(kept["config"]), 11)[4] == (True, pytest.approx(0.6))


def test_all_weights_are_too_many_for_tfmot() -> None:
    with pytest.raises(UsageError, match="keeps a weight in every layer"):
        schedules.to_tfmot_schedule(SparsitySchedule("constant", 1.0))


def test_a_class_that_nobody_knows_is_no_schedule() -> None:
    assert read_schedule({"class_name": "MySchedule", "config": {}}) is None


def test_tfmot_leaves_no_trace_in_the_environment() -> None:
    assert "TF_USE_LEGACY_KERAS" not in os.environ
