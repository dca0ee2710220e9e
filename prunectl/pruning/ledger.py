"""The ledger of a model folder that is pruned in parts: a record of the task, and of the work done on each shard.

It is a folder beside the shards, with files of its own for each shard, so that parts share nothing but the output
folder: kilobytes of results and, if all layers are ranked together, up to a megabyte of score histograms in each pass.
A shard is recognised by its size and modification time, which is cheap for any size; or by its digest if it has
another time, as after a copy.
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
"""The file in an output whose presence shows that it is pruned in parts."""
_PART = re.compile("([0-9]{1,6})/([0-9]{1,6})")
_MOST_PARTS = 100_000


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share_of(self, sizes: Mapping[str, int]) -> list[str]:
        """The shards of this part, given the bytes of all shards."""
        return shares(sizes, self.count)[self.number - 1]


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The shards of each part: shards are assigned from the largest down, each to the part with the fewest bytes."""
    parts: list[list[str]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, number = heapq.heappop(loads)
        parts[number].append(name)
        heapq.heappush(loads, (load + sizes[name], number))
    return [sorted(part) for part in parts]


def parse_part(text: str) -> Part:
    """Parse a part such as `3/8`."""
    match = _PART.fullmatch(text)
    part = Part(int(match[1]), int(match[2])) if match else Part(0, 0)
    if not 1 <= part.number <= part.count <= _MOST_PARTS:
        raise UsageError(f"--part cannot be {abbreviated(text)!r}", hint="write --part 1/8, --part 2/8 … --part 8/8")
    return part


@dataclass(frozen=True, slots=True)
class Ledger:
    """An output folder with its ledger; each file is written atomically, the index last."""

    target: Path

    @staticmethod
    def of(target: Path) -> Ledger:
        """The ledger of an output, which may be in an object store."""
        place = UPLOADS.get(target)
        return Ledger(target) if place is None else BucketLedger(target, place)

    @property
    def folder(self) -> Path:
        """The folder of the notes."""
        return self.target / LEDGER

    @property
    def is_begun(self) -> bool:
        """Whether a part was started."""
        return self.folder.is_dir()

    def begin(self, task: Mapping[str, Any], model: ModelFile) -> None:
        """Create the output folder with the record of the task, unless another part is faster."""
        try:
            with atomic.atomic_replace(self.target, may_replace=False, model=model) as folder:
                (folder / self.target.name / LEDGER).mkdir(parents=True)
                write_object(folder / self.target.name / LEDGER / _TASK, task)
        except WorkError:
            if not self.is_begun:
                raise

    def task(self) -> dict[str, Any]:
        """The record of the task."""
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
        """Check that this part has the same task as the others."""
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
        """Refuse options that differ from those of the other parts; the error names the first one."""
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
        """A note; None if there is none. A note that cannot be read is an error."""
        try:
            return read_object(self.folder / name, "it")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, note: Mapping[str, Any]) -> None:
        """Write a note."""
        atomic.write_text(self.folder / name, json.dumps(note) + "\n", is_forced=True)

    def damaged(self, name: str) -> InputError:
        """The error for a note with missing or impossible content."""
        return InputError(f"{self.folder / name} is damaged", hint=f"remove {self.target}, and start all parts again")

    def has(self, name: str, noted: Mapping[str, Any]) -> bool:
        """Whether a shard exists as recorded."""
        return (self.target / name).is_file() and is_as_noted(self.target / name, noted)

    @contextmanager
    def placing(self, name: str, model: ModelFile) -> Generator[Path]:
        """Yield the path to write a shard to, which is renamed into place at the end."""
        with atomic.atomic_replace(self.target / name, may_replace=True, model=model) as folder:
            yield folder / name

    def facts(self, name: str) -> dict[str, Any]:
        """Size and modification time (or version) of a shard, by which it is recognised."""
        return facts(self.target / name)

    def facts_of_staged(self, path: Path) -> dict[str, Any]:
        """The facts that a staged shard will have after it is renamed; empty where only the rename decides them."""
        return facts(path)

    def may_have(self, name: str) -> bool:
        """Whether a shard may exist: a run may have been killed after recording it and before renaming it."""
        return (self.target / name).is_file()

    def close(self, model: ModelFile) -> None:
        """Write the other files of the model, the index last."""
        with atomic.atomic_replace(self.target / model.path.name, may_replace=True) as folder:
            copy_companions(model, folder)
            patch_files(model, {model.path: folder / model.path.name}, ())
            companions = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
            scratch.set_modes(folder, self.target, {path: model.path.parent / path for path in companions}, model)

    def remove(self) -> None:
        """Delete the ledger; it is renamed first, so that the model is complete even if this is killed."""
        trash = self.target / f".prunectl-{os.urandom(8).hex()}"
        os.rename(self.folder, trash)
        shutil.rmtree(trash)


