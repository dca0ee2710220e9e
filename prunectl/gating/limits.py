"""Is a number within its limit?"""

from __future__ import annotations

from collections.abc import Callable

from prunectl.errors import InputError
from prunectl.gating.budget import Budget, LayerBudget, Limit
from prunectl.gating.finding import ERROR, WARNING, Finding
from prunectl.gating.keys import Metric
from prunectl.gating.measured import Measured
from prunectl.measuring.survey import LayerRow

_HAIR = 1e-12
"""2.3 % is not quite 23 / 1000 in floating point; a byte of a terabyte makes more of a difference."""

_OF_MODEL: dict[str, tuple[str, Callable[[Measured], float]]] = {
    "max-raw": ("bytes.raw", lambda found: found.raw),
    "max-gzip": ("bytes.compressed", lambda found: found.gzip),
    "max-packed": ("bytes.packed", lambda found: found.packed),
    "max-params": ("params.total", lambda found: found.facts.params.total),
    "max-flops": ("flops", lambda found: 2 * (found.operations.macs or 0)),
    "min-sparsity": ("prunable_sparsity", lambda found: found.zeros.prunable_sparsity or 0.0),
}
_OF_TENSOR: dict[str, tuple[str, Callable[[Measured, LayerRow], float]]] = {
    "max-params": ("params", lambda _, row: row.params),
    "max-flops": ("flops", lambda found, row: 2 * _macs(found, row)),
    "min-sparsity": ("sparsity", lambda found, row: found.zeros_of[row.name].sparsity or 0.0),
    "max-sparsity": ("sparsity", lambda found, row: found.zeros_of[row.name].sparsity or 0.0),
}


def of_model(found: Measured, budget: Budget, limit: Limit) -> Finding:
    """Return what a limit says of a model."""
    metric, measure = _OF_MODEL[limit.name]
    finding = judged(found.name, metric, measure(found), limit, budget=budget.name, message=budget.message)
    if limit.name == "max-flops" and finding.ok and (unknown := found.operations.macs_unknown):
        # What is known of it is within the limit; the whole may not be.
        raise InputError(f"{found.name} has {len(unknown)} operations of unknown shape, such as {unknown[0]}")
    return finding


def of_tensor(found: Measured, row: LayerRow, limit: Limit, budget: Budget, layer: LayerBudget) -> Finding:
    """Return what a limit says of a tensor."""
    metric, measure = _OF_TENSOR[limit.name]
    message = layer.message or budget.message
    actual = measure(found, row)
    return judged(found.name, metric, actual, limit, budget=budget.name, tensor=row.name, message=message)


def judged(
    model: str,
    metric: str,
    actual: float,
    limit: Limit,
    *,
    budget: str = "",
    tensor: str = "",
    message: str = "",
    note: str = "",
) -> Finding:
    """Return the verdict: of the limit that was broken, the one that says no first."""
    broken_by = (
        level
        for level, bound in ((ERROR, limit.fail), (WARNING, limit.warn))
        if bound is not None and not is_within(limit.name, actual, bound)
    )
    broken = next(broken_by, None)
    level = broken or (ERROR if limit.fail is not None else WARNING)
    bound = limit.fail if level == ERROR else limit.warn
    assert bound is not None
    return Finding(
        limit.name, metric, bound, actual, broken is None, model, level,
        unit=limit.metric, budget=budget, tensor=tensor, line=limit.line, note=note, message=message,
    )  # fmt: skip


def is_within(name: str, actual: float, bound: float) -> bool:
    """Whether a number keeps a limit; equal to it, it does."""
    hair = _HAIR if isinstance(bound, float) else 0
    return actual >= bound - hair if name.startswith("min-") else actual <= bound + hair


def all_or_none(found: Measured, name: str, metric: str, line: int, share: float, **more: str) -> Finding:
    """Return the verdict on what holds for everything, or does not."""
    limit = Limit(name, Metric.RATIO, line, fail=1.0)
    return judged(found.name, metric, share, limit, **more)


def _macs(found: Measured, row: LayerRow) -> int:
    macs = found.operations_of[row.name].macs
    if macs is None:
        raise InputError(f"{found.name} does not say in which shape {row.name} is used")
    return macs
