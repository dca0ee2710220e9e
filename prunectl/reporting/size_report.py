"""What `size` says, drawn from surveys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from prunectl.measuring.advice import quantised
from prunectl.measuring.codecs import Codec
from prunectl.measuring.gates import Gate
from prunectl.measuring.survey import Survey
from prunectl.reporting.report import Failure, Report
from prunectl.reporting.survey_json import survey_json
from prunectl.reporting.table import Cell, Column, Table, Unit


def size_report(surveys: Sequence[Survey], gates: Sequence[Gate], failures: Sequence[Failure], codec: Codec) -> Report:
    """Return the report on the sizes of some models."""
    columns = [
        Column("path"),
        Column("raw", Unit.BYTES),
        Column("packed", Unit.BYTES),
        Column(codec.name.value if codec.level else "stream", Unit.BYTES),
        Column("sparsity", Unit.RATIO),
    ]
    if len(surveys) > 1:
        columns.append(Column("ratio", Unit.FACTOR))
    first = surveys[0].bytes.compressed if surveys else None
    return Report(
        models=tuple({**survey_json(found), "codec": asdict(codec)} for found in surveys),
        main=Table("sizes", tuple(columns), tuple(_cells(found, first)[: len(columns)] for found in surveys)),
        gates=tuple(gates),
        failures=tuple(failures),
        remarks=tuple(f"{found.path}: {sentence}" for found in surveys for sentence in quantised(found)),
        bare=tuple(str(found.bytes.compressed) for found in surveys),
    )


def _cells(found: Survey, first: int | None) -> tuple[Cell, ...]:
    sizes = found.bytes
    ratio = first / sizes.compressed if first is not None and sizes.compressed else None
    return (found.path, sizes.raw, sizes.packed, sizes.compressed, found.prunable_sparsity, ratio)
