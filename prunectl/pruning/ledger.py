"""The ledger of a model folder that is pruned in parts: what was asked for, and of each shard what was done.

It lies beside the shards, in files of its own for each of them, so that parts share nothing but the folder: kilobytes
of what was done, and where all layers are ranked together up to a megabyte a pass of how the scores are distributed.
A shard is known again by its size and the time of its last change, which costs nothing however big it is; by its
digest where it has another time, as after a copy.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.analysis.sizes import sha256_of
from prunectl.errors import InputError, UsageError, WorkError, abbreviated
from prunectl.formats import atomic, budgets, scratch
from prunectl.formats.base import ModelFile
from prunectl.formats.extents import file_state
from prunectl.formats.folder import LEDGER, copy_companions
from prunectl.formats.patch import patch_files
from prunectl.formats.remote import UPLOADS
from prunectl.formats.remote_files import FsspecFolder
from prunectl.formats.safe_json import parse_object, read_object, write_object
from prunectl.plugins import source_file
from prunectl.pruning.request import OPTIONS, PruneRequest, code_specs

SCHEMA = "prunectl.parts/1"
_TASK = "task.json"
BEGUN = f"{LEDGER}/{_TASK}"
"""By what it is known that parts of an output are there."""
_PART = re.compile("([0-9]{1,6})/([0-9]{1,6})")
_MOST_PARTS = 100_000


@dataclass(frozen=True, slots=True)
class Part:
    """One of so many parts, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share_of(self, sizes: Mapping[str, int]) -> list[str]:
        """Its shards, of all by their bytes."""
        return shares(sizes, self.count)[self.number - 1]


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The shards of each part: the biggest first, each to the part that has the fewest bytes so far."""
    parts: list[list[str]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, number = heapq.heappop(loads)
        parts[number].append(name)
        heapq.heappush(loads, (load + sizes[name], number))
    return [sorted(part) for part in parts]


def parse_part(text: str) -> Part:
    """A part, written 3/8."""
    match = _PART.fullmatch(text)
    part = Part(int(match[1]), int(match[2])) if match else Part(0, 0)
    if not 1 <= part.number <= part.count <= _MOST_PARTS:
        raise UsageError(f"--part cannot be {abbreviated(text)!r}", hint="write --part 1/8, --part 2/8 … --part 8/8")
    return part


@dataclass(frozen=True, slots=True)
class Ledger:
    """An output folder with its ledger: whatever is written comes whole or not at all, the index last."""

    target: Path

    @staticmethod
    def of(target: Path) -> Ledger:
        """The ledger of an output, also of one that is uploaded."""
        place = UPLOADS.get(target)
        return Ledger(target) if place is None else BucketLedger(target, place)

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
                f"{self.target} has no parts to join, or is joined already",
                hint="write them first: prunectl prune FOLDER -o OUT … --part 1/8",
            )
        is_whole = task.get("schema") == SCHEMA and type(task.get("parts")) is int and 0 < task["parts"] <= _MOST_PARTS
        if not is_whole or not isinstance(task.get("request"), dict):
            raise self.damaged(_TASK)
        return task

    def check(self, own: Mapping[str, Any], model: ModelFile) -> None:
        """Check that the parts were asked for what is asked for now."""
        noted = self.task()
        different = [key for key, value in own.items() if noted.get(key) != value]
        if "version" not in different and "request" in different:
            self._refuse_options(own["request"], noted["request"])
        if "parts" in different:
            raise UsageError(
                f"{self.target} is made of {noted['parts']} parts, not of {own['parts']}",
                hint=f"run --part I/{noted['parts']}, or remove {self.target} and start again",
            )
        if "input" in different:
            raise InputError(
                f"{model.folder} is not what the parts of {self.target} were made from: "
                "its index, a size or the header of a shard is another",
                hint=f"remove {self.target}, and start again",
            )
        if different:
            raise WorkError(
                f"{self.target} was begun by prunectl {noted.get('version')}, or with other code of the strategy",
                hint=f"remove {self.target}, and start again",
            )

    def _refuse_options(self, own: Mapping[str, Any], noted: Mapping[str, Any]) -> None:
        """Refuse options that are not those of the parts, by the first that differs."""
        options = {name: option for option, name in OPTIONS.items()}
        for name in own:
            if name not in noted:
                raise self.damaged(_TASK)
            if own[name] != noted[name]:
                option = options.get(name, name).replace("_", "-")
                raise UsageError(
                    f"{option} is {own[name]!r}, but {noted[name]!r} in the parts of {self.target}",
                    hint=f"give all parts the same options, or remove {self.target}",
                )

    def read(self, name: str) -> dict[str, Any] | None:
        """A note; None where there is none: one that cannot be read is none that is missing."""
        try:
            return read_object(self.folder / name, "it")
        except (FileNotFoundError, NotADirectoryError):
            return None

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

    def facts(self, name: str) -> dict[str, Any]:
        """By what a shard is known again."""
        return facts(self.target / name)

    def facts_of_staged(self, path: Path) -> dict[str, Any]:
        """By what a shard will be known again that is about to take its place; nothing where only that decides it."""
        return facts(path)

    def may_have(self, name: str) -> bool:
        """Whether a shard may be there: one that is noted may have been about to take its place."""
        return (self.target / name).is_file()

    def close(self, model: ModelFile) -> None:
        """Write what lies beside the weights, the index last."""
        with atomic.atomic_replace(self.target / model.path.name, may_replace=True) as folder:
            copy_companions(model, folder)
            patch_files(model, {model.path: folder / model.path.name}, ())
            beside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
            scratch.set_modes(folder, self.target, {path: model.path.parent / path for path in beside}, model)

    def remove(self) -> None:
        """Forget what was done: the model is whole, also where this is killed halfway."""
        gone = self.target / f".prunectl-{os.urandom(8).hex()}"
        os.rename(self.folder, gone)
        shutil.rmtree(gone)


@dataclass(frozen=True, slots=True)
class BucketLedger(Ledger):
    """The same in an object store, where each object appears when it is whole, and none is renamed."""

    place: FsspecFolder

    @property
    def is_begun(self) -> bool:
        """Whether a part was there."""
        return self.read(_TASK) is not None

    def begin(self, task: Mapping[str, Any], model: ModelFile) -> None:
        """Note what is asked for; of two parts at once that ask for different things, one will see it."""
        del model
        self.write(_TASK, task)

    def read(self, name: str) -> dict[str, Any] | None:
        """A note; None where there is none."""
        file = self.place.file(f"{LEDGER}/{name}")
        try:
            size, _ = file.state()
        except InputError as error:
            if _is_missing(error):
                return None
            raise
        if size > budgets.MAX_JSON_BYTES:
            raise self.damaged(name)
        return parse_object(file.head(size), self.folder / name, "it")

    def write(self, name: str, note: Mapping[str, Any]) -> None:
        """Write a note."""
        with scratch.temporary_folder() as folder:
            write_object(folder / "note", note)
            self.place.put(folder / "note", f"{LEDGER}/{name}")

    def has(self, name: str, noted: Mapping[str, Any]) -> bool:
        """Whether a shard is there as it was noted: another state of it is another shard."""
        try:
            return self.facts(name) == {key: noted.get(key) for key in ("bytes", "modified")}
        except InputError as error:
            if _is_missing(error):
                return False
            raise

    @contextmanager
    def placing(self, name: str, model: ModelFile) -> Generator[Path]:
        """Yield where to write a shard, which is uploaded at the end."""
        del model
        with scratch.temporary_folder() as folder:
            yield folder / name
            self.place.put(folder / name, name)

    def facts(self, name: str) -> dict[str, Any]:
        """By what a shard is known again."""
        size, version = self.place.file(name).state()
        return {"bytes": size, "modified": version}

    def facts_of_staged(self, path: Path) -> dict[str, Any]:
        """Nothing: the store gives an object its version."""
        del path
        return {}

    def may_have(self, name: str) -> bool:
        """It may: what is noted was uploaded before, and to ask the store for each would take long."""
        del name
        return True

    def close(self, model: ModelFile) -> None:
        """Write what lies beside the weights, the index last."""
        with scratch.temporary_folder() as folder:
            copy_companions(model, folder)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                self.place.put(path, path.relative_to(folder).as_posix())
        self.place.put(model.path, model.path.name)

    def remove(self) -> None:
        """Forget what was done, first that there are parts."""
        self.place.remove(BEGUN)
        self.place.remove(LEDGER)


def _is_missing(error: InputError) -> bool:
    """Whether an object is not there, rather than not to be reached now."""
    return isinstance(error.__cause__, FileNotFoundError)


def code_files(request: PruneRequest) -> list[Path]:
    """The files of the strategy and of the policy of a request, where they are not built in."""
    strategy, policy, *_ = code_specs(request)
    files = source_file("strategy", strategy), source_file("policy", policy)
    return [file for file in files if file is not None]


def facts(path: Path) -> dict[str, Any]:
    """By what a file is known again."""
    nbytes, modified = file_state(path)
    return {"bytes": nbytes, "modified": modified}


def is_as_noted(path: Path, noted: Mapping[str, Any]) -> bool:
    """Whether a file is as it was."""
    known = facts(path)
    if known["bytes"] != noted.get("bytes"):
        return False
    if known["modified"] == noted.get("modified"):
        return True
    return bool(noted.get("sha256")) and sha256_of(path) == noted["sha256"]
