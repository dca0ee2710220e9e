"""What `check` says, drawn from its findings."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass

from prunectl.checks.rules import Finding, Findings
from prunectl.checks.schema import MetricUnit
from prunectl.reporting import serialize
from prunectl.reporting.report import Cell, Column, Failure, Report, Section, Table
from prunectl.units import Units, count, nbytes, percent, printable


def number(value: float, unit: MetricUnit, units: Units = Units.SI) -> str:
    """Return what was found, or its limit, as people read it."""
    if unit is MetricUnit.RATIO:
        return f"-{percent(-value)}" if value < 0 else percent(value)
    if unit is MetricUnit.BYTES:
        return f"-{nbytes(-int(value), units)}" if value < 0 else nbytes(int(value), units)
    if unit is MetricUnit.POINTS:
        return f"{100 * value:.3g} pp"
    if unit is MetricUnit.NUMBER:
        return f"{value:.4g}"
    return count(int(value))


def subject(found: Finding) -> str:
    """Return what the limit is about."""
    return f"{found.model}: {found.tensor}" if found.tensor else found.model


def actual_and_limit(found: Finding, units: Units = Units.SI) -> tuple[str, str]:
    """Return what was found and its limit, told apart even where rounding makes them one."""
    actual, limit = number(found.actual, found.unit, units), number(found.limit, found.unit, units)
    if actual == limit and found.actual != found.limit:
        if found.unit is MetricUnit.BYTES:
            return f"{count(int(found.actual))} B", f"{count(int(found.limit))} B"
        if found.unit is MetricUnit.POINTS:
            return f"{100 * found.actual:.7g} pp", f"{100 * found.limit:.7g} pp"
        if found.unit is MetricUnit.NUMBER:
            return f"{found.actual:.9g}", f"{found.limit:.9g}"
        return f"{found.actual:.6%}", f"{found.limit:.6%}"
    return actual, limit


def describe(found: Finding, units: Units = Units.SI) -> str:
    """Return a limit, what was found, and what there is to say of it."""
    actual, limit = actual_and_limit(found, units)
    text = f"{found.id}: {subject(found)} has {actual}, the limit is {limit}."
    return " ".join(filter(None, (text, found.note, found.message)))


def summary(found: Findings) -> str:
    """Return all of it in a line."""
    passed = len(found.findings) - len(found.failed) - len(found.warned)
    parts = [
        f"{count(len(found.failed))} failed",
        f"{count(len(found.warned))} warned",
        f"{count(passed)} passed",
        *([f"{count(len(found.unusable))} could not be judged"] if found.unusable else []),
    ]
    return f"{', '.join(parts)}; {count(found.models)} {'model' if found.models == 1 else 'models'} measured"


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
_HUMAN = (Column("verdict"), Column("gate"), Column("model"), Column("found"), Column("limit"), Column("budget"))


@dataclass(frozen=True, slots=True)
class CheckReport(Report):
    """A report whose gates may also warn, which is no reason to fail."""

    code: int = 0

    @property
    def exit_code(self) -> int:
        """The worst of what happened."""
        return self.code


def rows(findings: tuple[Finding, ...]) -> Table:
    """Return the findings as programs read them."""
    return Table("gates", _PLAIN, tuple(_row(found) for found in findings))


def table(findings: tuple[Finding, ...]) -> Table:
    """Return the findings as people read them."""
    lines = tuple((one.verdict, one.id, subject(one), *actual_and_limit(one), one.budget) for one in findings)
    return Table("gates", _HUMAN, lines)


def check_report(found: Findings, *, has_gates: bool) -> Report:
    """Return the report on a check; the gates themselves are for scripts, as people see them in the table."""
    # Scripts have what failed among the gates.
    broken = (*(() if has_gates else found.failed), *found.warned)
    told = tuple(f"{one.verdict}: {describe(one)}" for one in broken)
    # A terminal shows the first rows: what needs a look stands there.
    ordered = (*found.failed, *found.warned, *(one for one in found.findings if one.ok))
    section = Section(
        f"{found.file}: {summary(found)}",
        tables=(table(ordered),) if ordered else (),
    )
    return CheckReport(
        remarks=(*told, *found.notes),
        models=(),
        main=rows(found.findings),
        sections=(section,),
        gates=found.findings if has_gates else (),
        failures=tuple(Failure(one.path, one.error) for one in found.unusable),
        bare=tuple(describe(one) for one in found.failed),
        code=found.exit_code,
        more={"budgets": {"file": found.file, "models": found.models, "notes": list(found.notes)}},
    )


def _row(one: Finding) -> tuple[Cell, ...]:
    return (one.verdict, one.id, one.model, one.tensor, one.actual, one.limit, str(one.unit), one.budget)


def human(found: Findings) -> str:
    """Return a line for each finding, what could not be judged, and all of it in one line."""
    lines = [f"{one.verdict:<5}  {describe(one)}" for one in found.findings]
    lines += [f"error  {one.error.message}" for one in found.unusable]
    lines += [f"note   {note}" for note in found.notes]
    return "".join(printable(line) + "\n" for line in (*lines, f"{found.file}: {summary(found)}"))


def plain(found: Findings) -> str:
    """Return tab-separated rows with raw numbers: verdict, gate, model, tensor, actual, limit, unit, budget."""
    return serialize.plain(rows(found.findings))


COMMAND = "check"


def as_json(found: Findings) -> str:
    """Return the envelope."""
    return serialize.report_json(check_report(found, has_gates=True), COMMAND)


def as_html(found: Findings) -> str:
    """Return the page."""
    # Most reports are for scripts, and do without what draws pages.
    text: str = importlib.import_module("prunectl.reporting.html.page").page(
        check_report(found, has_gates=False), "check", Units.SI
    )
    return text


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
        cells = (_SIGNS[one.verdict], one.id, escaped(subject(one)), *actual_and_limit(one))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _said(findings: Iterable[Finding]) -> Iterable[tuple[Finding, str]]:
    return ((one, said) for one in findings if (said := " ".join(filter(None, (one.note, one.message)))))
