"""Findings for CI services: JUnit, SARIF, GitHub, GitLab and OpenMetrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from prunectl import __version__
from prunectl.checks.rules import CheckError, Finding, Findings
from prunectl.checks.schema import BUDGET, LAYER
from prunectl.reporting.check import (
    as_html,
    as_json,
    describe,
    human,
    largest_tensors,
    markdown,
    plain,
    remedies,
    subject,
    verdict_sentence,
)

UNUSABLE = "unusable"


class Severity(StrEnum):
    """The severity of an annotation."""

    UNUSABLE = "unusable"
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Annotation:
    """A limit that failed or warns, or a model that could not be judged."""

    rule: str
    severity: Severity
    title: str
    text: str
    line: int
    fingerprint: str
    """A hash of the limit and its subject, which does not depend on the line in the file."""
    numbers: Mapping[str, str | float] = field(default_factory=dict)


def list_annotations(findings: Findings) -> Iterator[Annotation]:
    """Yield failures, then warnings, then models that could not be judged."""
    for finding in (*findings.failed, *findings.warned):
        yield Annotation(
            rule=finding.id,
            severity=Severity.ERROR if finding.is_failure else Severity.WARNING,
            title=f"{finding.id} {subject(finding)}",
            text=_full_text(findings, finding),
            line=finding.line,
            fingerprint=_fingerprint(findings.file, finding.budget, finding.id, finding.model, finding.tensor),
            numbers={"actual": finding.actual, "limit": finding.limit, "unit": str(finding.unit)},
        )
    for error in findings.errors:
        message = error.error.message
        yield Annotation(
            rule=UNUSABLE,
            severity=Severity.UNUSABLE,
            title=f"{UNUSABLE} {error.path}",
            text=f"{error.path}: {message}",
            line=error.line,
            fingerprint=_fingerprint(findings.file, error.budget, UNUSABLE, error.path, message),
        )


def _full_text(findings: Findings, finding: Finding) -> str:
    """The measured value, the largest tensors, and advice: an annotation is read without the rest of the report."""
    alone = replace(findings, findings=(finding,))
    parts = (verdict_sentence(finding), finding.note, *largest_tensors((finding,)), *remedies(alone), finding.message)
    return " ".join(filter(None, parts))


def uri(path: str) -> str:
    """A path as a relative URI reference; an absolute path as a `file:` URI."""
    return f"file://{quote(path)}" if path.startswith("/") else quote(path)


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


_IN_TEXT = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_IN_PROPERTY = _IN_TEXT | str.maketrans({":": "%3A", ",": "%2C"})


def github(findings: Findings) -> str:
    """Workflow commands of GitHub, one for each annotation."""
    return "".join(f"{_command(findings.file, annotation)}\n" for annotation in list_annotations(findings))


def _command(file: str, annotation: Annotation) -> str:
    level = "warning" if annotation.severity is Severity.WARNING else "error"
    properties = {"file": file, "line": str(annotation.line), "title": annotation.title}
    location = ",".join(f"{name}={value.translate(_IN_PROPERTY)}" for name, value in properties.items())
    return f"::{level} {location}::{annotation.text.translate(_IN_TEXT)}"


_SEVERITIES = {Severity.UNUSABLE: "critical", Severity.ERROR: "major", Severity.WARNING: "minor"}


def gitlab(findings: Findings) -> str:
    """A report for GitLab Code Quality, with an issue for each annotation."""
    return json.dumps([_issue(findings.file, annotation) for annotation in list_annotations(findings)], indent=2) + "\n"


def _issue(file: str, annotation: Annotation) -> dict[str, object]:
    return {
        "check_name": f"prunectl {annotation.rule}",
        "description": annotation.text,
        "severity": _SEVERITIES[annotation.severity],
        "fingerprint": annotation.fingerprint,
        "location": {"path": file, "lines": {"begin": annotation.line}},
    }


SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"
_LINES = {key.name: key.summary for key in (*LAYER, *BUDGET)} | {
    UNUSABLE: "Models or limits that could not be checked."
}


def sarif(findings: Findings) -> str:
    """A SARIF 2.1.0 log, with a result for each annotation."""
    annotations = list(list_annotations(findings))
    rules = sorted({annotation.rule for annotation in annotations})
    driver = {
        "name": "prunectl",
        "version": __version__,
        "rules": [{"id": rule, "shortDescription": {"text": _LINES[rule]}} for rule in rules],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": not findings.errors, "exitCode": findings.exit_code}],
        "results": [
            _result(uri(findings.file), annotation, rules.index(annotation.rule)) for annotation in annotations
        ],
        "columnKind": "unicodeCodePoints",
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _result(file: str, annotation: Annotation, rule: int) -> dict[str, Any]:
    location = {"artifactLocation": {"uri": file}, "region": {"startLine": annotation.line}}
    return {
        "ruleId": annotation.rule,
        "ruleIndex": rule,
        "kind": "fail",
        "level": "warning" if annotation.severity is Severity.WARNING else "error",
        "message": {"text": annotation.text},
        "locations": [{"physicalLocation": location}],
        "partialFingerprints": {"prunectl/v1": annotation.fingerprint},
        "properties": dict(annotation.numbers),
    }


_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}


def xml_element(tag: str, inner: str = "", **attributes: str | int) -> str:
    """An XML element with its attributes escaped; `inner` is XML already."""
    attribute_text = "".join(f' {name}="{escaped(str(value))}"' for name, value in attributes.items())
    return f"<{tag}{attribute_text}>{inner}</{tag}>" if inner else f"<{tag}{attribute_text}/>"


def escaped(text: str) -> str:
    """Text escaped for XML, with characters that are not printable replaced."""
    return "".join(_NAMED.get(letter) or (letter if letter.isprintable() else "\ufffd") for letter in text)


_SUITE = "prunectl check"


def junit(findings: Findings) -> str:
    """JUnit XML with a test case for each finding: a warning is a test that passed, with output."""
    cases = [_case(findings, item) for item in findings.findings] + [_error(item) for item in findings.errors]
    counts = {
        "tests": len(cases),
        "failures": len(findings.failed),
        "errors": len(findings.errors),
        "skipped": 0,
        "time": 0,
    }
    suite = xml_element("testsuite", "\n" + "\n".join(cases) + "\n", name=_SUITE, **counts)
    counts.pop("skipped")
    suites = xml_element("testsuites", f"\n{suite}\n", name=_SUITE, **counts)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{suites}\n'


def _case(findings: Findings, finding: Finding) -> str:
    inner = ""
    if finding.is_failure:
        text = _full_text(findings, finding)
        inner = xml_element("failure", escaped(text), message=describe(finding), type=finding.id)
    elif finding.is_warning:
        inner = xml_element("system-out", escaped(f"warning: {_full_text(findings, finding)}"))
    return xml_element("testcase", inner, classname=finding.budget, name=f"{finding.id} {subject(finding)}", time=0)


def _error(error: CheckError) -> str:
    inner = xml_element("error", escaped(error.error.hint), message=error.error.message, type=error.error.kind)
    return xml_element("testcase", inner, classname=error.budget, name=f"line {error.line} {error.path}", time=0)


_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
_FAMILIES: tuple[tuple[str, str, Callable[[Finding], float]], ...] = (
    ("prunectl_gate_ok", "1 if the model is within the limit, else 0.", lambda finding: int(finding.ok)),
    ("prunectl_gate_actual", "The measured value.", lambda finding: finding.actual),
    ("prunectl_gate_limit", "The limit.", lambda finding: finding.limit),
)


def openmetrics(findings: Findings) -> str:
    """OpenMetrics gauges for verdicts, measured values and limits, and for the exit code."""
    # OpenMetrics allows each set of labels once: of equal limits on one thing, the one that failed is written.
    ordered = sorted(findings.findings, key=lambda finding: (finding.ok, finding.is_warning))
    unique: dict[str, Finding] = {}
    for finding in ordered:
        unique.setdefault(_labels(finding), finding)
    return "".join(f"{line}\n" for line in _lines(findings, unique))


def _lines(findings: Findings, unique: dict[str, Finding]) -> Iterator[str]:
    for name, line, number in _FAMILIES:
        yield f"# TYPE {name} gauge"
        yield f"# HELP {name} {line}"
        for labels, finding in unique.items():
            yield f"{name}{{{labels}}} {number(finding)!r}"
    for name, line, value in (
        ("prunectl_check_unusable", "Models or limits that could not be checked.", len(findings.errors)),
        ("prunectl_check_exit_code", "The exit code of the command.", findings.exit_code),
    ):
        yield f"# TYPE {name} gauge"
        yield f"# HELP {name} {line}"
        yield f"{name} {value}"
    yield "# EOF"


def _labels(finding: Finding) -> str:
    labels = {
        "budget": finding.budget,
        "gate": finding.id,
        "model": finding.model,
        "tensor": finding.tensor,
        "unit": str(finding.unit),
    }
    return ",".join(f'{name}="{_safe(value)}"' for name, value in labels.items())


def _safe(text: str) -> str:
    # A file name may hold bytes that are not valid text.
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
