"""What `init` says: the limits that it wrote."""

from __future__ import annotations

from pathlib import Path

from prunectl.gating.propose import Proposal
from prunectl.reporting.report import Artifact, Failure, Report, Section
from prunectl.reporting.table import Column, Table, Unit

_COLUMNS = (
    Column("model"),
    Column("max-raw", Unit.BYTES),
    Column("max-gzip", Unit.BYTES),
    Column("max-params", Unit.COUNT),
    Column("min-sparsity", Unit.RATIO),
)


def init_report(path: Path, proposals: list[Proposal], failures: list[Failure]) -> Report:
    """Return the report on a file of budgets that was written."""
    rows = tuple((one.path, one.max_raw, one.max_gzip, one.max_params, one.min_sparsity) for one in proposals)
    table = Table("budgets", _COLUMNS, rows)
    return Report(
        models=(),
        main=table,
        sections=(Section(str(path), tables=(table,), remarks=("Next: prunectl check",)),),
        failures=tuple(failures),
        artifacts=(Artifact(str(path), path.stat().st_size),),
        bare=(),
    )