@dataclass(frozen=True, slots=True)
class BucketLedger(Ledger):
    """The ledger of an output in an object store, where objects appear atomically and cannot be renamed."""

    place: FsspecFolder

    @property
    def is_begun(self) -> bool:
        """Whether a part was started."""
        return self.read(_TASK) is not None

    def begin(self, task: Mapping[str, Any], model: ModelFile) -> None:
        """Write the record of the task; if two parts begin at once with different tasks, a later check finds it."""
        del model
        self.write(_TASK, task)

    def read(self, name: str) -> dict[str, Any] | None:
        """A note; None if there is none."""
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
        """Whether a shard exists as recorded, with the same size and version."""
        try:
            return self.facts(name) == {key: noted.get(key) for key in ("bytes", "modified")}
        except InputError as error:
            if _is_missing(error):
                return False
            raise

    @contextmanager
    def placing(self, name: str, model: ModelFile) -> Generator[Path]:
        """Yield the path to write a shard to, which is uploaded at the end."""
        del model
        with scratch.temporary_folder() as folder:
            yield folder / name
            self.place.put(folder / name, name)

    def facts(self, name: str) -> dict[str, Any]:
        """Size and modification time (or version) of a shard, by which it is recognised."""
        size, version = self.place.file(name).state()
        return {"bytes": size, "modified": version}

    def facts_of_staged(self, path: Path) -> dict[str, Any]:
        """Empty, since the store decides the version of an object."""
        del path
        return {}

    def may_have(self, name: str) -> bool:
        """True: recorded shards were uploaded before, and to ask the store about each would take long."""
        del name
        return True

    def close(self, model: ModelFile) -> None:
        """Write the other files of the model, the index last."""
        with scratch.temporary_folder() as folder:
            copy_companions(model, folder)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                self.place.put(path, path.relative_to(folder).as_posix())
        self.place.put(model.path, model.path.name)

    def remove(self) -> None:
        """Delete the ledger, the record of the task first."""
        self.place.remove(BEGUN)
        self.place.remove(LEDGER)


def _is_missing(error: InputError) -> bool:
    """Whether an object does not exist, rather than being unreachable now."""
    return isinstance(error.__cause__, FileNotFoundError)


def code_files(request: PruneRequest) -> list[Path]:
    """The files of the strategy and of the policy of a request, where they are not built in."""
    strategy, policy, *_ = code_specs(request)
    files = source_file("strategy", strategy), source_file("policy", policy)
    return [file for file in files if file is not None]


def facts(path: Path) -> dict[str, Any]:
    """Size and modification time (or version) of a file, by which it is recognised."""
    nbytes, modified = file_state(path)
    return {"bytes": nbytes, "modified": modified}


def is_as_noted(path: Path, noted: Mapping[str, Any]) -> bool:
    """Whether a file is the recorded one: of the same size, and of the same time or digest."""
    known = facts(path)
    if known["bytes"] != noted.get("bytes"):
        return False
    if known["modified"] == noted.get("modified"):
        return True
    return bool(noted.get("sha256")) and sha256_of(path) == noted["sha256"]
