"""What `prune --pattern layers` says, drawn from what went."""

from __future__ import annotations

from dataclasses import asdict

from prunectl.pruning.blocks import BlocksPruned
from prunectl.reporting.prune import UNMEASURED, outcome
from prunectl.reporting.report import Artifact, Column, Report, Section, Table, Unit, survey_json

_STACKS = (
    Column("blocks of"),
    Column("before", Unit.COUNT),
    Column("removed", Unit.COUNT),
    Column("numbers", is_whole=True),
)
_SIZES = (Column(""), Column("params", Unit.COUNT), Column("raw", Unit.BYTES), Column("gzip", Unit.BYTES))


def blocks_report(result: BlocksPruned, output: str) -> Report:
    """The report on a run; without an output it was a dry run."""
    rows = tuple((stack.name, stack.before, len(stack.removed), ranges(stack.removed)) for stack in result.stacks)
    stacks = Table("blocks", _STACKS, rows)
    sizes = Table(
        "sizes",
        _SIZES,
        tuple(
            (name, stats.params.total, stats.bytes.raw, stats.bytes.compressed)
            for name, stats in (("before", result.before), ("after", result.after))
        ),
    )
    notes = (*result.notes, UNMEASURED if output else "This was a dry run: nothing was written.")
    return Report(
        models=(survey_json(result.before), survey_json(result.after)),
        table=stacks,
        sections=(Section(f"{result.before.path} -> {output or '(dry run)'}", (), (stacks, sizes), notes),),
        artifacts=(Artifact(output, result.after.bytes.raw),) if output else (),
        summary=outcome(result.before, result.after, output),
        next_step=f"prunectl inspect {output}" if output else "",
        quiet_lines=(),
        extra_json={"blocks": [asdict(stack) for stack in result.stacks]},
    )


def ranges(numbers: tuple[int, ...]) -> str:
    """Numbers as they are typed: `4, 20-23`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
