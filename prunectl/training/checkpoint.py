"""Checkpoints of a training run, written atomically."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunectl.errors import InputError, UsageError, writing
from prunectl.formats.base import Array
from prunectl.training.logger import LogEntry
from prunectl.training.request import OPTION_OF_FIELD

if TYPE_CHECKING:
    from prunectl.training.backend import TrainableModel
    from prunectl.training.loop import TrainState
    from prunectl.training.mask_schedule import MaskScheduler


_LAST, _NEXT, _OLD = "last", "next", "old"
_STATE, _MASKS, _BEST, _NETWORK = "run.json", "masks.npz", "best.npz", "network"


@dataclass(frozen=True, slots=True)
class CheckpointManager:
    """Keeps the last checkpoint of a run in a folder."""

    folder: Path
    choices: Mapping[str, Any] = field(default_factory=dict)
    """The options that affect the result; a run can be resumed only with the same ones."""
    is_resumed: bool = False

    def check(self) -> None:
        """Raise if saving would overwrite a checkpoint, or if a resumed run had other options."""
        checkpoint = self.latest()
        if checkpoint is not None and not self.is_resumed:
            raise UsageError(
                f"{self.folder} already holds a checkpoint",
                hint="add --resume to continue that run, or choose another folder",
            )
        if checkpoint is None:
            return
        differing = differences(_read(checkpoint / _STATE)["choices"], self.choices)
        if differing:
            raise UsageError(
                f"the run in {self.folder} had {'; '.join(differing)}",
                hint="repeat the options of that run, or start in another folder",
            )

    def save(self, network: TrainableModel, scheduler: MaskScheduler, progress: TrainState) -> None:
        """Save the state of a run; every process must call it, and only the first writes."""
        if not network.is_chief:
            network.save(None)
            return
        with writing(self.folder):
            self._write(network, scheduler, progress)

    def _write(self, network: TrainableModel, scheduler: MaskScheduler, progress: TrainState) -> None:
        scratch = self.folder / _NEXT
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / _NETWORK).mkdir(parents=True)
        save_arrays(scratch / _MASKS, scheduler.masks)
        save_arrays(scratch / _BEST, progress.best_tensors)
        state = {
            "choices": dict(self.choices),
            "step": progress.step,
            "stale": progress.epochs_since_best,
            "best": progress.best,
            "best_epoch": progress.best_epoch,
            "turned_at": scheduler.last_updated,
            "history": [asdict(entry) for entry in progress.history],
        }
        network.save(scratch / _NETWORK)
        (scratch / _STATE).write_text(json.dumps(state, sort_keys=True), encoding="utf-8")
        # An interruption between the two renames leaves only the old checkpoint, which `latest` then finds.
        last, old = self.folder / _LAST, self.folder / _OLD
        shutil.rmtree(old, ignore_errors=True)
        if last.exists():
            last.rename(old)
        scratch.rename(last)
        shutil.rmtree(old, ignore_errors=True)

    def resume(self, network: TrainableModel, scheduler: MaskScheduler, progress: TrainState) -> None:
        """Restore the state of the last checkpoint; do nothing if there is none."""
        folder = self.latest()
        if folder is None or not self.is_resumed:
            return
        state = _read(folder / _STATE)
        network.restore(folder / _NETWORK)
        scheduler.masks = {name: array.astype(np.bool_) for name, array in load_arrays(folder / _MASKS).items()}
        scheduler.last_updated = state["turned_at"]
        if scheduler.masks:
            network.mask(scheduler.masks)
        progress.step, progress.epochs_since_best = state["step"], state["stale"]
        progress.best, progress.best_epoch = state["best"], state["best_epoch"]
        progress.best_tensors = load_arrays(folder / _BEST)
        progress.history = [LogEntry(**entry) for entry in state["history"]]

    def latest(self) -> Path | None:
        """The folder of the checkpoint that a run would resume from, if there is one."""
        candidates = (self.folder / _LAST, self.folder / _OLD)
        return next((folder for folder in candidates if (folder / _STATE).is_file()), None)


_OPTIONS = {
    **{field: f"--{option.replace('_', '-')}" for field, option in OPTION_OF_FIELD.items()},
    "means.metrics": "--metric",
    "means.decides": "--metric (the first one)",
    "means.goal": "--metric (max or min)",
}
"""The command-line option of each field of a request."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """All options that differ between two runs, such as `--lr 0.0001, not 0.001`."""
    before, now = _flatten(old), _flatten(new)
    changes: dict[str, str] = {}
    # Fields missing from either side are skipped: an option that an older version lacked had its default there.
    for name in sorted(before.keys() & now.keys()):
        option = _OPTIONS.get(name, f"--{name.rpartition('.')[2].replace('_', '-')}")
        if before[name] != now[name]:
            changes.setdefault(option, f"{option} {_format_value(before[name])}, not {_format_value(now[name])}")
    return list(changes.values())


def _flatten(choices: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in choices.items():
        options |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return options


def _format_value(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(_format_value(item) for item in value) or "(none)"
    return "(none)" if value is None or value == "" else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}", hint="remove the folder to start again") from error
    return state


_INDEX = "index"


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays to an .npz file, numbered since a name may be invalid as an entry, and as bytes for bfloat16."""
    index = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    parts = {str(number): np.frombuffer(array.tobytes(), np.uint8) for number, array in enumerate(arrays.values())}
    parts[_INDEX] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **parts)


def load_arrays(path: Path) -> dict[str, Array]:
    """The arrays that `save_arrays` wrote."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {
                name: np.frombuffer(archive[str(index)].tobytes(), np.dtype(dtype)).reshape(shape)
                for index, (name, dtype, shape) in enumerate(json.loads(archive[_INDEX].tobytes()))
            }
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged: {error}", hint="remove the folder to start again") from error
