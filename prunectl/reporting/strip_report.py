"""What `strip` says: everything that went, with its bytes."""

from __future__ import annotations

from prunectl.formats.stripping import Part
from prunectl.pruning.strip import Stripped
from prunectl.reporting.before_after import before_after
from prunectl.reporting.report import Artifact, Report, Section
from prunectl.reporting.survey_json import survey_json
from prunectl.reporting.table import Column, Table, Unit

_THINGS = (Column("removed"), Column("part"), Column("bytes", Unit.BYTES))
_PARTS = (Column("part"), Column("removed", Unit.COUNT), Column("bytes", Unit.BYTES))


def strip_report(found: Stripped, output: str) -> Report:
    """Return the report on a run; without an output it was a dry run."""
    rows = tuple((thing.name, str(thing.part), thing.bytes) for thing in found.removed)
    things = Table("removed", _THINGS, rows, total=("all", "", sum(thing.bytes for thing in found.removed)))
    has_shrunk = found.after.bytes.raw < found.before.bytes.raw
    remarks = [*found.after.about.notes]
    remarks += [] if rows or has_shrunk else ["There was nothing to strip: the output has all that the input had."]
    remarks += [f"Next: prunectl size {output}" if output else "This was a dry run: nothing was written."]
    tables = (*([_by_part(found)] if rows else []), before_after(found.before, found.after))
    return Report(
        models=(survey_json(found.before), survey_json(found.after)),
        main=things,
        sections=(Section(f"{found.before.path} -> {output or 'nowhere'}", (), tables, tuple(remarks)),),
        artifacts=(Artifact(output, found.after.bytes.raw),) if output else (),
        bare=(),
    )


def _by_part(found: Stripped) -> Table:
    kinds = [part for part in Part if any(thing.part is part for thing in found.removed)]
    of = {part: [thing.bytes for thing in found.removed if thing.part is part] for part in kinds}
    rows = tuple((str(part), len(sizes), sum(sizes)) for part, sizes in of.items())
    total = ("all", len(found.removed), sum(thing.bytes for thing in found.removed))
    return Table("parts", _PARTS, rows, total=total)
