"""Findings as annotations, which GitHub shows on the line of the budget without any token."""

from __future__ import annotations

from prunectl.gating.finding import Findings
from prunectl.reporting.gates.problems import Problem, Severity, problems

_IN_TEXT = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_PROPERTY = {**_IN_TEXT, ":": "%3A", ",": "%2C"}


def github(found: Findings) -> str:
    """Return a workflow command for each limit that was broken, and for what could not be judged."""
    return "".join(f"{_command(found.file, problem)}\n" for problem in problems(found))


def _command(file: str, problem: Problem) -> str:
    level = "warning" if problem.severity is Severity.WARNING else "error"
    properties = {"file": file, "line": str(problem.line), "title": problem.title}
    place = ",".join(f"{name}={_escaped(value, _IN_PROPERTY)}" for name, value in properties.items())
    return f"::{level} {place}::{_escaped(problem.text, _IN_TEXT)}"


def _escaped(text: str, letters: dict[str, str]) -> str:
    return "".join(letters.get(letter, letter) for letter in text)
