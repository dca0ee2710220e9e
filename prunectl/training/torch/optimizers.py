"""Optimizers by name, weight masks that hold through their steps, and gradient statistics."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from prunectl.training.backend import GradientStatistic, gradient_statistic
from prunectl.training.request import parse_optimizer

DEFAULT_RATE = 1e-3
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers with as many bytes as a floating-point number."""
_MOST_BYTES = 1 << 28
"""The memory that masks may take for speed: they are as large as the weights, but booleans are a byte for each."""


def make_optimizer(
    text: str, parameters: Iterable[torch.nn.Parameter], rate: float | None, *, may_fuse: bool = False
) -> torch.optim.Optimizer:
    """The optimizer in the text of an option; bit-identical to PyTorch's default unless it may use a fused kernel."""
    spec = parse_optimizer(text)
    classes = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    cls, settings = spec.resolve(classes, lambda cls: list(inspect.signature(cls).parameters)[1:], "lr")
    rate = settings.pop("lr", DEFAULT_RATE) if rate is None else rate
    weights = list(parameters)
    # One kernel instead of one operation after another saves a tenth of the time of a small transformer on a CPU.
    is_fused = may_fuse and cls is torch.optim.Adam and all(w.is_cpu and w.is_floating_point() for w in weights)
    optimizer: torch.optim.Optimizer = spec.construct(
        cls, weights, **{**({"fused": True} if is_fused else {}), **settings, "lr": rate}
    )
    return optimizer


class WeightMasks:
    """Holds some weights at zero: their gradients, their momentum, and themselves after every step."""

    def __init__(self) -> None:
        self._held: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def hold(self, kept: Mapping[torch.nn.Parameter, torch.Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Hold the weights that the masks do not keep at zero from now on, and zero their optimizer state."""
        is_fast = sum(weight.nbytes for weight in kept) <= _MOST_BYTES
        self._held = [
            (weight, _zeroing_mask(weight, mask.to(weight.device), is_fast=is_fast)) for weight, mask in kept.items()
        ]
        self.zero_weights()
        for weight, mask in self._held:
            state: Mapping[str, Any] = optimizer.state.get(weight, {}) if optimizer is not None else {}
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    _zero(value, mask)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Zero the gradients of pruned weights, so that they add nothing to momentum or to the norm for clipping."""
        for weight, mask in self._held:
            if weight.grad is not None and weight.grad.is_sparse:
                weight.grad = weight.grad.coalesce()
                _zero(weight.grad.values(), mask[tuple(weight.grad.indices())])
            elif weight.grad is not None:
                _zero(weight.grad, mask)

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Zero the pruned weights: some optimizers change a weight without a gradient, by decay or noise."""
        for weight, mask in self._held:
            _zero(weight, mask)


def _zeroing_mask(weight: torch.nn.Parameter, kept: torch.Tensor, *, is_fast: bool) -> torch.Tensor:
    """The mask for `_zero`: on a CPU, integers whose bits are all 1 where a weight is kept; elsewhere, booleans."""
    if not is_fast or type(weight.data) is not torch.Tensor or not weight.is_cpu or weight.itemsize not in _BITS:
        return ~kept
    return torch.zeros_like(weight, dtype=_BITS[weight.itemsize]).masked_fill_(kept, -1)


def _zero(values: torch.Tensor, mask: torch.Tensor) -> None:
    """Set pruned values to +0, even if they are NaN; a CPU takes a tenth of the time of `masked_fill_` for bits."""
    if mask.dtype is torch.bool or values.itemsize != mask.itemsize:
        values.masked_fill_(mask if mask.dtype is torch.bool else mask == 0, 0)
    else:
        values.view(mask.dtype).bitwise_and_(mask)


class GradientSums:
    """Accumulates a gradient statistic of some weights."""

    def __init__(self) -> None:
        self.kind = GradientStatistic.NONE
        self.sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.nn.Parameter] = {}

    def begin(self, kind: GradientStatistic, weights: Mapping[str, torch.nn.Parameter]) -> None:
        """Start sums of zero for these weights."""
        self.kind, self._weights = kind, dict(weights)
        self.sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    @torch.no_grad()
    def add(self, is_taken: torch.Tensor | None = None) -> None:
        """Add the gradients of a step; nothing if `is_taken` is a false tensor.

        Gradients of an fp16 step that overflowed are infinite, and GradScaler skips the step.
        """
        for name, weight in self._weights.items():
            if weight.grad is not None:
                addend = gradient_statistic(self.kind, weight, weight.grad)
                self.sums[name] += (
                    addend if is_taken is None else torch.where(is_taken, addend, torch.zeros_like(addend))
                )

    def reset(self) -> None:
        """Set all sums to zero."""
        for total in self.sums.values():
            total.zero_()
