"""What `prune` says of a model that it put wrappers into."""

from __future__ import annotations

from dataclasses import replace

from prunectl.pruning.schedules import Ramp
from prunectl.reporting.prune_report import prune_report
from prunectl.reporting.report import Report
from prunectl.training.wrap.prune import Wrapped
from prunectl.units import percent

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


def _schedule(ramp: Ramp | None) -> str:
    if ramp is None:
        return "masks that hold what is pruned."
    until = f" until step {ramp.end}" if ramp.end is not None else ""
    final = percent(ramp.final) if ramp.final else "its sparsity"
    begin = "from the first step on" if not ramp.begin else f"from step {ramp.begin} on"
    return f"nothing is pruned yet; {ramp.curve} {percent(ramp.initial)} to {final}, {begin}{until}."
