"""What `verify` says, drawn from its verdicts."""

from __future__ import annotations

from dataclasses import replace

from prunectl.gating.finding import Finding
from prunectl.reporting.check_report import Judged
from prunectl.reporting.report import Report, Section
from prunectl.reporting.table import Column, Table, Unit

_COLUMNS = (Column("verdict"), Column("what"), Column("differences", Unit.COUNT), Column("note"))
_SENTENCES = {
    "digest": "the bytes are those of the manifest",
    "zeros": "every tensor has the zeros of the manifest",
    "architecture": "tensors, configuration and graph are those of the source",
    "kept-weights": "every weight that is left is the source's, to the bit",
    "kept-zeros": "every zero of the source is still a zero",
    "other-tensors": "what was not to be pruned has no new zeros",
    "source-digest": "the source is the one of the manifest",
    "dropped": "no tensor lost more weights than were dropped",
}


def verify_report(path: str, findings: tuple[Finding, ...], *, has_gates: bool) -> Report:
    """Return the report on a file; gates are for scripts, as people see them in a table."""
    named = tuple(replace(finding, model=path) for finding in findings)
    failed = [finding for finding in named if finding.is_failure]
    held = Table(
        "checks", _COLUMNS, tuple((one.verdict, _SENTENCES[one.id], int(one.actual), one.note) for one in named)
    )
    title = f"{path}: {f'{len(failed)} of {len(named)} do not hold' if failed else 'all holds'}"
    return Judged(
        models=(),
        main=Table("checks", _COLUMNS, tuple((one.verdict, one.id, int(one.actual), one.note) for one in named)),
        sections=(Section(title, tables=(held,)),),
        gates=named if has_gates else (),
        bare=tuple(f"{one.id}: {one.note}" for one in failed),
        code=int(bool(failed)),
    )
