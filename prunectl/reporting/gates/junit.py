"""Findings as JUnit's XML, which every CI service shows as tests."""

from __future__ import annotations

from prunectl.gating.finding import Finding, Findings, Unusable
from prunectl.reporting.gates.words import sentence, subject
from prunectl.reporting.gates.xml_text import element, escaped

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
        inner = element("failure", escaped(sentence(one)), message=sentence(one), type=one.id)
    elif one.is_warning:
        inner = element("system-out", escaped(f"warning: {sentence(one)}"))
    return element("testcase", inner, classname=one.budget, name=f"{one.id} {subject(one)}", time=0)


def _error(one: Unusable) -> str:
    inner = element("error", escaped(one.error.hint), message=one.error.message, type=one.error.kind)
    return element("testcase", inner, classname=one.budget, name=f"line {one.line} {one.path}", time=0)
