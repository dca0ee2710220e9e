"""What `check` says, drawn from its findings."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from prunectl.checks.rules import Finding, Findings
from prunectl.checks.schema import MetricUnit
from prunectl.reporting.report import Cell, Column, Failure, Report, Section, Table, report_json, tab_separated
from prunectl.units import Units, count, nbytes, percent, printable


def number(value: float, unit: MetricUnit, units: Units = Units.SI) -> str:
    """Format a measured value, or its limit, in its unit."""
    if unit is MetricUnit.RATIO:
        return f"-{percent(-value)}" if value < 0 else percent(value)
    if unit is MetricUnit.BYTES:
        return f"-{nbytes(-int(value), units)}" if value < 0 else nbytes(int(value), units)
    if unit is MetricUnit.POINTS:
        return f"{100 * value:.3g} pp"
    if unit is MetricUnit.NUMBER:
        return f"{value:.4g}"
    return count(int(value))


def subject(finding: Finding) -> str:
    """What the limit is about."""
    return f"{finding.model}: {finding.tensor}" if finding.tensor else finding.model


def actual_and_limit(finding: Finding, units: Units = Units.SI) -> tuple[str, str]:
    """Format a measured value and its limit, with more digits where rounding makes them equal."""
    actual, limit = number(finding.actual, finding.unit, units), number(finding.limit, finding.unit, units)
    if actual == limit and finding.actual != finding.limit:
        if finding.unit is MetricUnit.BYTES:
            return f"{count(int(finding.actual))} B", f"{count(int(finding.limit))} B"
        if finding.unit is MetricUnit.POINTS:
            return f"{100 * finding.actual:.7g} pp", f"{100 * finding.limit:.7g} pp"
        if finding.unit is MetricUnit.NUMBER:
            return f"{finding.actual:.9g}", f"{finding.limit:.9g}"
        return f"{finding.actual:.6%}", f"{finding.limit:.6%}"
    return actual, limit


def describe(finding: Finding, units: Units = Units.SI) -> str:
    """A sentence on a finding: its limit, the measured value, and its notes."""
    actual, limit = actual_and_limit(finding, units)
    text = f"{finding.id}: {subject(finding)} has {actual}, the limit is {limit}."
    return " ".join(filter(None, (text, finding.note, finding.message)))


def summary(findings: Findings) -> str:
    """The counts of a check, in a line."""
    passed = len(findings.findings) - len(findings.failed) - len(findings.warned)
    parts = [
        f"{count(len(findings.failed))} failed",
        f"{count(len(findings.warned))} warned",
        f"{count(passed)} passed",
        *([f"{count(len(findings.errors))} could not be checked"] if findings.errors else []),
    ]
    return f"{', '.join(parts)}; {count(findings.models)} {'model' if findings.models == 1 else 'models'} measured"


_PLAIN = (
    Column("verdict"),
    Column("gate"),
    Column("model"),
    Column("tensor"),
    Column("actual"),
    Column("limit"),
    Column("unit"),
    Column("budget"),
)
_HUMAN = (Column("verdict"), Column("gate"), Column("model"), Column("actual"), Column("limit"), Column("budget"))


def rows(findings: tuple[Finding, ...]) -> Table:
    """The findings as programs read them."""
    return Table("gates", _PLAIN, tuple(_row(finding) for finding in findings))


def table(findings: tuple[Finding, ...]) -> Table:
    """The findings as people read them."""
    lines = tuple(
        (finding.verdict, finding.id, subject(finding), *actual_and_limit(finding), finding.budget)
        for finding in findings
    )
    return Table("gates", _HUMAN, lines)


def check_report(findings: Findings, *, has_gates: bool) -> Report:
    """The report on a check; the gates themselves are for scripts, as people see them in the table."""
    # Scripts have what failed among the gates.
    broken = (*(() if has_gates else findings.failed), *findings.warned)
    lines = tuple(f"{finding.verdict}: {describe(finding)}" for finding in broken)
    # A terminal shows the first rows: what needs a look stands there.
    ordered = (*findings.failed, *findings.warned, *(finding for finding in findings.findings if finding.ok))
    section = Section(
        f"{findings.file}: {summary(findings)}",
        tables=(table(ordered),) if ordered else (),
    )
    return Report(
        notes=(*lines, *findings.notes),
        models=(),
        table=rows(findings.findings),
        sections=(section,),
        gates=findings.findings if has_gates else (),
        failures=tuple(Failure(finding.path, finding.error) for finding in findings.errors),
        quiet_lines=tuple(describe(finding) for finding in findings.failed),
        exit_code_override=findings.exit_code,
        extra_json={"budgets": {"file": findings.file, "models": findings.models, "notes": list(findings.notes)}},
    )


def _row(finding: Finding) -> tuple[Cell, ...]:
    return (
        finding.verdict,
        finding.id,
        finding.model,
        finding.tensor,
        finding.actual,
        finding.limit,
        str(finding.unit),
        finding.budget,
    )


def human(findings: Findings) -> str:
    """A line for each finding and each error, and a summary."""
    lines = [f"{item.verdict:<5}  {describe(item)}" for item in findings.findings]
    lines += [f"error  {item.error.message}" for item in findings.errors]
    lines += [f"note   {note}" for note in findings.notes]
    return "".join(printable(line) + "\n" for line in (*lines, f"{findings.file}: {summary(findings)}"))


def plain(findings: Findings) -> str:
    """Tab-separated rows with raw numbers: verdict, gate, model, tensor, actual, limit, unit, budget."""
    return tab_separated(rows(findings.findings))


_COMMAND = "check"


def as_json(findings: Findings) -> str:
    """The findings as the JSON of `check --json`."""
    return report_json(check_report(findings, has_gates=True), _COMMAND)


def as_html(findings: Findings) -> str:
    """The findings as an HTML page."""
    # Most reports are for scripts, and do without what draws pages.
    text: str = importlib.import_module("prunectl.reporting.html.page").page(
        check_report(findings, has_gates=False), "check", Units.SI
    )
    return text


MARKER = "<!-- prunectl check -->"
"""By which a bot finds its own comment, to write it again."""
_SIGNS = {"pass": "✅ pass", "warn": "⚠️ warn", "FAIL": "❌ fail"}
_SPECIAL = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_{}[]<>|#~"})


def markdown(findings: Findings) -> str:
    """A heading, what needs a look, and the rest folded away."""
    broken = (*findings.failed, *findings.warned)
    passed = tuple(item for item in findings.findings if item.ok)
    sign = "❌" if findings.exit_code else "⚠️" if findings.warned else "✅"
    parts = [f"{MARKER}\n## {sign} Model budgets: {escaped(summary(findings))}\n"]
    if broken:
        parts.append(_table(broken))
        parts += [
            f"- **{item.id}** {escaped(subject(item))}: {escaped(comment)}\n" for item, comment in _comments(broken)
        ]
    if findings.errors:
        parts.append("### Could not be checked\n")
        parts.append("".join(f"- {escaped(item.path)}: {escaped(item.error.message)}\n" for item in findings.errors))
    if passed:
        parts.append(f"<details><summary>{len(passed)} passed</summary>\n\n{_table(passed)}\n</details>\n")
    parts += [f"{escaped(note)}\n" for note in findings.notes]
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return printable(text).translate(_SPECIAL).replace("&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;")


def _table(findings: Iterable[Finding]) -> str:
    lines = ["|  | gate | model | actual | limit |", "| --- | --- | --- | ---: | ---: |"]
    for finding in findings:
        cells = (_SIGNS[finding.verdict], finding.id, escaped(subject(finding)), *actual_and_limit(finding))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _comments(findings: Iterable[Finding]) -> Iterable[tuple[Finding, str]]:
    return (
        (finding, comment)
        for finding in findings
        if (comment := " ".join(filter(None, (finding.note, finding.message))))
    )
