"""Optimizers as they are written on the command line: `sgd:momentum=0.9,weight_decay=1e-4`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from prunectl.errors import UsageError
from prunectl.training.backend import GradientStatistic

DEFAULT = "adam"
DEFAULT_RATE = 1e-3


def make_optimizer(words: str, parameters: Iterable[torch.nn.Parameter], rate: float | None) -> torch.optim.Optimizer:
    """The optimizer that is meant."""
    name, _, rest = (words or DEFAULT).partition(":")
    known = {
        one.lower(): kind
        for one, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise UsageError(
            f"PyTorch has no optimizer {name}",
            did_you_mean=tuple(get_close_matches(name.lower(), known)),
            hint=f"it has {', '.join(known)}",
        )
    kind: Any = known[name.lower()]
    taken = list(inspect.signature(kind).parameters)[1:]
    found: dict[str, Any] = {"lr": DEFAULT_RATE}
    for word in filter(None, _split(rest)):
        key, sign, text = word.partition("=")
        if key not in taken or not sign:
            raise UsageError(
                f"the optimizer {name} takes no {key}",
                did_you_mean=tuple(get_close_matches(key, taken)),
                hint=f"it takes {', '.join(taken)}, as in {name}:{taken[0]}=0.01",
            )
        found[key] = _value(text)
    if rate is not None:
        found["lr"] = rate
    try:
        made: torch.optim.Optimizer = kind(list(parameters), **found)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the optimizer {name} refuses its parameters: {error}") from error
    return made


def _split(text: str) -> list[str]:
    """Split at the commas that no parentheses enclose: betas=(0.9,0.99) is one word."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            words.append("")
        else:
            words[-1] += letter
    return words


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError) as error:
        raise UsageError(f"{text!r} is no number") from error


class WeightMasks:
    """Holds some weights at zero: their gradients, their momentum, and themselves after every step."""

    def __init__(self) -> None:
        self._dropped: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def put(self, kept: Mapping[torch.nn.Parameter, torch.Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Zero what is not kept, from now on."""
        self._dropped = [(weight, ~mask.to(weight.device)) for weight, mask in kept.items()]
        self.hold()
        for weight, dropped in self._dropped:
            state: Mapping[str, Any] = optimizer.state.get(weight, {}) if optimizer is not None else {}
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    value.masked_fill_(dropped, 0)

    @torch.no_grad()
    def calm(self) -> None:
        """Zero the gradients of what is zero, so that neither momentum nor the norm that clipping uses sees them."""
        for weight, dropped in self._dropped:
            if weight.grad is not None:
                weight.grad.masked_fill_(dropped, 0)

    @torch.no_grad()
    def hold(self) -> None:
        """Zero the weights themselves: some optimizers decay towards something, or have noise of their own."""
        for weight, dropped in self._dropped:
            weight.masked_fill_(dropped, 0)


class GradientSums:
    """Adds up evidence about some weights."""

    def __init__(self) -> None:
        self.kind = GradientStatistic.NONE
        self.sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.nn.Parameter] = {}

    def begin(self, kind: GradientStatistic, weights: Mapping[str, torch.nn.Parameter]) -> None:
        """Gather about other weights from here on."""
        self.kind, self._weights = kind, dict(weights)
        self.sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    @torch.no_grad()
    def add(self, is_taken: torch.Tensor | None = None) -> None:
        """Count the gradients of a step; on the device it is told whether the step is taken, None where it always is.

        The gradients of an fp16 step that overflowed are infinite, and GradScaler skips it.
        """
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            if self.kind is GradientStatistic.GRADIENT:
                found = weight.grad
            elif self.kind is GradientStatistic.SALIENCE:
                found = (weight * weight.grad).abs()
            elif self.kind is GradientStatistic.MOVEMENT:
                found = -(weight * weight.grad)
            else:
                continue
            self.sums[name] += found if is_taken is None else torch.where(is_taken, found, torch.zeros_like(found))

    def forget(self) -> None:
        """Begin anew."""
        for total in self.sums.values():
            total.zero_()
