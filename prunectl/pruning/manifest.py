"""The record of a run, from which the run can be repeated to the same bytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunectl import __version__
from prunectl.errors import InputError, UsageError
from prunectl.formats.atomic import write_text
from prunectl.formats.safe_json import read_object
from prunectl.plugins import check_untrusted
from prunectl.pruning.policies import MIN_SIZE
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import PruneRequest, from_json

SCHEMA = "prunectl.manifest/1"
_RANDOM_DATA = re.compile(r"random:\d+(\?|$)")
_SCHEMA = re.compile(rb'"schema"\s*:\s*"%b"' % re.escape(SCHEMA.encode()))
_END_BYTES = 512
"""Keys are sorted: of a manifest, `schema` is one of the last."""


def check(path: Path, reserved: Iterable[Path], *, is_forced: bool) -> None:
    """Reject a path where no manifest can be written, or that holds something else, before any work begins."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder", hint=f"mkdir -p {path.parent}")
    exists = os.path.lexists(path)
    if (exists and not path.is_file()) or path.resolve() in {path_in_use.resolve() for path_in_use in reserved}:
        raise UsageError(f"{path} is no place for a manifest", hint="--manifest run.json")
    if exists and not is_forced and not _is_ours(path):
        raise UsageError(
            f"{path} exists, and is no manifest of prunectl", hint="write elsewhere, or replace it with --force"
        )


def write(path: Path, pruned: Pruned) -> None:
    """Write the manifest of a run that has hashed what it read and what it wrote."""
    document = {
        "schema": SCHEMA,
        "tool": {"name": "prunectl", "version": __version__},
        "request": asdict(pruned.request),
        "sparsity": pruned.sparsity,
        "input": {"format": pruned.before.format, "sha256": pruned.before.sha256},
        "output": {"format": pruned.after.format, "sha256": pruned.after.sha256},
        "cuts": [
            {
                "name": cut.tensor.name,
                "shape": list(cut.tensor.shape),
                "dropped": pruned.tallies[cut.tensor.name].dropped,
                "zeros": pruned.tallies[cut.tensor.name].zeros,
            }
            for cut in pruned.plan.cuts
        ],
    }
    write_json(path, document)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a manifest, whole or not at all."""
    write_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n", is_forced=True)


def read(path: Path, *, is_trusted: bool = False) -> PruneRequest:
    """The request in a manifest; what it names as code is not imported unless the user said so."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    fields = read_object(path, "it").get("request")
    if not isinstance(fields, dict):
        raise InputError(f"{path} is JSON, but not a manifest of prunectl: it has no request")
    request = from_json(fields)
    if not is_trusted:
        check_untrusted(_code_specs(request), str(path))
    return request


def _code_specs(request: PruneRequest) -> tuple[str, ...]:
    """Every choice that may mean `package.module:name` or `./file.py:name`."""
    policy = "" if request.policy.startswith(MIN_SIZE) else request.policy
    data = "" if _RANDOM_DATA.match(request.data) else request.data
    return request.strategy, policy, data, request.loss, request.model, request.custom_objects


def _is_ours(path: Path) -> bool:
    """Whether a file is a manifest, or empty: it begins and ends as one; models lie there too, as big as they like."""
    with path.open("rb") as file:
        head = file.read(_END_BYTES)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
        tail = file.read()
    return not head or (head.lstrip().startswith(b"{") and _SCHEMA.search(head + tail) is not None)


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
    """Whether NaN and infinity became zero in addition to what was pruned."""


def read_record(path: Path) -> ManifestRecord:
    """Read the record of a run from its manifest."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    document = read_object(path, "it")
    if document.get("schema") != SCHEMA:
        raise InputError(f"{path} is JSON, but not a manifest of prunectl", hint="prunectl prune … --manifest FILE")
    try:
        zeroed_nonfinite = document["request"].get("nan") == "zero"
        cuts = tuple(map(_recorded_tensor, document["cuts"]))
        return ManifestRecord(
            path, str(document["input"]["sha256"]), str(document["output"]["sha256"]), cuts, zeroed_nonfinite
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: it does not say what was cut") from error


def _recorded_tensor(fields: dict[str, Any]) -> RecordedTensor:
    return RecordedTensor(
        str(fields["name"]), tuple(map(int, fields["shape"])), int(fields["dropped"]), int(fields["zeros"])
    )
