"""What `inspect --groups` says: which channels go together, and which are locked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prunectl.channels.couple import Family
from prunectl.channels.groups import Groups
from prunectl.reporting.report import Report
from prunectl.reporting.table import Cell, Column, Table, Unit
from prunectl.units import count

_COLUMNS = (
    Column("channels of"),
    Column("channels", Unit.COUNT),
    Column("tensors", Unit.COUNT),
    Column("goes with", is_optional=True),
    Column("locked"),
)
_SHOWN = 4


def with_groups(report: Report, found: Sequence[Groups]) -> Report:
    """Return the report of `inspect` with the channels of its models, given in its order."""
    by_path = {groups.path: groups for groups in found}
    sections = tuple(
        replace(
            section,
            facts=(*section.facts, ("channels", _fact(by_path[section.title]))),
            tables=(*section.tables, _table(by_path[section.title])),
        )
        if section.title in by_path
        else section
        for section in report.sections
    )
    # Who asks for groups in a pipe gets groups.
    rows = tuple((groups.path, *_row(family)) for groups in found for family in groups.families)
    main = Table("groups", (Column("path"), *_COLUMNS), rows)
    return replace(
        report, main=main, sections=sections, more={**report.more, "groups": [_json(groups) for groups in found]}
    )


def _fact(found: Groups) -> str:
    return f"{count(found.free)} of {count(found.channels)} may go"


def _table(found: Groups) -> Table:
    return Table("groups", _COLUMNS, tuple(_row(family) for family in found.families), title="channels")


def _row(family: Family) -> tuple[Cell, ...]:
    places = [f"{place.tensor}[{place.axis}]" for place in family.places if place.tensor != family.name]
    told = ", ".join(places[:_SHOWN]) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")
    return (family.name, len(family.groups), len({place.tensor for place in family.places}), told, family.reason)


def _json(found: Groups) -> dict[str, object]:
    return {
        "path": found.path,
        "families": [
            {
                "name": family.name,
                "channels": len(family.groups),
                "locked": family.reason or None,
                "places": [
                    {"tensor": place.tensor, "axis": place.axis, "part": str(place.part)} for place in family.places
                ],
            }
            for family in found.families
        ],
    }
