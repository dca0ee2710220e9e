"""The one JSON object that scripts read."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from prunectl import __version__
from prunectl.errors import PrunectlError
from prunectl.reporting.report import Report

SCHEMA = "prunectl.report/1"


def of_report(report: Report, command: str) -> str:
    """Return the envelope of what a command found."""
    failed = [{"path": failure.path, "error": of_error(failure.error)} for failure in report.failures]
    worst = max(report.failures, key=lambda failure: failure.error.exit_code, default=None)
    return _envelope(
        command,
        report.exit_code,
        models=[*report.models, *failed],
        gates=[asdict(gate) for gate in report.gates],
        artifacts=[asdict(artifact) for artifact in report.artifacts],
        warnings=list(report.remarks),
        error=of_error(worst.error) if worst else None,
        **report.more,
    )


def of_failure(error: PrunectlError, command: str) -> str:
    """Return the envelope of a command that failed as a whole."""
    return _envelope(command, error.exit_code, models=[], gates=[], artifacts=[], warnings=[], error=of_error(error))


def of_error(error: PrunectlError) -> dict[str, Any]:
    """Return an error as scripts read it."""
    return {
        "code": error.exit_code,
        "kind": error.kind,
        "message": error.message,
        "hint": error.hint,
        "did_you_mean": list(error.did_you_mean),
    }


def _envelope(command: str, exit_code: int, **parts: Any) -> str:
    whole = {
        "schema": SCHEMA,
        "tool": {"name": "prunectl", "version": __version__},
        "command": command,
        "ok": exit_code == 0,
        "exit_code": exit_code,
        **parts,
    }
    return json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n"
