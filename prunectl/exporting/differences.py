"""How far is one output from another, and is that too far?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.errors import WorkError
from prunectl.exporting.tolerances import Tolerance
from prunectl.formats.base import Array

FEW = 50
"""Of fewer examples one alone is more than the share whose largest answer may be another."""


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far one output is from that of the source."""

    name: str
    largest: float
    mean: float
    noise: float
    """Root of the mean square of the differences, as a share of that of the output."""


def difference(name: str, expected: Array, answered: Array) -> OutputDifference:
    """Return how far numbers are from those of the source."""
    apart = _apart(expected, answered)
    mean = float(apart.mean()) if apart.size else 0.0
    return OutputDifference(name, float(apart.max(initial=0.0)), mean, _noise(expected, apart))


def _apart(expected: Array, answered: Array) -> Array:
    with np.errstate(invalid="ignore"):
        apart = np.abs(expected - answered)
    is_same = (expected == answered) | (np.isnan(expected) & np.isnan(answered))
    found: Array = np.where(is_same, 0.0, apart)
    return found


def _noise(expected: Array, apart: Array) -> float:
    """Return the root of the mean square of differences, as a share of that of the numbers; NaN is beyond all."""
    with np.errstate(all="ignore"):
        finite = expected[np.isfinite(expected)]
        whole, wrong = float(np.square(finite).sum()), float(np.square(apart).sum())
    if wrong == 0.0:
        return 0.0
    return float(np.sqrt(wrong / whole)) if whole > 0.0 and np.isfinite(wrong) else float("inf")


def check_each(name: str, expected: Array, answered: Array, tolerance: Tolerance) -> None:
    """Refuse a number that is too far away."""
    apart = _apart(expected, answered)
    # A NaN beside a number is within no tolerance.
    wrong = np.flatnonzero(~((apart == 0.0) | (apart <= tolerance.allowed(expected))))
    if wrong.size:
        first = int(wrong[0])
        raise WorkError(
            f"the output {name} differs: {answered[first]:.6g} and not {expected[first]:.6g} as in the source, "
            f"in {wrong.size:,} of {apart.size:,} numbers, by {np.nanmax(apart):.3g} at most; nothing was written",
            hint="--atol and --rtol say how far two numbers may be apart",
        )


def check_noise(found: OutputDifference, limit: float) -> None:
    """Refuse an output that is too far away as a whole."""
    if not found.noise <= limit:
        raise WorkError(
            f"the output {found.name} differs by {found.noise:.1%} of its size (root mean square), and "
            f"{limit:.0%} would do; nothing was written",
            hint="examples of the kind it is made for may help: --data SPEC; else --atol and --rtol say what will do",
        )


def check_top1(same: float, examples: int, least: float) -> None:
    """Refuse too many examples whose largest answer is another one."""
    # One of few may lie between two answers; how far all numbers are away is judged as well then.
    wrong = round((1 - same) * examples)
    if wrong > max(int(examples < FEW), int((1 - least) * examples)):
        raise WorkError(
            f"the largest answer is the same one for {same:.1%} of {examples:,} examples, and {least:.0%} would do; "
            "nothing was written",
            hint="more examples may help: --samples N; else --atol and --rtol say what will do",
        )
