"""What the manifest of a run says of the file that came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.json_text import read_object
from prunectl.pruning.manifest import SCHEMA


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was written of a tensor."""

    name: str
    shape: tuple[int, ...]
    dropped: int
    zeros: int


@dataclass(frozen=True, slots=True)
class Record:
    """What a run read and wrote."""

    path: Path
    input_sha256: str
    output_sha256: str
    cuts: tuple[Recorded, ...]
    has_doomed: bool
    """Whether NaN became zero beside what was dropped."""


def read(path: Path) -> Record:
    """Return what a manifest says of its run."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    whole = read_object(path, "it")
    if whole.get("schema") != SCHEMA:
        raise InputError(f"{path} is JSON, but not a manifest of prunectl", hint="prunectl prune … --manifest FILE")
    try:
        doomed = whole["request"].get("nan") == "zero"
        cuts = tuple(map(_cut, whole["cuts"]))
        return Record(path, str(whole["input"]["sha256"]), str(whole["output"]["sha256"]), cuts, doomed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: it does not say what was cut") from error


def _cut(said: dict[str, Any]) -> Recorded:
    return Recorded(str(said["name"]), tuple(map(int, said["shape"])), int(said["dropped"]), int(said["zeros"]))
