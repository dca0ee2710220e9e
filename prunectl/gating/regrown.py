"""Is every zero of another model still a zero?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prunectl.formats.table import open_model
from prunectl.gating.budget import Budget, Limit, Wanted
from prunectl.gating.finding import Finding
from prunectl.gating.keys import Metric
from prunectl.gating.limits import judged
from prunectl.gating.lockstep import Seen, lockstep
from prunectl.gating.measured import Measured
from prunectl.measuring.zeros import count_zeros, nonzero


def keeps_zeros(found: Measured, path: Path, budget: Budget, wanted: Wanted) -> Finding:
    """Return the verdict on the zeros of another model, in its prunable weights."""
    other = open_model(path)
    lost, first = 0, ""
    mine = {tensor.name: tensor for tensor in found.model.tensors}
    for tensor in other.tensors:
        if not tensor.is_prunable:
            continue
        here = mine.get(tensor.name)
        if here is not None and here.shape == tensor.shape:
            gone = sum(
                int(np.count_nonzero(nonzero(now) & ~nonzero(then)))
                for now, then in lockstep(Seen(found.model, here), Seen(other, tensor))
            )
            reason = f"{tensor.name} has {gone} weights that were zero"
        else:
            # Nothing can be said of its zeros, so that none of them counts as kept.
            gone = count_zeros(other, tensor)
            reason = f"{tensor.name} is not there" if here is None else f"{tensor.name} has another shape"
        if gone:
            lost, first = lost + gone, first or f"{reason}, in {wanted.value}."
    limit = Limit("keep-zeros", Metric.COUNT, wanted.line, fail=0)
    return judged(found.name, "zeros_lost", lost, limit, budget=budget.name, message=budget.message, note=first)
