"""What `finetune` says: how good the model was and is, how it got there, that its zeros are all there."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from prunectl.reporting.prune import before_after, compare_sizes, outcome
from prunectl.reporting.report import Artifact, Cell, Column, Report, Section, Settings, Table, Unit, survey_json
from prunectl.reporting.reporter import escape_unencodable, make_console
from prunectl.training.checkpoint import CheckpointManager
from prunectl.training.finetune import FinetuneResult
from prunectl.training.monitor import monitored_log, monitored_metric
from prunectl.units import count, percent

if TYPE_CHECKING:
    from rich.progress import Progress

    from prunectl.training.logger import LogEntry, ProgressEvent

_RESULT = (
    Column("model"),
    Column("metric"),
    Column("before", Unit.NUMBER),
    Column("after", Unit.NUMBER),
    Column("sparsity", Unit.RATIO),
    Column("raw", Unit.BYTES, is_optional=True),
    Column("gzip before", Unit.BYTES),
    Column("gzip after", Unit.BYTES),
    Column("zeros kept", Unit.COUNT),
    Column("zeros", Unit.COUNT),
    Column("how", title="method"),
)


def finetune_report(result: FinetuneResult, model: str, output: str) -> Report:
    """The report on a run."""
    table = Table("result", _RESULT, (_result(result, output),))
    epochs = _epochs(result)
    tables = (*([epochs] if epochs.rows else []), before_after(result.before, result.after))
    training = {
        "steps": result.course.steps,
        "best_epoch": result.best_epoch,
        "zeros": result.masked,
        "zeros_kept": result.kept,
        "before": _finite(result.judged_before),
        "after": _finite(result.judged_after),
    }
    return Report(
        models=(survey_json(result.before), {**survey_json(result.after), "training": training}),
        table=table,
        sections=(Section(f"{model} -> {output}", _facts(result), tables, result.notes),),
        artifacts=(Artifact(output, result.after.bytes.raw),),
        summary=outcome(result.before, result.after, output),
        next_step=compare_sizes(result.before, output),
        quiet_lines=(),
    )


def _result(result: FinetuneResult, output: str) -> tuple[Cell, ...]:
    name = monitored_log(result.judged_after, monitored_metric(result.request.means)) if result.judged_after else ""
    return (
        output,
        name,
        result.judged_before.get(name),
        result.judged_after.get(name),
        result.after.prunable_sparsity,
        result.after.bytes.raw,
        result.before.bytes.compressed,
        result.after.bytes.compressed,
        result.kept,
        result.masked,
        _method(result),
    )


def _method(result: FinetuneResult) -> str:
    request = result.request
    pruning, ramping = request.pruning, request.ramping
    parts = (pruning.strategy, pruning.pattern, pruning.scope, ramping.name or "polynomial") if request.prunes else ()
    return ", ".join(
        filter(None, (*parts, f"{count(result.course.steps)} steps, batch size {result.course.batch_size}"))
    )


def _facts(result: FinetuneResult) -> tuple[tuple[str, str], ...]:
    facts = [("trained", _method(result))]
    for name, after in result.judged_after.items():
        facts.append((name, f"{_number(result.judged_before.get(name))} -> {_number(after)}"))
    if result.best_epoch is not None:
        facts.append(("weights", f"from epoch {result.best_epoch}, the best one"))
    facts.append(("zeros kept", f"{count(result.kept)} of {count(result.masked)}"))
    return tuple(facts)


def _epochs(result: FinetuneResult) -> Table:
    names = list(dict.fromkeys(name for entry in result.history for name in entry.train))
    judged = list(dict.fromkeys(name for entry in result.history for name in entry.val))
    columns = [
        Column("epoch"),
        Column("sparsity", Unit.RATIO),
        *(Column(name, Unit.NUMBER) for name in names),
        *(Column(f"val {name}", Unit.NUMBER) for name in judged),
    ]
    rows = tuple(
        (
            str(entry.epoch),
            entry.sparsity,
            *(entry.train.get(name) for name in names),
            *(entry.val.get(name) for name in judged),
        )
        for entry in result.history
    )
    return Table("epochs", tuple(columns), rows)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _finite(numbers: Mapping[str, float]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


class TrainingProgress:
    """Shows the progress of a run on stderr."""

    def __init__(self, settings: Settings, checkpoints: Path | None, monitored: str = "") -> None:
        self._settings = settings
        self._monitored = monitored
        self._checkpoints = checkpoints
        self._has_bar = settings.has_progress and sys.stderr.isatty() and not os.environ.get("CI")
        self._bar: Progress | None = None
        self._last_epoch = 0

    def watch(self, moment: ProgressEvent) -> None:
        """Show how far training has come."""
        if self._settings.is_quiet:
            return
        if self._has_bar:
            self._show(moment)
        elif moment.last is not None and moment.last.epoch > self._last_epoch:
            escape_unencodable(sys.stderr)
            self._last_epoch = moment.last.epoch
            sys.stderr.write(f"epoch {moment.last.epoch}/{moment.epochs}: {format_epoch(moment.last)}\n")
            sys.stderr.flush()

    def _show(self, moment: ProgressEvent) -> None:
        from rich import progress  # noqa: PLC0415 - rich is loaded only for people

        if self._bar is None:
            self._bar = progress.Progress(
                progress.TextColumn("{task.fields[epoch]}", markup=False),
                progress.BarColumn(_BAR_WIDTH),
                progress.TextColumn("{task.completed}/{task.total}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.description}", markup=False),
                console=make_console(sys.stderr, self._settings),
                transient=True,
            )
            self._bar.add_task("", total=moment.steps, epoch="")
            self._bar.start()
        epoch = f"epoch {moment.epoch}/{moment.epochs}"
        # The other columns of the line, with a space between any two.
        taken = len(f"{epoch} {moment.steps}/{moment.steps} -:--:-- ") + _BAR_WIDTH + 1
        last = _most_telling(moment, self._monitored, self._bar.console.width - taken)
        self._bar.update(self._bar.task_ids[0], completed=moment.step, description=last, epoch=epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is KeyboardInterrupt and not self._settings.is_quiet:
            escape_unencodable(sys.stderr)
            if self._checkpoints is None:
                sys.stderr.write("stopped: nothing was saved; a run with --checkpoint-dir DIR can be resumed\n")
            elif CheckpointManager(self._checkpoints).latest() is None:
                sys.stderr.write(f"stopped before the first checkpoint: {self._checkpoints} holds nothing to resume\n")
            else:
                sys.stderr.write(f"stopped: run the same command with --resume to continue from {self._checkpoints}\n")


_BAR_WIDTH = 20


def _most_telling(moment: ProgressEvent, monitored: str, width: int) -> str:
    """The metrics of the last epoch that fit into `width` characters, the monitored one first."""
    pieces = [f"{percent(moment.sparsity)} zero"]
    if (entry := moment.last) is not None:
        judged = {f"val {name}": value for name, value in entry.val.items()}
        logs = {**judged, **entry.train}
        name = monitored_log(entry.val or entry.train, monitored)
        first = f"val {name}" if entry.val else name
        pieces = [f"{key} {logs[key]:.4g}" for key in sorted(logs, key=lambda key: key != first)] + pieces
    while len(pieces) > 1 and len("  ".join(pieces)) > width:
        pieces.pop()
    text = "  ".join(pieces)
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def format_epoch(entry: LogEntry) -> str:
    """The metrics of an epoch in a line."""
    numbers = [*entry.train.items(), *((f"val {name}", value) for name, value in entry.val.items())]
    return "  ".join([*(f"{name} {value:.4g}" for name, value in numbers), f"{percent(entry.sparsity)} zero"])
