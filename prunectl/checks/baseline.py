"""Baselines: sizes of earlier models in a JSON file, or in the same file at a git ref."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.errors import InputError, UsageError
from prunectl.formats import atomic
from prunectl.formats.safe_json import parse_object

SCHEMA = "prunectl.baseline/1"
_RECORDED = 10
"""Number of largest tensors to record: enough to report what has grown, and the file stays short."""
GIT = "git:"


@dataclass(frozen=True, slots=True)
class BaselineEntry:
    """Stored sizes of a model."""

    raw: int
    gzip: int
    params: int
    prunable_zero: int
    reason: str
    """Why these sizes were accepted (--reason)."""
    tensors: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes and zeros of the largest tensors, to report which of them grew; older files have none."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Stored sizes of earlier models, by their paths relative to the folder of the budgets."""

    origin: str
    """Source of the baseline for messages: a path, or `FILE at REF`."""
    entries: dict[str, BaselineEntry]
    path: Path | None
    """File to write updates to; None if the baseline was read from git."""


def read(spec: str, path: Path) -> Baseline:
    """The baseline in a file, or in the same file at `git:REF`; empty if the file does not exist."""
    if spec.startswith(GIT):
        ref = spec.removeprefix(GIT)
        text = _at_ref(ref, path)
        return Baseline(f"{path.name} at {ref}", _entries(text, path) if text is not None else {}, None)
    return Baseline(os.path.relpath(path), _entries(path.read_bytes(), path) if path.exists() else {}, path)


def snapshot(stats: LazyModelStats, reason: str) -> BaselineEntry:
    """The entry for the current sizes of a model."""
    params = stats.zeros.params
    rows = sorted((row for row in stats.zeros.layers if not row.tied_to), key=lambda row: -row.bytes)
    tensors = {row.name: (row.bytes, row.zeros or 0) for row in rows[:_RECORDED]}
    return BaselineEntry(stats.raw, stats.gzip, params.total, params.prunable_zero or 0, reason, tensors)


def write(baseline: Baseline, updates: dict[str, BaselineEntry], *, is_forced: bool = True) -> Path:
    """Write the file with the updated entries, and all others as they were."""
    if baseline.path is None:
        raise UsageError(f"the baseline {baseline.origin} cannot be updated", hint="name a file: --baseline FILE")
    models = {name: asdict(entry) for name, entry in {**baseline.entries, **updates}.items()}
    text = json.dumps({"schema": SCHEMA, "models": models}, indent=2, sort_keys=True) + "\n"
    atomic.write_text(baseline.path, text, is_forced=is_forced)
    return Path(baseline.origin)


def _entries(text: bytes, path: Path) -> dict[str, BaselineEntry]:
    document = parse_object(text, path, "the baseline")
    models = document.get("models")
    if document.get("schema") != SCHEMA or not isinstance(models, dict):
        raise InputError(
            f"{path} is JSON, but not a prunectl baseline",
            hint="write one: prunectl check --update-baseline --reason '…'",
        )
    return {name: _entry(fields, name, path) for name, fields in models.items()}


def _entry(data: Any, name: str, path: Path) -> BaselineEntry:
    values: dict[str, Any] = (
        {field.name: data.get(field.name) for field in fields(BaselineEntry)} if isinstance(data, dict) else {}
    )
    tensors = values.pop("tensors", None) or {}
    pairs = tensors.values() if isinstance(tensors, dict) else [None]
    counts = [value for key, value in values.items() if key != "reason"]
    if not counts or not all(map(_is_count, counts)) or not all(map(_is_pair, pairs)):
        raise InputError(f"{path} is damaged: its entry for {name} has no valid numbers")
    values["reason"] = str(values["reason"] or "")
    return BaselineEntry(**values, tensors={key: (size, zeros) for key, (size, zeros) in tensors.items()})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _at_ref(ref: str, path: Path) -> bytes | None:
    """The content of a file at a git ref; None if it did not exist there."""
    folder = path.absolute().parent
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if commit.returncode:
        message = commit.stderr.decode("utf-8", "replace").strip()
        raise InputError(
            f"git does not know {ref!r} in {folder}",
            hint=message or "in CI, fetch it first: git fetch --depth 1 origin main",
        )
    shown = _git(folder, "show", f"{commit.stdout.decode().strip()}:./{path.name}")
    return None if shown.returncode else shown.stdout


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    try:
        return subprocess.run(  # noqa: S603 - fixed arguments, and a ref after --end-of-options
            ["git", *arguments],  # noqa: S607 - the git on the user's PATH
            cwd=folder, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError("git is not installed", hint="compare with a file: --baseline FILE") from error
