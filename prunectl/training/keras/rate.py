"""The learning rate of each step: a share of the one that training began with, or that a schedule has come to."""

from __future__ import annotations

from typing import Any

from prunectl.training.keras.library import Library


class Rate:
    """Sets the rate of an optimizer, when it changes."""

    def __init__(self, library: Library, optimizer: Any, schedule: Any) -> None:
        self._library, self._optimizer, self._schedule = library, optimizer, schedule
        self._base = self._number(optimizer.learning_rate)
        self._now: float | None = self._base

    def follow(self, share: float) -> None:
        """Set the rate to a share of the base."""
        if self._schedule is not None:
            self._base = self._number(self._schedule(self._optimizer.iterations))
        wanted = self._base * share
        if wanted != self._now:
            self._optimizer.learning_rate = wanted
            self._now = wanted

    def forget(self) -> None:
        """Set it anew at the next step, since something else may have set it."""
        self._now = None

    def _number(self, found: Any) -> float:
        if self._library.is_two:
            return float(found.numpy())
        return float(self._library.keras.ops.convert_to_numpy(found))
