"""Loss and metrics over the examples since they were last asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class Logbook:
    """Adds up what each step says of itself."""

    def __init__(self, is_running: Callable[[str, float], bool]) -> None:
        self._is_running = is_running
        """Whether Keras says a number for all batches so far, and not for one."""
        self._last: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def note(self, said: Mapping[str, Any], examples: int) -> None:
        """Take down what a step said."""
        for name, value in said.items():
            number = float(np.asarray(value, np.float64).mean())
            self._last[name] = number
            self._sums[name] = self._sums.get(name, 0.0) + number * examples
            self._counts[name] = self._counts.get(name, 0) + examples

    def close(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        found = {
            name: last if self._is_running(name, last) else self._sums[name] / max(self._counts[name], 1)
            for name, last in self._last.items()
        }
        self._last, self._sums, self._counts = {}, {}, {}
        return found


def measured(model: Any) -> dict[str, float]:
    """Return what the metrics of a model stand at, those that have begun."""
    found: dict[str, float] = {}
    for metric in model.metrics:
        try:
            result = metric.result()
        except ValueError:  # Keras 3 has not built it yet
            continue
        parts = result if isinstance(result, Mapping) else {metric.name: result}
        found.update({name: float(np.asarray(one, np.float64).mean()) for name, one in parts.items()})
    return found
