"""The largest sparsity that holds a metric, closed in on from both sides; what was tried before is not tried again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError
from prunectl.pruning.output import Output
from prunectl.sweeping.limit import amount, drop
from prunectl.sweeping.limit import check as check_limit
from prunectl.sweeping.made import digest, lost, place_of
from prunectl.sweeping.next import bracket
from prunectl.sweeping.notes import opened
from prunectl.sweeping.point import BASE, Outcome, Point, Way, diverged
from prunectl.sweeping.threads import share
from prunectl.sweeping.weighing import weighed
from prunectl.training.diverged import DivergedError
from prunectl.training.judging.drop import MaxDrop
from prunectl.training.request import Request

Watcher = Callable[[Point, Outcome], None]
"""Told each sparsity when it was tried."""


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched."""

    way: Way
    limit: MaxDrop
    judging: Request
    """By which data and which metric."""
    make: Callable[[Path, float, Output], None]
    """Writes a model at a sparsity."""
    choices: dict[str, Any]
    """What decides the numbers, noted with what was tried."""
    files: Mapping[str, str]
    """The hashes of the files that these words name."""


@dataclass(frozen=True, slots=True)
class Held:
    """What came of a search."""

    limit: MaxDrop
    base: Outcome
    best: Point
    tried: dict[Point, Outcome]
    """From low to high sparsity."""
    folder: Path
    again: tuple[str, ...] = ()
    """What was made again, and why."""

    @property
    def outcome(self) -> Outcome:
        """What the largest sparsity that holds came to."""
        return self.tried[self.best]

    @property
    def path(self) -> Path:
        """The model at that sparsity, as long as the folder is there."""
        return self.folder / self.outcome.path

    def is_held(self, point: Point) -> bool:
        """Whether a sparsity is within the limit."""
        return drop(self.tried[point], self.base) <= self.limit.amount


def search(path: Path, asked: Search, folder: Path, watcher: Watcher) -> Held:
    """Return the largest sparsity that holds, to a hundredth; each that is tried is kept in a folder."""
    with opened(folder, asked.choices, digest(path), share(1), asked.files) as notes:
        if BASE not in notes.done:
            notes.add(BASE, weighed(path, asked.judging, ""))
        base = notes.done[BASE]
        check_limit(asked.limit, base)
        gone = lost(folder, notes.done)
        notes.forget(gone)
        for point in gone:
            notes.add(point, _tried(path, asked, folder, point))
            watcher(point, notes.done[point])
        while not (found := bracket(asked.way, notes.done, asked.limit.amount)).is_closed:
            point = asked.way.at(found.middle)
            notes.add(point, _tried(path, asked, folder, point))
            watcher(point, notes.done[point])
        tried = {point: notes.done[point] for point in sorted(notes.done.keys() - {BASE}, key=lambda it: it.sparsity)}
    if not found.holds:
        raise _out_of_reach(tried, base, asked.limit)
    return Held(asked.limit, base, asked.way.at(found.holds), tried, folder, tuple(gone.values()))


def _tried(path: Path, asked: Search, folder: Path, point: Point) -> Outcome:
    """Make a sparsity in its own folder, and return what came of it."""
    output = Output(place_of(folder, point) / f"model{''.join(path.suffixes[-1:])}", is_forced=True)
    try:
        asked.make(path, point.sparsity, output)
    except DivergedError as error:
        return diverged(point, error)
    return weighed(output.target, asked.judging, output.target.relative_to(folder).as_posix())


def _out_of_reach(tried: dict[Point, Outcome], base: Outcome, limit: MaxDrop) -> WorkError:
    point, outcome = next(iter(tried.items()))
    worse = f"{amount(drop(outcome, base), base)} worse" if outcome.is_number else "no number"
    return WorkError(
        f"target out of reach: at a sparsity of {point.sparsity:.0%} already, {base.metric} is {worse}, "
        f"and {limit.shown} is allowed; nothing was written",
        hint="allow more, or take another --strategy or --scope" if outcome.path else outcome.notes[0],
    )
