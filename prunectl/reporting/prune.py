"""What `prune` says, drawn from its plan and its result."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from prunectl.analysis.inspect import about_copies
from prunectl.analysis.stats import ModelStats
from prunectl.pruning.plan import sample_depth_bias
from prunectl.pruning.policies import UNKNOWN
from prunectl.pruning.prune import Pruned
from prunectl.pruning.schedules import SparsitySchedule
from prunectl.reporting.report import Artifact, Cell, Column, Report, Section, Table, Unit
from prunectl.reporting.serialize import survey_json
from prunectl.units import count, percent

if TYPE_CHECKING:
    from prunectl.training.wrap.prune import Wrapped

_COMPARED = (
    Column(""),
    Column("sparsity", Unit.RATIO),
    Column("raw", Unit.BYTES),
    Column("packed", Unit.BYTES),
    Column("gzip", Unit.BYTES),
)


def before_after(before: ModelStats, after: ModelStats) -> Table:
    """Return the sizes of a model before and after, and how many of its prunable weights are zero."""
    return Table("sizes", _COMPARED, (_compared_row("before", before), _compared_row("after", after)))


def _compared_row(name: str, found: ModelStats) -> tuple[Cell, ...]:
    return (name, found.prunable_sparsity, found.bytes.raw, found.bytes.packed, found.bytes.compressed)


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
        remarks.append(f"The seed drew the bias {sample_depth_bias(found.request.seed)}.")
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


_SHOWN = 6


def wrap_report(found: Wrapped, output: str) -> Report:
    """Return the report on a run; without an output it was a dry run."""
    report = prune_report(found.pruned, output)
    (section,) = report.sections
    said = [one for one in section.remarks if not (one.startswith("The optimizer's state") and found.loses_optimizer)]
    remarks = tuple(f"Next: prunectl finetune {output} --data …" if "Next:" in one else one for one in said)
    return replace(report, sections=(replace(section, remarks=(*_remarks(found), *remarks)),))


def _remarks(found: Wrapped) -> tuple[str, ...]:
    tensors = f"{found.wrapped} tensor{'s' * (found.wrapped != 1)}"
    remarks = [f"{tensors} got wrappers: {_schedule(found.ramp)}"]
    if found.bare:
        names = ", ".join(found.bare[:_SHOWN]) + (" …" if len(found.bare) > _SHOWN else "")
        what = "is pruned without one" if found.ramp is None else "stays dense"
        remarks.append(f"The framework has no wrapper for {names}: what is there {what}.")
    if found.loses_compilation:
        remarks.append("The result is not compiled: the file's loss, optimizer or a metric is code unknown here.")
    if found.loses_optimizer:
        remarks.append("The optimizer's state is not kept: wrapped weights are trained by a new one.")
    return tuple(remarks)


def _schedule(ramp: SparsitySchedule | None) -> str:
    if ramp is None:
        return "masks that hold what is pruned."
    until = f" until step {ramp.end}" if ramp.end is not None else ""
    final = percent(ramp.final) if ramp.final else "its sparsity"
    begin = "from the first step on" if not ramp.begin else f"from step {ramp.begin} on"
    return f"nothing is pruned yet; {ramp.curve} {percent(ramp.initial)} to {final}, {begin}{until}."
