"""Ctrl-C, once: the step that runs is finished and kept; twice: at once."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self


@dataclass(slots=True)
class Stopping:
    """Whether the user wants training to end, while this is entered."""

    is_wanted: bool = False
    _before: Any = None

    def __enter__(self) -> Self:
        # Python lets only the main thread do this; elsewhere Ctrl-C is somebody else's business.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        if self.is_wanted:
            raise KeyboardInterrupt
        self.is_wanted = True
