"""Pictures of the schedules that are built in: from dense to 80 % zeros."""

from __future__ import annotations

from prunectl.pruning.curves import CURVES
from prunectl.pruning.schedules import Ramp
from prunectl.reporting.curve_plot import as_svg

_STEPS = 200
_FINAL = 0.8


def curves() -> dict[str, list[float]]:
    """Return the sparsity at every step, by schedule."""
    ramps = {name: Ramp(name, _FINAL, 0, _STEPS) for name in CURVES}
    return {name: [ramp.sparsity_at(step) for step in range(_STEPS + 1)] for name, ramp in ramps.items()}


def svg() -> str:
    """Return one picture of all of them."""
    return as_svg(curves(), across="steps from --begin to --end", up="sparsity")
