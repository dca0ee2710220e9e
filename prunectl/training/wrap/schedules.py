"""Schedules in the words in which wrappers keep them in a file: tfmot's for its own, names of curves for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.errors import UsageError
from prunectl.formats.keras.config import part, text
from prunectl.pruning.schedules import ChainedSchedule, Schedule, SparsitySchedule

OURS = "prunectl>Planned"
"""What Keras knows our own class by."""
_POWER = 3.0
_FOREVER = -1


@dataclass(frozen=True, slots=True)
class ResumedSchedule:
    """Go on with a schedule that so many steps were made under already."""

    schedule: Schedule
    since: int

    @property
    def final(self) -> float:
        """The sparsity at the end."""
        return self.schedule.final

    @property
    def last_update_step(self) -> int:
        """The last turn, counted from now."""
        return max(self.schedule.last_update_step - self.since, 0)

    def sparsity_at(self, step: int) -> float:
        """Ask what was wanted all along."""
        return self.schedule.sparsity_at(step + self.since)

    def prunes_at(self, step: int) -> bool:
        """Ask what was wanted all along."""
        return self.schedule.prunes_at(step + self.since)


def power_of(ramp: SparsitySchedule) -> float:
    """The power of a polynomial."""
    params = dict(param.split("=", 1) for param in ramp.params)
    return float(params.get("power", _POWER))


def has_tfmot_class(schedule: Schedule) -> bool:
    """Whether tfmot has a class for a schedule."""
    if not isinstance(schedule, SparsitySchedule):
        return False
    # A polynomial that begins where it ends would be divided by nothing there.
    return schedule.curve == "constant" or (schedule.curve == "polynomial" and (schedule.end or 0) > schedule.begin)


def tfmot_reaches_end(schedule: Schedule) -> bool:
    """Whether tfmot's own class for a schedule reaches its end."""
    if not has_tfmot_class(schedule) or not isinstance(schedule, SparsitySchedule):
        return False
    return schedule.curve == "constant" or (schedule.last_update_step - schedule.begin) % schedule.frequency == 0


def to_config(schedule: Schedule) -> dict[str, Any]:
    """A schedule of our own as Keras keeps it."""
    if isinstance(schedule, SparsitySchedule):
        return {
            "curve": schedule.curve,
            "final": schedule.final,
            "begin": schedule.begin,
            "end": schedule.end,
            "initial": schedule.initial,
            "frequency": schedule.frequency,
            "params": list(schedule.params),
        }
    if isinstance(schedule, ChainedSchedule):
        return {"first": to_config(schedule.first), "at": schedule.switch_step, "second": to_config(schedule.second)}
    if isinstance(schedule, ResumedSchedule):
        return {"since": schedule.since, "schedule": to_config(schedule.schedule)}
    raise UsageError(f"a {type(schedule).__name__} cannot be kept in a file: it has no name to be found by again")


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of our own that a file keeps."""
    if "first" in config:
        return ChainedSchedule(from_config(config["first"]), config["at"], from_config(config["second"]))
    if "since" in config:
        return ResumedSchedule(from_config(config["schedule"]), config["since"])
    return SparsitySchedule(**{**config, "params": tuple(config["params"])})


def read_schedule(entry: Mapping[str, Any]) -> Schedule | None:
    """The schedule in the configuration of a wrapper; None for a class that nobody here knows."""
    name, config = text(entry, "class_name"), part(entry, "config")
    try:
        if name == "ConstantSparsity":
            return SparsitySchedule(
                "constant", config["target_sparsity"], config["begin_step"], _end(config), 0.0, config["frequency"]
            )
        if name == "PolynomialDecay":
            power = f"power={float(config['power'])!r}"
            first, final = config["initial_sparsity"], config["final_sparsity"]
            return SparsitySchedule(
                "polynomial", final, config["begin_step"], _end(config), first, config["frequency"], (power,)
            )
        return from_config(config) if name == OURS else None
    except (KeyError, TypeError, ValueError):
        # Of a version that words it otherwise.
        return None


def _end(config: Mapping[str, Any]) -> int | None:
    return None if config["end_step"] == _FOREVER else int(config["end_step"])
