"""A progress bar for work over a second, at a terminal."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from prunectl.reporting.streams import console

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from prunectl.reporting.settings import Settings

PATIENCE_SECONDS = 1.0


class Progress:
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
            console=console(sys.stderr, self._settings),
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
