"""What a worker says of a point, in words that go from process to process."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from prunectl.errors import (
    InputError,
    MissingExtraError,
    PrunectlError,
    UntrustedError,
    UsageError,
    WorkError,
    translate,
)
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.point import Outcome, Point
from prunectl.sweeping.trial import attempt

_KINDS = {one.kind: one for one in (UsageError, InputError, UntrustedError, MissingExtraError, WorkError)}


def job_of(path: Path, choices: Choices, folder: Path) -> dict[str, Any]:
    """Return what all points have in common."""
    return {"model": str(path), "folder": str(folder), "choices": choices.as_json}


def answer(job: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """Make a point, and return what came of it."""
    choices = Choices.of_json(job["choices"])
    try:
        return {"outcome": attempt(Path(job["model"]), choices, Path(job["folder"]), Point(**point)).as_json}
    except Exception as error:  # noqa: BLE001 - the other points can do without this one
        known = error if isinstance(error, PrunectlError) else translate(error)
        if known is None:
            return {"bug": f"{type(error).__name__}: {error}", "trace": "".join(traceback.format_exception(error))}
        said = {"message": known.message, "hint": known.hint, "did_you_mean": list(known.did_you_mean)}
        return {"error": {"kind": known.kind, **said}}


def understood(point: Point, said: dict[str, Any]) -> Outcome | PrunectlError:
    """Return what a worker meant."""
    if "outcome" in said:
        return Outcome.of_json(said["outcome"])
    if "bug" in said:
        sys.stderr.write(said["trace"])
        return WorkError(f"{point.name}: {said['bug']}", hint="please report it, with the traceback above")
    error = said["error"]
    kind = _KINDS.get(error["kind"], WorkError)
    return kind(error["message"], hint=error["hint"], did_you_mean=tuple(error["did_you_mean"]))
