"""What `check` says, drawn from its findings."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.gating.finding import Finding, Findings
from prunectl.reporting.gates.words import pair, sentence, subject, summary
from prunectl.reporting.report import Failure, Report, Section
from prunectl.reporting.table import Cell, Column, Table

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
class Judged(Report):
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
    lines = tuple((one.verdict, one.id, subject(one), *pair(one), one.budget) for one in findings)
    return Table("gates", _HUMAN, lines)


def check_report(found: Findings, *, has_gates: bool) -> Report:
    """Return the report on a check; the gates themselves are for scripts, as people see them in the table."""
    # Scripts have what failed among the gates.
    broken = (*(() if has_gates else found.failed), *found.warned)
    told = tuple(f"{one.verdict}: {sentence(one)}" for one in broken)
    # A terminal shows the first rows: what needs a look stands there.
    ordered = (*found.failed, *found.warned, *(one for one in found.findings if one.ok))
    section = Section(
        f"{found.file}: {summary(found)}",
        tables=(table(ordered),) if ordered else (),
    )
    return Judged(
        remarks=(*told, *found.notes),
        models=(),
        main=rows(found.findings),
        sections=(section,),
        gates=found.findings if has_gates else (),
        failures=tuple(Failure(one.path, one.error) for one in found.unusable),
        bare=tuple(sentence(one) for one in found.failed),
        code=found.exit_code,
        more={"budgets": {"file": found.file, "models": found.models, "notes": list(found.notes)}},
    )


def _row(one: Finding) -> tuple[Cell, ...]:
    return (one.verdict, one.id, one.model, one.tensor, one.actual, one.limit, str(one.unit), one.budget)
