"""What is added up of the inputs that a tensor meets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.calibration.im2col import im2col
from prunectl.errors import WorkError
from prunectl.formats.base import Array
from prunectl.training.layer_inputs import Sight, Use

Float64Array = NDArray[np.float64]
OutputRange = tuple[int, int] | None
"""The outputs of a tensor that met these inputs; None for all."""


@dataclass(slots=True)
class InputStatistics:
    """Sums over all that a tensor has met, for each part of its outputs."""

    uses: dict[OutputRange, Use] = field(default_factory=dict)
    totals: dict[OutputRange, Float64Array] = field(default_factory=dict)
    counts: dict[OutputRange, int] = field(default_factory=dict)

    def add(
        self, sight: Sight, kernel: tuple[int, ...], of: Callable[[Sight, tuple[int, ...]], tuple[Float64Array, int]]
    ) -> None:
        """Count what one sight adds."""
        total, count = of(sight, kernel)
        part = sight.use.outputs
        self.uses.setdefault(part, sight.use)
        self.counts[part] = self.counts.get(part, 0) + count
        if part in self.totals:
            self.totals[part] += total
        else:
            self.totals[part] = total


def squares(sight: Sight, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
    """Return the sum of the squares of every feature, as groups by features."""
    return _gathered_moments(sight, kernel, lambda inputs: np.einsum("i...,i...->...", inputs, inputs))


def sizes(sight: Sight, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
    """Return the sum of the absolute values of every feature."""
    return _gathered_moments(sight, kernel, lambda inputs: np.abs(inputs).sum(axis=0))


def sums(sight: Sight, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
    """Return the sum of every feature."""
    return _gathered_moments(sight, kernel, lambda inputs: inputs.sum(axis=0))


def _gathered_moments(sight: Sight, kernel: tuple[int, ...], over: Callable[[Array], Any]) -> tuple[Float64Array, int]:
    # What comes of an element of the inputs is added up over the examples first, and seen through the window after
    # that: zero stays zero, so that the order does not matter, and nothing as big as all windows is ever made.
    inputs = sight.inputs
    if sight.use.window is None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        return np.asarray(over(flat), np.float64).reshape(sight.use.groups, -1), len(flat)
    once = np.asarray(over(inputs))[None]
    found, positions = np.float64(0), 0
    for seen in im2col(once, sight.use, kernel):
        found = found + seen.sum(axis=0, dtype=np.float64)
        positions += len(seen)
    return np.asarray(found), positions * len(inputs)


def products(sight: Sight, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
    """Return the sum of the products of every two features of a group: groups by features by features."""
    total: Any = 0.0
    count = 0
    for seen in im2col(sight.inputs, sight.use, kernel):
        by_group = _by_group(seen)
        total = total + np.matmul(by_group.transpose(0, 2, 1), by_group).astype(np.float64)
        count += len(seen)
    return np.asarray(total, np.float64), count


@dataclass(slots=True)
class CrossStatistics:
    """How the inputs that a part of a tensor meets now go together, among each other and with those it met before."""

    use: Use
    count: int = 0
    now: Float64Array = field(default_factory=lambda: np.zeros(()))
    """The sum of every feature, as groups by features."""
    before: Float64Array = field(default_factory=lambda: np.zeros(()))
    among: Float64Array = field(default_factory=lambda: np.zeros(()))
    """The sum of the products of every two features, as groups by features by features."""
    across: Float64Array = field(default_factory=lambda: np.zeros(()))
    """The same, of features now with features before."""

    def add(self, now: Sight, before: Sight, kernel: tuple[int, ...]) -> None:
        """Count what the same weights meet for the same examples."""
        for mine, theirs in zip(
            im2col(now.inputs, now.use, kernel), im2col(before.inputs, before.use, kernel), strict=True
        ):
            if not self.count:
                check_memory(now.name, groups=mine.shape[1], features=mine.shape[2], kept=2)
            self.count += len(mine)
            self.now = self.now + mine.sum(axis=0, dtype=np.float64)
            self.before = self.before + theirs.sum(axis=0, dtype=np.float64)
            turned = np.ascontiguousarray(mine.transpose(1, 2, 0), np.float32)
            self.among = self.among + np.matmul(turned, _by_group(mine))
            self.across = self.across + np.matmul(turned, _by_group(theirs))


_WORKING_COPIES = 3
"""Of a group's Gram matrix, while it is solved for: damped, inverted, factorised."""


def check_memory(name: str, *, groups: int, features: int, kept: int) -> None:
    """Refuse a layer whose Gram matrices, features by features in float64, would not fit in memory."""
    needed = 8 * features**2 * (groups * kept + _WORKING_COPIES)
    there = available_bytes()
    if there is not None and needed > there:
        raise WorkError(
            f"{name} has {features:,} features: the products of every two of them take "
            f"{needed / 1e9:,.1f} GB of memory, and {there / 1e9:,.1f} GB are free",
            hint=f"--exclude {name}, or a strategy that needs no such products, as activation-magnitude",
        )


def available_bytes() -> int | None:
    """Memory that the system can give without swapping; None where it does not tell."""
    found = []
    for path, line in _TOLD:
        try:
            text = path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            continue
        number = re.search(line, text)
        if number is not None:
            found.append(int(number[1]) * (1024 if path.name == "meminfo" else 1))
    if len(found) == len(_TOLD):  # a container's limit less what it uses
        return min(found[0], max(found[1] - found[2], 0))
    return found[0] if found else None


_TOLD = (
    (Path("/proc/meminfo"), r"MemAvailable:\s*(\d+) kB"),
    (Path("/sys/fs/cgroup/memory.max"), r"^(\d+)$"),
    (Path("/sys/fs/cgroup/memory.current"), r"^(\d+)$"),
)


def _by_group(seen: Array) -> Array:
    return np.ascontiguousarray(seen.transpose(1, 0, 2), np.float32)
