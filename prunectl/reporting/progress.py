"""Progress bars: for bytes, and for training."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from prunectl.reporting.report import Settings
from prunectl.reporting.terminal import escape_unencodable, make_console
from prunectl.units import percent

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.progress import Progress as RichProgress

    from prunectl.training.logger import LogEntry, ProgressEvent


PATIENCE_SECONDS = 1.0


class ProgressBars:
    """Counts bytes; shows a bar once it has taken long enough to ask what is going on."""

    def __init__(self, label: str, total_bytes: int, settings: Settings) -> None:
        self._label = label
        self._total = total_bytes
        self._settings = settings
        self._done = 0
        self._began = time.monotonic()
        self._is_wanted = (
            settings.has_progress and not settings.is_quiet and sys.stderr.isatty() and not os.environ.get("CI")
        )
        self._bar: RichProgress | None = None

    def advance(self, nbytes: int) -> None:
        """Count work that is done."""
        self._done += nbytes
        if not self._is_wanted:
            return
        if self._bar is None and time.monotonic() - self._began > PATIENCE_SECONDS:
            self._bar = self._start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)

    def _start(self) -> RichProgress:
        from rich import progress  # noqa: PLC0415 - rich is loaded only for people

        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TimeRemainingColumn(),
            console=make_console(sys.stderr, self._settings),
            transient=True,
        )
        bar.add_task(self._label, total=self._total)
        bar.start()
        return bar

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class TrainingProgress:
    """Watches a run, and speaks on stderr."""

    def __init__(self, settings: Settings, checkpoints: Path | None) -> None:
        self._settings = settings
        self._checkpoints = checkpoints
        self._has_bar = settings.has_progress and sys.stderr.isatty() and not os.environ.get("CI")
        self._bar: Progress | None = None
        self._last_epoch = 0

    def watch(self, moment: ProgressEvent) -> None:
        """Show where training is."""
        if self._settings.is_quiet:
            return
        if self._has_bar:
            self._show(moment)
        elif moment.last is not None and moment.last.epoch > self._last_epoch:
            self._write_epoch(moment.last, moment.epochs)

    def _write_epoch(self, entry: LogEntry, epochs: int) -> None:
        escape_unencodable(sys.stderr)
        self._last_epoch = entry.epoch
        sys.stderr.write(f"epoch {entry.epoch}/{epochs}: {format_epoch(entry)}\n")
        sys.stderr.flush()

    def _show(self, moment: ProgressEvent) -> None:
        from rich import progress  # noqa: PLC0415 - rich is loaded only for people

        if self._bar is None:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.completed}/{task.total}"),
                progress.TimeRemainingColumn(),
                console=make_console(sys.stderr, self._settings),
                transient=True,
            )
            self._bar.add_task("", total=moment.steps)
            self._bar.start()
        last = format_epoch(moment.last) if moment.last is not None else percent(moment.sparsity) + " zero"
        description = f"epoch {moment.epoch}/{moment.epochs}  {last}"
        self._bar.update(self._bar.task_ids[0], completed=moment.step, description=description)

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
                sys.stderr.write("stopped: nothing is kept; with --checkpoint-dir DIR it can be gone on with\n")
            else:
                sys.stderr.write(f"stopped: the same command with --resume goes on from {self._checkpoints}\n")


def format_epoch(entry: LogEntry) -> str:
    """The metrics of an epoch, in a line."""
    numbers = [*entry.train.items(), *((f"val {name}", value) for name, value in entry.val.items())]
    return "  ".join([*(f"{name} {value:.4g}" for name, value in numbers), f"{percent(entry.sparsity)} zero"])
