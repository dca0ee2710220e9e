"""Which of two epochs is better, by the numbers of its evaluation?"""

from __future__ import annotations

from collections.abc import Mapping

_HIGHER = ("acc", "auc", "precision", "recall", "f1", "iou", "top", "r2")


def judged_by(logs: Mapping[str, float]) -> str:
    """Return the number that decides: the first metric, or the loss if there is none."""
    return next((name for name in logs if name != "loss"), "loss")


def is_higher_better(name: str) -> bool:
    """Whether a larger number is a better one."""
    return any(word in name.lower() for word in _HIGHER)


def is_better(name: str, new: float, old: float | None) -> bool:
    """Whether a number is better than the best so far; what is no number never is."""
    if new != new:  # NaN  # noqa: PLR0124
        return False
    return old is None or (new > old if is_higher_better(name) else new < old)
