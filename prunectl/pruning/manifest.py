"""The manifest: a JSON record of a run, to repeat the run bit for bit, and for `verify` to check files against."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from prunectl import __version__
from prunectl.analysis.stats import ModelStats
from prunectl.errors import InputError, UsageError
from prunectl.formats.atomic import check_beside, write_text
from prunectl.formats.safe_json import read_object
from prunectl.plugins import check_untrusted
from prunectl.pruning.request import PruneRequest, code_specs, from_json

SCHEMA = "prunectl.manifest/1"
_SCHEMA = re.compile(rb'"schema"\s*:\s*"%b"' % re.escape(SCHEMA.encode()))
_END_BYTES = 512
"""Bytes at each end of a file that are searched for `schema`, one of the last keys, since keys are sorted."""


class Recorded(Protocol):
    """The result of a run that a manifest records."""

    @property
    def request(self) -> PruneRequest:
        """The options that determined the values in the output."""

    @property
    def before(self) -> ModelStats:
        """The input, hashed."""

    @property
    def after(self) -> ModelStats:
        """The output, hashed."""

    def record(self) -> Mapping[str, object]:
        """What was pruned, in the form of the manifest."""


def check_manifest(path: Path, reserved: Iterable[Path], *, is_forced: bool) -> None:
    """Refuse a path where no manifest can be written, or that is another file, before any work begins."""
    check_beside(path)
    exists = os.path.lexists(path)
    if (exists and not path.is_file()) or path.resolve() in {path_in_use.resolve() for path_in_use in reserved}:
        raise UsageError(f"{path} cannot be a manifest: it is not a file", hint="name a file: --manifest run.json")
    if exists and not is_forced and not _is_ours(path):
        raise UsageError(
            f"{path} exists and is not a prunectl manifest", hint="choose another file, or replace it with --force"
        )


def _is_ours(path: Path) -> bool:
    """Whether a file is a manifest, or empty; judged by its two ends, since it may be a huge model."""
    with path.open("rb") as file:
        head = file.read(_END_BYTES)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
        tail = file.read()
    return not head or (head.lstrip().startswith(b"{") and _SCHEMA.search(head + tail) is not None)


def write_manifest(path: Path, result: Recorded) -> None:
    """Write the manifest of a run, whose statistics include the digests of input and output."""
    document = {
        "schema": SCHEMA,
        "tool": {"name": "prunectl", "version": __version__},
        "request": asdict(result.request),
        "input": {"format": result.before.format, "sha256": result.before.sha256},
        "output": {"format": result.after.format, "sha256": result.after.sha256},
        **result.record(),
    }
    write_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n", is_forced=True)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    return read_object(path, "it")


def read_manifest(path: Path, *, is_trusted: bool = False) -> PruneRequest:
    """Read the request in a manifest; refuse one that names code, unless the user trusts it."""
    fields = _read(path).get("request")
    if not isinstance(fields, dict):
        raise InputError(f"{path} is JSON, but not a prunectl manifest: it has no request")
    request = from_json(fields)
    if not is_trusted:
        check_untrusted(code_specs(request), str(path))
    return request


@dataclass(frozen=True, slots=True)
class RecordedTensor:
    """How many weights of a tensor were pruned, and how many are zero."""

    name: str
    shape: tuple[int, ...]
    dropped: int
    zeros: int


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """The part of a manifest that `verify` needs."""

    path: Path
    input_sha256: str
    output_sha256: str
    cuts: tuple[RecordedTensor, ...]
    zeroed_nonfinite: bool
    """Whether NaN and infinity were set to zero in addition to the pruned weights."""
    removed: str = ""
    """`blocks` or `channels`, if the run removed these; zeros are then not recorded. Else empty."""


def read_record(path: Path) -> ManifestRecord:
    """Read the record of a run from its manifest."""
    document = _read(path)
    if document.get("schema") != SCHEMA:
        raise InputError(
            f"{path} is JSON, but not a prunectl manifest", hint="write one with: prunectl prune … --manifest FILE"
        )
    try:
        zeroed_nonfinite = document["request"].get("nan") == "zero"
        removed = next((part for part in ("blocks", "channels") if isinstance(document.get(part), list)), "")
        cuts = () if removed else tuple(map(_recorded_tensor, document["cuts"]))
        before, after = str(document["input"]["sha256"]), str(document["output"]["sha256"])
        return ManifestRecord(path, before, after, cuts, zeroed_nonfinite, removed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: it does not list the pruned tensors") from error


def _recorded_tensor(fields: dict[str, Any]) -> RecordedTensor:
    return RecordedTensor(
        str(fields["name"]), tuple(map(int, fields["shape"])), int(fields["dropped"]), int(fields["zeros"])
    )
