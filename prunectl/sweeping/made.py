"""Is what was made still there, as it was? A file that was exchanged or removed is no answer any more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prunectl.errors import PrunectlError, attempt, writing
from prunectl.formats.table import open_model
from prunectl.measuring import archive
from prunectl.sweeping.point import Outcome, Point


def digest(path: Path) -> str:
    """Return the hash of a model, with all its files."""
    return archive.sha256(open_model(path))


def lost(folder: Path, done: Mapping[Point, Outcome]) -> dict[Point, str]:
    """Return the points whose model is not what was noted, with what to say of each."""
    found: dict[Point, str] = {}
    for point, outcome in done.items():
        path = folder / outcome.path
        if not outcome.path:
            continue
        if not path.exists():
            found[point] = f"{path} was gone: it was made again."
        elif _differs(path, outcome):
            found[point] = f"{path} was not what had been tried: it was made again."
    return found


def place_of(folder: Path, point: Point) -> Path:
    """Return the folder of a point, which is made if it is not there."""
    place = folder / point.name
    with writing(place):
        place.mkdir(exist_ok=True)
    return place


def _differs(path: Path, outcome: Outcome) -> bool:
    now = attempt(digest, path)
    return isinstance(now, PrunectlError) or now != outcome.digest
