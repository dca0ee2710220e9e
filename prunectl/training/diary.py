"""What happens during training, written down as it happens: for people, for scripts, for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from prunectl.errors import writing
from prunectl.training.course import Course
from prunectl.training.events import Events
from prunectl.training.network import Logs

METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """An epoch."""

    epoch: int
    step: int
    sparsity: float
    train: dict[str, float]
    val: dict[str, float]


@dataclass(frozen=True, slots=True)
class Moment:
    """Where training is, for whoever watches."""

    step: int
    steps: int
    epoch: int
    epochs: int
    sparsity: float
    last: Entry | None
    """The last epoch that is over."""


Watcher = Callable[[Moment], None]


def _nobody(_: Moment) -> None:
    """Watch nothing."""


@dataclass(slots=True)
class Diary:
    """Tells a watcher of every step, and keeps every epoch in a folder if there is one."""

    folder: Path | None = None
    watcher: Watcher = _nobody
    layers: Callable[[], Logs] = dict
    """Numbers of each layer, for TensorBoard."""
    _course: Course | None = None
    _last: Entry | None = None
    _file: TextIO | None = field(default=None, repr=False)
    _events: Events | None = field(default=None, repr=False)

    def begin(self, course: Course, step: int) -> None:
        """Open the files; what an interrupted run wrote after its checkpoint is written again, so it goes."""
        self._course = course
        if self.folder is None:
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / METRICS
            kept = _up_to(path, step) if step else []
            path.write_text("".join(kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")
            self._events = Events(self.folder)

    def step(self, step: int, sparsity: float) -> None:
        """Note that a step is done."""
        course = self._course
        assert course is not None
        epoch = (step - 1) // course.steps_per_epoch + 1
        self.watcher(Moment(step, course.steps, epoch, course.epochs, sparsity, self._last))

    def epoch(self, entry: Entry) -> None:
        """Note that an epoch is done."""
        self._last = entry
        self.step(entry.step, entry.sparsity)
        if self._file is not None:
            self._file.write(json.dumps(_finite(asdict(entry)), sort_keys=True, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            numbers = {f"train/{name}": value for name, value in entry.train.items()}
            numbers |= {f"val/{name}": value for name, value in entry.val.items()}
            self._events.scalars(entry.step, {"sparsity": entry.sparsity, **numbers, **self.layers()})

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _up_to(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["step"] <= step]


def _finite(found: object) -> object:
    """Return a value that JSON has a word for: what is no number is null."""
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    return None if isinstance(found, float) and not math.isfinite(found) else found
