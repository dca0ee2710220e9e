"""A metric that says nothing of these outputs and targets."""

from __future__ import annotations

from collections.abc import Sequence

from prunectl.errors import UsageError


def unfitting(metric: str, outputs: Sequence[int], targets: Sequence[int], why: str = "") -> UsageError:
    """Return what to say of a metric that cannot compare outputs with targets of such shapes."""
    shapes = f"outputs of {_shown(outputs)} and targets of {_shown(targets)} for each example"
    return UsageError(
        f"the metric {metric} does not fit {shapes}{f': {why}' if why else ''}",
        hint="--metric accuracy for labels, mae or mse where targets are as wide as outputs; or other targets",
    )


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[1:])) or "one number"
