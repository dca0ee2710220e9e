"""Numbers to judge by, added up on the device so that no step waits for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from prunectl.errors import PrunectlError, first_line
from prunectl.plugins import find
from prunectl.training.judging.fitting import unfitting
from prunectl.training.torch.losses import LOSSES, Chosen

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From outputs and targets to the mean over the examples."""


def _accuracy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if out.ndim == 3 and y.ndim == 2 and y.shape == out.shape[:2]:
        return (out.argmax(-1) == y).float().mean()
    return (out.argmax(1) == _labels(out, y)).float().mean()


def _top5(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    best = out.topk(min(5, out.shape[1]), 1).indices
    return (best == _labels(out, y).unsqueeze(1)).any(1).float().mean()


def _labels(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the number of the class of each example, which may be said as one-hot."""
    if y.shape == out.shape and y.ndim > 1:
        return y.argmax(1)
    if y.is_floating_point() and not bool((y == y.round()).all()):
        raise ValueError("the targets are no labels")
    return y.reshape(out.shape[0], *out.shape[2:])


METRICS: Mapping[str, Metric] = {
    "accuracy": _accuracy,
    "top5": _top5,
    "mae": lambda out, y: (out - y.reshape(out.shape)).abs().mean(),
    "mse": lambda out, y: (out - y.reshape(out.shape)).square().mean(),
}


def _of_logits(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((out > 0) == (y.reshape(out.shape) > 0.5)).float().mean()


def _of_shares(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((out > 0.5) == (y.reshape(out.shape) > 0.5)).float().mean()


def choose(names: tuple[str, ...], chosen: Chosen, out: torch.Tensor, y: torch.Tensor | None) -> dict[str, Metric]:
    """Return metrics by name; without names, the one that people judge such outputs and targets by."""
    found: dict[str, Any] = {name: find("metric", name, METRICS) for name in names or _usual(chosen, out, y)}
    if chosen.is_binary and "accuracy" in found:
        found["accuracy"] = _of_logits if chosen.name == "bce" else _of_shares
    return {name: _fitting(name, metric) for name, metric in found.items()}


def _usual(chosen: Chosen, out: torch.Tensor, y: torch.Tensor | None) -> tuple[str, ...]:
    if chosen.classifies or chosen.is_binary:
        return ("accuracy",)
    if y is None:
        return ()
    is_label = not y.is_floating_point()
    if is_label and out.ndim >= 2 and out.shape[1] > 1 and y.numel() * out.shape[1] == out.numel():
        return ("accuracy",)
    if is_label and out.ndim == 3 and y.shape == out.shape[:2]:
        return ("accuracy",)
    return ("mae",) if y.numel() == out.numel() and not (is_label and chosen.name not in LOSSES) else ()


def _fitting(name: str, metric: Metric) -> Metric:
    """Return a metric that says so where it cannot compare outputs with targets."""

    def measure(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        try:
            return _one(torch.as_tensor(metric(out, y)))
        except PrunectlError:
            raise
        except Exception as error:
            raise unfitting(name, out.shape, y.shape, first_line(error)) from error

    return measure


def _one(found: torch.Tensor) -> torch.Tensor:
    if found.numel() != 1:
        raise ValueError(f"it returns {found.numel()} numbers, and one is due")
    return found.reshape(())


def _wide(found: torch.Tensor) -> torch.Tensor:
    """A number in double precision, where its device has that: Apple's GPUs have not."""
    return found.float() if found.device.type == "mps" else found.double()


class Means:
    """Means over examples, kept as sums."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, count: int, **means: torch.Tensor) -> None:
        """Count some examples with their means."""
        self._count += count
        for name, mean in means.items():
            value = _wide(mean.detach()) * count
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self) -> dict[str, float]:
        """Return the means, over all processes, and begin anew."""
        if not self._count:
            return {}
        names = list(self._sums)
        sums = torch.stack([*(self._sums[name] for name in names), self._sums[names[0]].new_tensor(self._count)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self._sums, self._count = {}, 0
        values = sums.tolist()
        return {name: value / values[-1] for name, value in zip(names, values[:-1], strict=True)}
