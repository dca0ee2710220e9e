"""Schedules of prunectl for tfmot: its own class where it has one, else an adapter that Keras can save and load."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from prunectl.errors import UsageError
from prunectl.formats.safe_json import require
from prunectl.pruning.schedules import Schedule, SparsitySchedule
from prunectl.training.keras.backend import load_keras2, load_tfmot
from prunectl.training.wrap import OWN_SCHEDULE_CLASS, from_config, has_tfmot_class, power_of, to_config

_MAX_STEPS = 10_000_000
_sparsity = load_tfmot()
_PACKAGE, _, _NAME = OWN_SCHEDULE_CLASS.partition(">")


_Base: Any = _sparsity.PruningSchedule


@load_keras2().keras.utils.register_keras_serializable(package=_PACKAGE, name=_NAME)
class ScheduleAdapter(_Base):  # type: ignore[misc]
    """Any schedule of prunectl as a tfmot schedule; it is saved with the name of its curve."""

    def __init__(self, schedule: Schedule) -> None:
        if schedule.last_update_step > _MAX_STEPS:
            raise UsageError(f"a schedule of {schedule.last_update_step} steps is too long for tfmot")
        self.schedule = schedule

    @cached_property
    def steps(self) -> list[int]:
        """The pruning steps, the last of which reaches the final sparsity."""
        last = self.schedule.last_update_step
        return [step for step in range(last + 1) if self.schedule.prunes_at(step) or step == last]

    def __call__(self, step: Any) -> tuple[Any, Any]:
        """Whether to prune at a step, and the sparsity of the last pruning step."""
        tensorflow = require("tensorflow", extra="tensorflow")
        steps = tensorflow.constant(self.steps, tensorflow.int64)
        initial = self.schedule.sparsity_at(0)
        sparsities = [initial, *(self.schedule.sparsity_at(pruning_step) for pruning_step in self.steps)]
        now = tensorflow.reshape(tensorflow.cast(step, tensorflow.int64), [1])
        num_passed = tensorflow.searchsorted(steps, now, side="right")[0]
        is_pruning_step = tensorflow.reduce_any(tensorflow.equal(steps, now))
        return is_pruning_step, tensorflow.gather(tensorflow.constant(sparsities, tensorflow.float32), num_passed)

    def get_config(self) -> dict[str, Any]:
        """The configuration that Keras saves."""
        return {"class_name": OWN_SCHEDULE_CLASS, "config": to_config(self.schedule)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ScheduleAdapter:
        """A schedule from a saved configuration."""
        return cls(from_config(config))


def to_tfmot_schedule(schedule: Schedule) -> Any:
    """The tfmot schedule for a schedule of prunectl."""
    if schedule.final >= 1.0:
        raise UsageError("tfmot keeps a weight in every layer and cannot reach a sparsity of 100%", hint="use 99%")
    if not has_tfmot_class(schedule):
        return ScheduleAdapter(schedule)
    assert isinstance(schedule, SparsitySchedule)
    end = -1 if schedule.end is None else schedule.end
    if schedule.curve == "constant":
        return _sparsity.ConstantSparsity(schedule.final, schedule.begin, end, schedule.frequency)
    return _sparsity.PolynomialDecay(
        schedule.initial, schedule.final, schedule.begin, end, power_of(schedule), schedule.frequency
    )
