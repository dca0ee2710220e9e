"""How far may a result be from its source? What has fewer bits is judged by what counts, and not number by number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.exporting.request import Request
from prunectl.formats.base import Array


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a result may be from its source."""

    atol: float = 0.0
    rtol: float = 0.0
    share: float = 0.0
    """Of the largest number in the same output, for formats that round."""
    noise: float | None = None
    """Of all numbers of an output together, judged in place of one by one."""
    top1: float | None = None
    """Share of the examples whose largest answer has to be the same one, judged where that is known."""

    def allowed(self, expected: Array) -> Array:
        """Return how far each number may be away."""
        with np.errstate(invalid="ignore"):
            largest = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
            found: Array = np.maximum(self.atol + self.rtol * np.abs(expected), self.share * largest)
        return found


EXACT = Tolerance(1e-4, 1e-4)
HALF = Tolerance(1e-4, 1e-2, 1e-2)
BFLOAT16 = Tolerance(1e-4, 1e-2, 4e-2)
"""Its rounding is eight times that of 16-bit floats, but of weights alone: what is summed up stays in 32 bits."""
INTEGERS = Tolerance(noise=0.05, top1=0.98)
"""5 % is 26 decibels of signal over noise. Small networks of every kind, by every converter, come to 0.2 to 2 %, and
on the digits to 99.2 to 100 % of top-1."""


def tolerance_of(request: Request) -> Tolerance:
    """Return what the user says, and else what the bits of the result let expect."""
    usual = HALF if request.is_half else BFLOAT16 if request.is_bf16 else INTEGERS if request.is_int8 else EXACT
    if request.atol is None and request.rtol is None:
        return usual
    atol = usual.atol if request.atol is None else request.atol
    return Tolerance(atol, usual.rtol if request.rtol is None else request.rtol)
