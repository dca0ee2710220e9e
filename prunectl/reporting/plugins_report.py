"""What `plugins` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prunectl.reporting.curve_plot import in_dots
from prunectl.reporting.report import Artifact, Report, Section
from prunectl.reporting.table import Column, Table
from prunectl.training.choices import Choice

_COLUMNS = (Column("kind"), Column("name"), Column("from", is_optional=True), Column("what"))
_LETTERS, _LINES = 48, 5


def plugins_report(found: Sequence[Choice], curves: Mapping[str, Sequence[float]], picture: Path | None) -> Report:
    """Return the list, with pictures of curves if there are any."""
    rows = tuple((one.kind, one.name, one.source, one.line) for one in found)
    main = Table("plugins", _COLUMNS, rows)
    drawn = tuple(Section(name, lines=tuple(_framed(curve))) for name, curve in curves.items())
    sections = (Section("", (), (main,)), *drawn) if drawn else ()
    return Report(
        models=(),
        main=main,
        sections=sections,
        artifacts=(Artifact(str(picture), picture.stat().st_size),) if picture is not None else (),
        remarks=(f"The curves are in {picture}.",) if picture is not None else (),
        bare=tuple(one.name for one in found),
        more={"plugins": [dict(zip(("kind", "name", "from", "what"), row, strict=True)) for row in rows]},
    )


def _framed(curve: Sequence[float]) -> list[str]:
    scale = ["100 %", *([""] * (_LINES - 2)), "  0 %"]
    return [f"{left:>5} {line}" for left, line in zip(scale, in_dots(curve, _LETTERS, _LINES), strict=True)]
