"""Findings as GitLab's report on code quality."""

from __future__ import annotations

import json

from prunectl.gating.finding import Findings
from prunectl.reporting.gates.problems import Problem, Severity, problems

_SEVERITIES = {Severity.UNUSABLE: "critical", Severity.ERROR: "major", Severity.WARNING: "minor"}


def gitlab(found: Findings) -> str:
    """Return an issue for each limit that was broken, and for what could not be judged."""
    return json.dumps([_issue(found.file, problem) for problem in problems(found)], indent=2) + "\n"


def _issue(file: str, problem: Problem) -> dict[str, object]:
    return {
        "check_name": f"prunectl {problem.rule}",
        "description": problem.text,
        "severity": _SEVERITIES[problem.severity],
        "fingerprint": problem.mark,
        "location": {"path": file, "lines": {"begin": problem.line}},
    }
