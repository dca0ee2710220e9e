"""Which of two epochs is better, by the numbers of its evaluation?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prunectl.errors import UsageError
from prunectl.training.asked import LOSS, MAX, MIN
from prunectl.training.directions import is_up
from prunectl.training.network import Means


@dataclass(frozen=True, slots=True)
class Decider:
    """The number that decides, and whether more of it is better."""

    name: str
    is_up: bool

    def is_better(self, new: float, old: float | None) -> bool:
        """Whether a number is better than the best so far; what is no number never is."""
        if new != new:  # NaN  # noqa: PLR0124
            return False
        return old is None or (new > old if self.is_up else new < old)


def judged_by(logs: Mapping[str, float], asked: str = "") -> str:
    """Return the number that decides: what was asked for, else the first metric, or the loss if there is none."""
    if asked in logs:
        return asked
    others = [name for name in logs if name != LOSS]
    if not asked:
        return next(iter(others), LOSS)
    # A framework may have its own word for what was asked.
    short = asked.rpartition(":")[2]
    found = next((name for name in others if name == short or name.endswith(f"_{short}")), None)
    return found or next((name for name in others if not name.endswith(f"_{LOSS}")), LOSS)


def is_higher_better(name: str, goal: str = "", outputs: Iterable[str] = ()) -> bool:
    """Whether a larger number is a better one: as was said, else by its name; refuse to guess."""
    found = goal == MAX if goal else is_up(name, outputs)
    if found is None:
        raise UsageError(
            f"is more of {name} better, or less? Its name does not say, and the result depends on it",
            hint=f"say {name}:{MAX} or {name}:{MIN} where the metric is named, as in --metric {name}:{MAX}",
        )
    return found


def check_direction(means: Means) -> None:
    """Refuse a function of the user's of which nobody knows whether more is better, before a file is opened."""
    name = first_of(means)
    # A bare name may be misspelled, which the framework tells.
    if ":" in name:
        is_higher_better(name, means.goal)


def decider(logs: Mapping[str, float], means: Means, outputs: Iterable[str] = ()) -> Decider:
    """Return what decides of the numbers that there are."""
    asked = first_of(means)
    name = judged_by(logs, asked)
    if name == LOSS and asked not in {"", LOSS}:
        raise UsageError(f"{asked} is not measured here, the loss alone is", hint=f"leave it out, or say {LOSS}")
    return Decider(name, is_higher_better(name, means.goal, outputs))


def first_of(means: Means) -> str:
    """Return the metric that was asked for first; empty if none was."""
    return means.decides or next(iter(means.metrics), "")
