"""What needs a look, in the way that services want it: a rule, a line, a text, and a mark to know it again by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from prunectl import __version__
from prunectl.checks.rules import CheckError, Finding, Findings
from prunectl.checks.schema import BUDGET, LAYER
from prunectl.reporting.checks.text import as_html, as_json, describe, human, markdown, plain, subject

UNUSABLE = "unusable"


class Severity(StrEnum):
    """How bad it is."""

    UNUSABLE = "unusable"
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Annotation:
    """A limit that was broken, or something that nothing can be said about."""

    rule: str
    severity: Severity
    title: str
    text: str
    line: int
    mark: str
    """The same for the same limit on the same thing, wherever it stands in the file."""
    numbers: Mapping[str, str | float] = field(default_factory=dict)


def list_annotations(found: Findings) -> Iterator[Annotation]:
    """Yield what said no, then what warns, then what could not be judged."""
    for one in (*found.failed, *found.warned):
        yield Annotation(
            rule=one.id,
            severity=Severity.ERROR if one.is_failure else Severity.WARNING,
            title=f"{one.id} {subject(one)}",
            text=describe(one),
            line=one.line,
            mark=_fingerprint(found.file, one.budget, one.id, one.model, one.tensor),
            numbers={"actual": one.actual, "limit": one.limit, "unit": str(one.unit)},
        )
    for none in found.unusable:
        message = none.error.message
        yield Annotation(
            rule=UNUSABLE,
            severity=Severity.UNUSABLE,
            title=f"{UNUSABLE} {none.path}",
            text=f"{none.path}: {message}",
            line=none.line,
            mark=_fingerprint(found.file, none.budget, UNUSABLE, none.path, message),
        )


def uri(path: str) -> str:
    """Return a path as a reference; one from the root as a URI of its own."""
    return f"file://{quote(path)}" if path.startswith("/") else quote(path)


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


_IN_TEXT = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_PROPERTY = {**_IN_TEXT, ":": "%3A", ",": "%2C"}


def github(found: Findings) -> str:
    """Return a workflow command for each limit that was broken, and for what could not be judged."""
    return "".join(f"{_command(found.file, problem)}\n" for problem in list_annotations(found))


def _command(file: str, problem: Annotation) -> str:
    level = "warning" if problem.severity is Severity.WARNING else "error"
    properties = {"file": file, "line": str(problem.line), "title": problem.title}
    place = ",".join(f"{name}={_escaped(value, _IN_PROPERTY)}" for name, value in properties.items())
    return f"::{level} {place}::{_escaped(problem.text, _IN_TEXT)}"


def _escaped(text: str, letters: dict[str, str]) -> str:
    return "".join(letters.get(letter, letter) for letter in text)


_SEVERITIES = {Severity.UNUSABLE: "critical", Severity.ERROR: "major", Severity.WARNING: "minor"}


def gitlab(found: Findings) -> str:
    """Return an issue for each limit that was broken, and for what could not be judged."""
    return json.dumps([_issue(found.file, problem) for problem in list_annotations(found)], indent=2) + "\n"


def _issue(file: str, problem: Annotation) -> dict[str, object]:
    return {
        "check_name": f"prunectl {problem.rule}",
        "description": problem.text,
        "severity": _SEVERITIES[problem.severity],
        "fingerprint": problem.mark,
        "location": {"path": file, "lines": {"begin": problem.line}},
    }


SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"
_LINES = {key.name: key.line for key in (*LAYER, *BUDGET)} | {UNUSABLE: "What nothing can be said about."}


def sarif(found: Findings) -> str:
    """Return a log with a result for each limit that was broken, and for what could not be judged."""
    told = list(list_annotations(found))
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


def _result(file: str, problem: Annotation, rule: int) -> dict[str, Any]:
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


_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}


def element(tag: str, inner: str = "", **attributes: str | int) -> str:
    """Return an element, its attributes escaped; what is inside is XML already."""
    said = "".join(f' {name}="{escaped(str(value))}"' for name, value in attributes.items())
    return f"<{tag}{said}>{inner}</{tag}>" if inner else f"<{tag}{said}/>"


def escaped(text: str) -> str:
    """Return text that can stand anywhere in XML; what is not printable is marked as such."""
    return "".join(_NAMED.get(letter) or (letter if letter.isprintable() else "\ufffd") for letter in text)


_SUITE = "prunectl check"


def junit(found: Findings) -> str:
    """Return a test case for each finding: a warning is a test that passed, with something to say."""
    cases = [_case(one) for one in found.findings] + [_error(one) for one in found.unusable]
    counts = {
        "tests": len(cases),
        "failures": len(found.failed),
        "errors": len(found.unusable),
        "skipped": 0,
        "time": 0,
    }
    suite = element("testsuite", "\n" + "\n".join(cases) + "\n", name=_SUITE, **counts)
    counts.pop("skipped")
    suites = element("testsuites", f"\n{suite}\n", name=_SUITE, **counts)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{suites}\n'


def _case(one: Finding) -> str:
    inner = ""
    if one.is_failure:
        inner = element("failure", escaped(describe(one)), message=describe(one), type=one.id)
    elif one.is_warning:
        inner = element("system-out", escaped(f"warning: {describe(one)}"))
    return element("testcase", inner, classname=one.budget, name=f"{one.id} {subject(one)}", time=0)


def _error(one: CheckError) -> str:
    inner = element("error", escaped(one.error.hint), message=one.error.message, type=one.error.kind)
    return element("testcase", inner, classname=one.budget, name=f"line {one.line} {one.path}", time=0)


_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
_FAMILIES: tuple[tuple[str, str, Callable[[Finding], float]], ...] = (
    ("prunectl_gate_ok", "1 where the limit is kept.", lambda one: int(one.ok)),
    ("prunectl_gate_actual", "What was found.", lambda one: one.actual),
    ("prunectl_gate_limit", "The limit.", lambda one: one.limit),
)


def openmetrics(found: Findings) -> str:
    """Return a gauge for the verdicts, what was found, and the limits; and the exit code."""
    # A set of labels may come once: of several limits alike on one thing, the one that says no is told.
    ordered = sorted(found.findings, key=lambda one: (one.ok, one.is_warning))
    unique: dict[str, Finding] = {}
    for one in ordered:
        unique.setdefault(_labels(one), one)
    return "".join(f"{line}\n" for line in _lines(found, unique))


def _lines(found: Findings, unique: dict[str, Finding]) -> Iterator[str]:
    for name, line, number in _FAMILIES:
        yield f"# TYPE {name} gauge"
        yield f"# HELP {name} {line}"
        for labels, one in unique.items():
            yield f"{name}{{{labels}}} {number(one)!r}"
    for name, line, value in (
        ("prunectl_check_unusable", "What nothing could be said about.", len(found.unusable)),
        ("prunectl_check_exit_code", "As the command ended.", found.exit_code),
    ):
        yield f"# TYPE {name} gauge"
        yield f"# HELP {name} {line}"
        yield f"{name} {value}"
    yield "# EOF"


def _labels(one: Finding) -> str:
    said = {"budget": one.budget, "gate": one.id, "model": one.model, "tensor": one.tensor, "unit": str(one.unit)}
    return ",".join(f'{name}="{_safe(value)}"' for name, value in said.items())


def _safe(text: str) -> str:
    # A name of a file may hold bytes that are no text.
    return text.encode("utf-8", "replace").decode().translate(_ESCAPES)


REPORT_FORMATS: dict[str, Callable[[Findings], str]] = {
    "human": human,
    "plain": plain,
    "json": as_json,
    "markdown": markdown,
    "junit": junit,
    "sarif": sarif,
    "github": github,
    "gitlab": gitlab,
    "openmetrics": openmetrics,
    "html": as_html,
}
