"""Training logs, written as training proceeds: for people, for scripts (JSON lines) and for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from prunectl.errors import writing
from prunectl.formats.protobuf import length_prefix, number
from prunectl.formats.tensorflow.leveldb import masked_crc
from prunectl.training.backend import Logs
from prunectl.training.config import TrainConfig

_WALL_TIME = 1 << 3 | 1
_SIMPLE_VALUE = 2 << 3 | 5
_STEP, _VERSION, _SUMMARY, _VALUE, _TAG = 2, 3, 5, 1, 1


class EventWriter:
    """Writes a TensorBoard event file in a folder."""

    def __init__(self, folder: Path) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.prunectl.{os.getpid()}"
        self._file = (folder / name).open("ab")
        version = b"brain.Event:2"
        self._write(length_prefix(_VERSION, len(version)) + version)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write numbers of one step."""
        values = b"".join(_field(_VALUE, _scalar(tag, value)) for tag, value in numbers.items())
        self._write(number(_STEP, step) + _field(_SUMMARY, values))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        record = struct.pack("<Bd", _WALL_TIME, time.time()) + event
        length = struct.pack("<Q", len(record))
        self._file.write(length + _crc(length) + record + _crc(record))


def _scalar(tag: str, value: float) -> bytes:
    try:
        packed = struct.pack("<Bf", _SIMPLE_VALUE, value)
    except OverflowError:  # TensorBoard's numbers are 32-bit
        packed = struct.pack("<Bf", _SIMPLE_VALUE, math.copysign(math.inf, value))
    return _field(_TAG, tag.encode()) + packed


def _field(where: int, content: bytes) -> bytes:
    return length_prefix(where, len(content)) + content


def _crc(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc(data))


METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """Metrics of an epoch."""

    epoch: int
    step: int
    sparsity: float
    train: dict[str, float]
    val: dict[str, float]


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """The progress of training, for a progress callback."""

    step: int
    steps: int
    epoch: int
    epochs: int
    sparsity: float
    last: LogEntry | None
    """The last finished epoch."""


ProgressCallback = Callable[[ProgressEvent], None]


def _ignore(_: ProgressEvent) -> None:
    """Watch nothing."""


@dataclass(slots=True)
class TrainingLogger:
    """Reports every step to a watcher, and logs every epoch in a folder if there is one."""

    folder: Path | None = None
    watcher: ProgressCallback = _ignore
    layers: Callable[[], Logs] = dict
    """Returns a number for each layer, for TensorBoard."""
    _config: TrainConfig | None = None
    _last: LogEntry | None = None
    _file: TextIO | None = field(default=None, repr=False)
    _events: EventWriter | None = field(default=None, repr=False)

    def begin(self, config: TrainConfig, step: int) -> None:
        """Open the files; entries after the checkpoint of an interrupted run are removed, as they are written again."""
        self._config = config
        if self.folder is None:
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / METRICS
            lines = _read_up_to(path, step) if step else []
            path.write_text("".join(lines), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")
            self._events = EventWriter(self.folder)

    def step(self, step: int, sparsity: float) -> None:
        """Log a finished step."""
        config = self._config
        assert config is not None
        epoch = (step - 1) // config.steps_per_epoch + 1
        self.watcher(ProgressEvent(step, config.steps, epoch, config.epochs, sparsity, self._last))

    def epoch(self, entry: LogEntry) -> None:
        """Log a finished epoch."""
        self._last = entry
        self.step(entry.step, entry.sparsity)
        if self._file is not None:
            self._file.write(json.dumps(_null_nonfinite(asdict(entry)), sort_keys=True, allow_nan=False) + "\n")
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


def _read_up_to(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["step"] <= step]


def _null_nonfinite(entry: object) -> object:
    """A value that JSON can represent: NaN and infinity become null."""
    if isinstance(entry, dict):
        return {name: _null_nonfinite(value) for name, value in entry.items()}
    return None if isinstance(entry, float) and not math.isfinite(entry) else entry
