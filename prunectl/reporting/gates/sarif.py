"""Findings as SARIF 2.1.0, which code scanning shows on the line of the budget."""

from __future__ import annotations

import json
from typing import Any

from prunectl import __version__
from prunectl.gating.finding import Findings
from prunectl.gating.keys import BUDGET, LAYER
from prunectl.reporting.gates.problems import UNUSABLE, Problem, Severity, problems, uri

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"
_LINES = {key.name: key.line for key in (*LAYER, *BUDGET)} | {UNUSABLE: "What nothing can be said about."}


def sarif(found: Findings) -> str:
    """Return a log with a result for each limit that was broken, and for what could not be judged."""
    told = list(problems(found))
    rules = sorted({problem.rule for problem in told})
    driver = {
        "name": "prunectl",
        "version": __version__,
        "rules": [{"id": rule, "shortDescription": {"text": _LINES[rule]}} for rule in rules],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": not found.unusable, "exitCode": found.exit_code}],
        "results": [_result(uri(found.file), problem, rules.index(problem.rule)) for problem in told],
        "columnKind": "unicodeCodePoints",
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _result(file: str, problem: Problem, rule: int) -> dict[str, Any]:
    place = {"artifactLocation": {"uri": file}, "region": {"startLine": problem.line}}
    return {
        "ruleId": problem.rule,
        "ruleIndex": rule,
        "kind": "fail",
        "level": "warning" if problem.severity is Severity.WARNING else "error",
        "message": {"text": problem.text},
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": {"prunectl/v1": problem.mark},
        "properties": dict(problem.numbers),
    }
