"""What `prune` says, drawn from its plan and its result."""

from __future__ import annotations

from collections import Counter

from prunectl.measuring.advice import about_copies
from prunectl.pruning.allocation import draw
from prunectl.pruning.policies import UNKNOWN
from prunectl.pruning.prune import Pruned
from prunectl.reporting.before_after import before_after
from prunectl.reporting.report import Artifact, Report, Section
from prunectl.reporting.survey_json import survey_json
from prunectl.reporting.table import Cell, Column, Table, Unit
from prunectl.units import count, percent

_COLUMNS = (
    Column("tensor"),
    Column("shape", is_optional=True),
    Column("weights", Unit.COUNT),
    Column("dropped", Unit.COUNT),
    Column("zeros", Unit.COUNT),
    Column("sparsity", Unit.RATIO),
)


def prune_report(found: Pruned, output: str) -> Report:
    """Return the report on a run; without an output it was a dry run."""
    rows = tuple(_row(found, number) for number in range(len(found.plan.cuts)))
    dropped = sum(tally.dropped for tally in found.tallies.values())
    zeros = sum(tally.zeros for tally in found.tallies.values())
    size = found.plan.size
    cuts = Table("cuts", _COLUMNS, rows, total=("all", "", size, dropped, zeros, zeros / size if size else 0.0))
    remarks = [*([_skipped(found)] if found.plan.skips else []), *found.notes, *about_copies(found.before)]
    if any(skip.reason == UNKNOWN for skip in found.plan.skips):
        remarks.append(f"What is {UNKNOWN} is pruned when --only names it.")
    if any(skip.reason == "optimizer state" for skip in found.plan.skips):
        remarks.append(
            "The optimizer's state of pruned weights is as it was: training goes on from it as from dense weights."
        )
    if found.request.strategy == "random-weighted" and not found.request.params:
        remarks.append(f"The seed drew the bias {draw(found.request.seed)}.")
    if found.request.cluster:
        count_of = found.request.cluster.partition(":")[0]
        remarks.append(
            f"Each of these tensors has at most {count_of} distinct values: what compresses files finds them."
        )
    if not output:
        remarks.append("This was a dry run: nothing was written.")
    else:
        remarks.append(f"Next: prunectl size {output}")
    title = f"{found.before.path} -> {output or 'nowhere'}"
    return Report(
        models=(survey_json(found.before), survey_json(found.after)),
        main=cuts,
        sections=(Section(title, _facts(found), (cuts, before_after(found.before, found.after)), tuple(remarks)),),
        artifacts=(Artifact(output, found.after.bytes.raw),) if output else (),
        remarks=(),
        bare=(),
    )


def _row(found: Pruned, number: int) -> tuple[Cell, ...]:
    tensor = found.plan.cuts[number].tensor
    tally = found.tallies[tensor.name]
    shape = "x".join(map(str, tensor.shape))
    return (tensor.name, shape, tensor.size, tally.dropped, tally.zeros, tally.zeros / tensor.size)


def _facts(found: Pruned) -> tuple[tuple[str, str], ...]:
    asked = found.request
    how = ", ".join(filter(None, (asked.strategy, asked.pattern, f"{asked.scope} scope", f"policy {asked.policy}")))
    return (
        ("asked", percent(found.sparsity)),
        ("how", how),
        *([("clusters", f"{asked.cluster} values in each tensor at most, by k-means")] if asked.cluster else []),
        ("planned", f"{count(found.plan.drop)} of {count(found.plan.size)} weights"),
    )


def _skipped(found: Pruned) -> str:
    reasons = Counter(skip.reason for skip in found.plan.skips)
    told = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common(6))
    return f"Left alone: {told}{' and others' if len(reasons) > 6 else ''}."
