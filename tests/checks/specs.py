"""The formats of reports, written down by hand from their public specifications."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

_TEXT = {"type": "string", "minLength": 1}
_MESSAGE = {"type": "object", "required": ["text"], "properties": {"text": _TEXT}, "additionalProperties": False}

SARIF: dict[str, Any] = {
    "type": "object",
    "required": ["version", "runs"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string", "pattern": r"^https://.*sarif-schema-2\.1\.0\.json$"},
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tool"],
                "additionalProperties": False,
                "properties": {
                    "tool": {
                        "type": "object",
                        "required": ["driver"],
                        "additionalProperties": False,
                        "properties": {
                            "driver": {
                                "type": "object",
                                "required": ["name"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": _TEXT,
                                    "version": _TEXT,
                                    "rules": {
                                        "type": "array",
                                        "uniqueItems": True,
                                        "items": {
                                            "type": "object",
                                            "required": ["id"],
                                            "additionalProperties": False,
                                            "properties": {"id": _TEXT, "shortDescription": _MESSAGE},
                                        },
                                    },
                                },
                            }
                        },
                    },
                    "invocations": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["executionSuccessful"],
                            "additionalProperties": False,
                            "properties": {
                                "executionSuccessful": {"type": "boolean"},
                                "exitCode": {"type": "integer"},
                            },
                        },
                    },
                    "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                    "results": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["message"],
                            "additionalProperties": False,
                            "properties": {
                                "ruleId": _TEXT,
                                "ruleIndex": {"type": "integer", "minimum": -1},
                                "kind": {"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
                                "level": {"enum": ["none", "note", "warning", "error"]},
                                "message": _MESSAGE,
                                "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
                                "properties": {"type": "object"},
                                "locations": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "additionalProperties": False,
                                        "properties": {
                                            "physicalLocation": {
                                                "type": "object",
                                                "additionalProperties": False,
                                                "properties": {
                                                    "artifactLocation": {
                                                        "type": "object",
                                                        "additionalProperties": False,
                                                        "properties": {
                                                            "uri": {"type": "string", "pattern": r"^[!-~]+$"}
                                                        },
                                                    },
                                                    "region": {
                                                        "type": "object",
                                                        "additionalProperties": False,
                                                        "properties": {"startLine": {"type": "integer", "minimum": 1}},
                                                    },
                                                },
                                            }
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}

GITLAB: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["description", "check_name", "fingerprint", "severity", "location"],
        "properties": {
            "description": _TEXT,
            "check_name": _TEXT,
            "fingerprint": _TEXT,
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": {
                "type": "object",
                "required": ["path", "lines"],
                "properties": {
                    "path": {"type": "string", "pattern": r"^(?!\./|/)"},
                    "lines": {
                        "type": "object",
                        "required": ["begin"],
                        "properties": {"begin": {"type": "integer", "minimum": 1}},
                    },
                },
            },
        },
    },
}

_COUNTS = {"tests", "failures", "errors"}
JUNIT: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", *_COUNTS, "disabled"}, {"testsuite"}),
    "testsuite": ({"name", *_COUNTS}, {"time", "skipped", "timestamp", "hostname", "id", "package"}, {"testcase"}),
    "testcase": ({"name", "classname"}, {"time"}, {"failure", "error", "skipped", "system-out", "system-err"}),
    "failure": (set(), {"message", "type"}, set()),
    "error": (set(), {"message", "type"}, set()),
    "system-out": (set(), set(), set()),
}
"""What an element must have, may have, and may hold."""


def junit_slips(text: str) -> list[str]:
    """Return what is not JUnit's XML in a text."""
    root = ET.fromstring(text)
    found = [] if root.tag in {"testsuites", "testsuite"} else [f"the root is {root.tag}"]
    for element in root.iter():
        musts, mays, children = JUNIT[element.tag]
        names = set(element.attrib)
        found += [f"{element.tag} without {name}" for name in musts - names]
        found += [f"{element.tag} with {name}" for name in names - musts - mays]
        found += [f"{child.tag} in {element.tag}" for child in element if child.tag not in children]
    for suite in root.iter("testsuite"):
        cases = list(suite.iter("testcase"))
        counts = {
            "tests": len(cases),
            "failures": sum(case.find("failure") is not None for case in cases),
            "errors": sum(case.find("error") is not None for case in cases),
        }
        found += [f"{name} is not {count}" for name, count in counts.items() if suite.get(name) != str(count)]
    return found


_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*"'
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_SAMPLE = re.compile(rf"({_NAME})(?:\{{((?:{_LABEL}(?:,{_LABEL})*)?)\}})? ({_NUMBER})")
_META = re.compile(rf"# (TYPE|HELP|UNIT) ({_NAME}) (.*)")


def openmetrics_samples(text: str) -> dict[tuple[str, str], float]:
    """Return the samples of an exposition, each of a family that was announced, and none twice."""
    assert text.endswith("# EOF\n")
    *lines, end = text.removesuffix("\n").split("\n")
    assert end == "# EOF"
    found: dict[tuple[str, str], float] = {}
    types: dict[str, str] = {}
    current = ""
    for line in lines:
        if meta := _META.fullmatch(line):
            if meta[2] != current:
                assert meta[2] not in types, f"{meta[2]} comes in two places"
                current = meta[2]
            if meta[1] == "TYPE":
                types[current] = meta[3]
                assert meta[3] in {"gauge", "counter", "info", "stateset", "unknown", "histogram", "summary"}
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample, line
        assert sample[1] == current, f"{sample[1]} stands among {current}"
        key = (sample[1], sample[2] or "")
        assert key not in found, f"{key} comes twice"
        found[key] = float(sample[3])
    return found
