"""One point of a sweep, from a file to a file: pruned, trained, judged, weighed."""

from __future__ import annotations

from pathlib import Path

from prunectl.formats.scratch import temporary_folder
from prunectl.pruning.output import Output
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.made import place_of
from prunectl.sweeping.point import BASE, Outcome, Point, diverged
from prunectl.sweeping.pruned import pruned
from prunectl.sweeping.requests import is_pruned_before, pruning_of, training_of
from prunectl.sweeping.weighing import weighed
from prunectl.training.diverged import DivergedError
from prunectl.training.finetune import finetune


def attempt(path: Path, choices: Choices, folder: Path, point: Point) -> Outcome:
    """Make a point in its own folder, which only a noted point needs to keep, and return what came of it."""
    if point == BASE:
        return weighed(path, training_of(choices, BASE), "")
    output = Output(place_of(folder, point) / f"model{''.join(path.suffixes[-1:])}", is_forced=True)
    try:
        _made(path, choices, point, output)
    except DivergedError as error:
        return diverged(point, error)
    return weighed(output.target, training_of(choices, BASE), output.target.relative_to(folder).as_posix())


def _made(path: Path, choices: Choices, point: Point, output: Output) -> None:
    if not choices.epochs:
        _pruned(path, choices, point, output)
    elif is_pruned_before(point):
        with temporary_folder() as scratch:
            between = Output(scratch / path.name)
            _pruned(path, choices, point, between)
            finetune(between.target, training_of(choices, point), output)
    else:
        finetune(path, training_of(choices, point), output)


def _pruned(path: Path, choices: Choices, point: Point, output: Output) -> None:
    pruned(path, pruning_of(choices, point), output, is_trusted=choices.is_trusted)
