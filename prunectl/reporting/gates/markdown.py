"""Findings as a comment on a pull request."""

from __future__ import annotations

from collections.abc import Iterable

from prunectl.gating.finding import Finding, Findings
from prunectl.reporting.gates.words import pair, subject, summary
from prunectl.units import printable

MARKER = "<!-- prunectl check -->"
"""By which a bot finds its own comment, to write it again."""
_SIGNS = {"pass": "✅ pass", "warn": "⚠️ warn", "FAIL": "❌ fail"}
_SPECIAL = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_{}[]<>|#~"})


def markdown(found: Findings) -> str:
    """Return a heading, what needs a look, and the rest folded away."""
    broken = (*found.failed, *found.warned)
    passed = tuple(one for one in found.findings if one.ok)
    sign = "❌" if found.exit_code else "⚠️" if found.warned else "✅"
    parts = [f"{MARKER}\n## {sign} Model budgets: {escaped(summary(found))}\n"]
    if broken:
        parts.append(_table(broken))
        parts += [f"- **{one.id}** {escaped(subject(one))}: {escaped(said)}\n" for one, said in _said(broken)]
    if found.unusable:
        parts.append("### Could not be judged\n")
        parts.append("".join(f"- {escaped(one.path)}: {escaped(one.error.message)}\n" for one in found.unusable))
    if passed:
        parts.append(f"<details><summary>{len(passed)} passed</summary>\n\n{_table(passed)}\n</details>\n")
    parts += [f"{escaped(note)}\n" for note in found.notes]
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Return text that Markdown and HTML leave as it is."""
    return printable(text).translate(_SPECIAL).replace("&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;")


def _table(findings: Iterable[Finding]) -> str:
    lines = ["|  | gate | model | found | limit |", "| --- | --- | --- | ---: | ---: |"]
    for one in findings:
        cells = (_SIGNS[one.verdict], one.id, escaped(subject(one)), *pair(one))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _said(findings: Iterable[Finding]) -> Iterable[tuple[Finding, str]]:
    return ((one, said) for one in findings if (said := " ".join(filter(None, (one.note, one.message)))))
