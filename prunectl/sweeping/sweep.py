"""A sweep, from its choices to all its points; what was noted before is not made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from prunectl.errors import PrunectlError
from prunectl.formats.table import open_model
from prunectl.formats.workers import workers
from prunectl.measuring import archive
from prunectl.sweeping.answer import job_of
from prunectl.sweeping.checked import check
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.combined import ways
from prunectl.sweeping.crew import Crew, hands
from prunectl.sweeping.crew import check as check_place
from prunectl.sweeping.inputs import files_of
from prunectl.sweeping.limit import check as check_limit
from prunectl.sweeping.made import lost
from prunectl.sweeping.next import bracket, wanted
from prunectl.sweeping.notes import Notes, opened
from prunectl.sweeping.point import BASE, Outcome, Point, Way
from prunectl.sweeping.threads import share
from prunectl.training.judging.drop import MaxDrop

Watcher = Callable[[Point, Outcome | PrunectlError], None]
"""Told each point when it is made."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What came of a sweep."""

    choices: Choices
    folder: Path
    outcomes: dict[Point, Outcome]
    """The model as it is, then way after way, from low to high sparsity."""
    failed: dict[Point, PrunectlError]
    max_drop: MaxDrop | None = None
    again: tuple[str, ...] = ()
    """What was made again, and why."""

    @property
    def base(self) -> Outcome:
        """The model as it is."""
        return self.outcomes[BASE]

    @property
    def best(self) -> dict[Way, Point | None]:
        """The largest sparsity of each way that keeps within the drop; none where every one fell below it."""
        if self.max_drop is None:
            return {}
        holds = {way: bracket(way, self.outcomes, self.max_drop.amount).holds for way in ways(self.choices)}
        return {way: way.at(sparsity) if sparsity else None for way, sparsity in holds.items()}


def sweep(
    path: Path,
    choices: Choices,
    folder: Path,
    *,
    jobs: int = 1,
    place: str = "",
    max_drop: MaxDrop | None = None,
    watcher: Watcher = lambda *_: None,
) -> Swept:
    """Make every point that is not made yet, and return all that were asked for; the place is that of its workers."""
    check(choices)
    check_place(place)
    model, job = open_model(path), job_of(path, choices, folder)
    failed: dict[Point, PrunectlError] = {}
    with (
        opened(folder, choices.as_json, archive.sha256(model), share(jobs), files_of(choices)) as notes,
        closing(Crew(hands(place, job, jobs=jobs, threads=notes.threads, lock=notes.fd))) as crew,
    ):
        if BASE not in notes.done:
            _note_base(crew.attempt(BASE), notes)
        if max_drop is not None:
            check_limit(max_drop, notes.done[BASE])
        gone = lost(folder, notes.done)
        notes.forget(gone)
        more = partial(wanted, choices, notes.done, failed, max_drop.amount if max_drop is not None else None)

        def todo() -> list[Point]:
            again = [point for point in gone if point not in notes.done and point not in failed]
            return again or more()

        for point, found in _made(crew, todo, jobs):
            if isinstance(found, PrunectlError):
                failed[point] = found
            else:
                base = notes.done[BASE]
                # Training that went astray has nothing to say of what it is judged by.
                notes.add(point, found if found.metric else replace(found, metric=base.metric, is_up=base.is_up))
            watcher(point, found)
        return Swept(choices, folder, _in_order(choices, notes.done), failed, max_drop, tuple(gone.values()))


def _note_base(found: Outcome | PrunectlError, notes: Notes) -> None:
    """Note the model as it is; without it there is nothing to compare with."""
    if isinstance(found, PrunectlError):
        raise found
    notes.add(BASE, found)


def _made(crew: Crew, todo: Callable[[], list[Point]], jobs: int) -> Iterator[tuple[Point, Outcome | PrunectlError]]:
    """Yield points as they are made, until there are no more to make; each must be noted before the next is asked."""
    running: dict[Future[Outcome | PrunectlError], Point] = {}
    # Whoever gives up does not wait for hours of training.
    with workers(jobs, on_failure=crew.close) as pool:
        while True:
            for point in todo():
                if point not in running.values():
                    running[pool.submit(crew.attempt, point)] = point
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _in_order(choices: Choices, done: dict[Point, Outcome]) -> dict[Point, Outcome]:
    """Return the points as a table has them, in whatever order they were made."""
    order = {way: at for at, way in enumerate(ways(choices))}
    points = sorted((point for point in done if point != BASE), key=lambda point: (order[point.way], point.sparsity))
    return {point: done[point] for point in (BASE, *points)}
