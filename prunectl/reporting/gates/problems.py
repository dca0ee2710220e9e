"""What needs a look, in the way that services want it: a rule, a line, a text, and a mark to know it again by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import quote

from prunectl.gating.finding import Findings
from prunectl.reporting.gates.words import sentence, subject

UNUSABLE = "unusable"


class Severity(StrEnum):
    """How bad it is."""

    UNUSABLE = "unusable"
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """A limit that was broken, or something that nothing can be said about."""

    rule: str
    severity: Severity
    title: str
    text: str
    line: int
    mark: str
    """The same for the same limit on the same thing, wherever it stands in the file."""
    numbers: Mapping[str, str | float] = field(default_factory=dict)


def problems(found: Findings) -> Iterator[Problem]:
    """Yield what said no, then what warns, then what could not be judged."""
    for one in (*found.failed, *found.warned):
        yield Problem(
            rule=one.id,
            severity=Severity.ERROR if one.is_failure else Severity.WARNING,
            title=f"{one.id} {subject(one)}",
            text=sentence(one),
            line=one.line,
            mark=_fingerprint(found.file, one.budget, one.id, one.model, one.tensor),
            numbers={"actual": one.actual, "limit": one.limit, "unit": str(one.unit)},
        )
    for none in found.unusable:
        message = none.error.message
        yield Problem(
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
