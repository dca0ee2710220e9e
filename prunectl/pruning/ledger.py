"""The ledger of a model folder that is pruned in parts: what was asked for, and of each shard what was done.

It lies beside the shards, in a file of a few kilobytes for each of them, so that parts share nothing but the folder.
A shard is known again by its size and the time of its last change, which costs nothing however big it is; by its
digest where it has another time, as after a copy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.analysis.sizes import sha256_of
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats import atomic, scratch
from prunectl.formats.base import ModelFile
from prunectl.formats.folder import LEDGER, copy_companions
from prunectl.formats.patch import patch_files
from prunectl.formats.safe_json import read_object, write_object

SCHEMA = "prunectl.parts/1"
_TASK = "task.json"


@dataclass(frozen=True, slots=True)
class Ledger:
    """An output folder with its ledger: whatever is written comes whole or not at all, the index last."""

    target: Path

    @property
    def folder(self) -> Path:
        """Where the notes are."""
        return self.target / LEDGER

    @property
    def is_begun(self) -> bool:
        """Whether a part was there."""
        return self.folder.is_dir()

    def begin(self, task: Mapping[str, Any], model: ModelFile) -> None:
        """Make the output folder with a note of what is asked for, unless another part is faster."""
        try:
            with atomic.atomic_replace(self.target, may_replace=False, model=model) as folder:
                (folder / self.target.name / LEDGER).mkdir(parents=True)
                write_object(folder / self.target.name / LEDGER / _TASK, task)
        except WorkError:
            if not self.is_begun:
                raise

    def task(self) -> dict[str, Any]:
        """What is asked for."""
        task = self.read(_TASK)
        if task is None:
            raise UsageError(
                f"{self.target} has no parts to join",
                hint="write them first: prunectl prune FOLDER -o OUT … --part 1/8",
            )
        is_whole = task.get("schema") == SCHEMA and type(task.get("parts")) is int and task["parts"] > 0
        if not is_whole or not isinstance(task.get("request"), dict):
            raise self.damaged(_TASK)
        return task

    def read(self, name: str) -> dict[str, Any] | None:
        """A note; None where there is none."""
        place = self.folder / name
        return read_object(place, "it") if place.is_file() else None

    def write(self, name: str, note: Mapping[str, Any]) -> None:
        """Write a note."""
        atomic.write_text(self.folder / name, json.dumps(note) + "\n", is_forced=True)

    def damaged(self, name: str) -> InputError:
        """The error for a note that says nothing, or what cannot be."""
        return InputError(f"{self.folder / name} is damaged", hint=f"remove {self.target}, and start all parts again")

    def has(self, name: str, noted: Mapping[str, Any]) -> bool:
        """Whether a shard is there as it was noted."""
        return (self.target / name).is_file() and is_as_noted(self.target / name, noted)

    @contextmanager
    def placing(self, name: str, model: ModelFile) -> Generator[Path]:
        """Yield where to write a shard, which takes its place at the end."""
        with atomic.atomic_replace(self.target / name, may_replace=True, model=model) as folder:
            yield folder / name

    def facts(self, name: str) -> dict[str, int]:
        """By what a shard is known again."""
        return facts(self.target / name)

    def close(self, model: ModelFile) -> None:
        """Write what lies beside the weights, the index last."""
        with atomic.atomic_replace(self.target / model.path.name, may_replace=True) as folder:
            copy_companions(model, folder)
            patch_files(model, {model.path: folder / model.path.name}, ())
            beside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
            scratch.give(folder, self.target, {path: model.path.parent / path for path in beside}, model)

    def remove(self) -> None:
        """Forget what was done: the model is whole."""
        shutil.rmtree(self.folder)


def facts(path: Path) -> dict[str, int]:
    """By what a file is known again."""
    stat = os.stat(path)
    return {"bytes": stat.st_size, "modified": stat.st_mtime_ns}


def is_as_noted(path: Path, noted: Mapping[str, Any]) -> bool:
    """Whether a file is as it was."""
    known = facts(path)
    if known["bytes"] != noted.get("bytes"):
        return False
    return known["modified"] == noted.get("modified") or sha256_of(path) == noted.get("sha256")
