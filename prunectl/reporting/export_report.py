"""What `export` says: how far the result is from its source, and how big it is."""

from __future__ import annotations

from typing import Any

from prunectl.exporting.parity import Parity
from prunectl.exporting.result import Exported
from prunectl.reporting.before_after import before_after
from prunectl.reporting.report import Artifact, Report, Section
from prunectl.reporting.survey_json import survey_json
from prunectl.reporting.table import Column, Table, Unit

_OUTPUTS = (
    Column("output"),
    Column("max difference", Unit.NUMBER),
    Column("mean difference", Unit.NUMBER),
    Column("relative RMS", Unit.NUMBER),
)


def export_report(found: Exported, output: str) -> Report:
    """Return the report on a run."""
    sizes = before_after(found.before, found.after)
    tables = (sizes,) if found.parity is None else (_differences(found.parity), sizes)
    facts = (("from", found.source), ("to", found.target), ("compared", _compared(found.parity)))
    remarks = (*found.remarks, *_about_source(found), f"Next: prunectl size {output}")
    return Report(
        models=(survey_json(found.before), survey_json(found.after)),
        main=sizes,
        sections=(Section(f"{found.before.path} -> {output}", facts, tables, remarks),),
        artifacts=(Artifact(output, found.after.bytes.raw), *(Artifact(*one) for one in found.beside)),
        bare=(),
        more={"parity": _parity(found.parity)},
    )


def _about_source(found: Exported) -> tuple[str, ...]:
    return tuple(note for note in found.before.about.notes if note not in found.remarks)


def _differences(parity: Parity) -> Table:
    rows = tuple((one.name, one.largest, one.mean, one.noise) for one in parity.outputs)
    return Table("parity", _OUTPUTS, rows)


def _compared(parity: Parity | None) -> str:
    if parity is None:
        return "every number, to the bit"
    what = "examples" if parity.is_data else "random inputs"
    same = "" if parity.top1 is None else f", the same largest answer for {parity.top1:.2%}"
    noise = "" if parity.tolerance.noise is None else f", {parity.noise:.2%} of their size"
    apart = f"{parity.largest:.3g} apart at most, {parity.mean:.3g} on average"
    return f"on {parity.examples:,} {what}: {apart}{noise}{same}"


def _parity(parity: Parity | None) -> dict[str, Any]:
    if parity is None:
        return {"kind": "bits", "equal": True}
    return {
        "kind": "outputs",
        "examples": parity.examples,
        "inputs": "data" if parity.is_data else "random",
        "max_difference": parity.largest,
        "mean_difference": parity.mean,
        "same_top1": parity.top1,
        "tolerance": {
            "atol": parity.tolerance.atol,
            "rtol": parity.tolerance.rtol,
            "share_of_largest": parity.tolerance.share,
            "relative_rms": parity.tolerance.noise,
            "top1": parity.tolerance.top1,
        },
        "outputs": [
            {
                "name": one.name,
                "max_difference": one.largest,
                "mean_difference": one.mean,
                "relative_rms": one.noise,
            }
            for one in parity.outputs
        ],
    }
