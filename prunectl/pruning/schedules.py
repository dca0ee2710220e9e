"""Sparsity schedules: how sparse a model is at a training step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

from prunectl.errors import UsageError, WorkError
from prunectl.plugins import find
from prunectl.pruning.strategies import bind_params

Curve = Callable[..., float]
"""From the progress (0 to 1), the initial and the final sparsity to the sparsity; other arguments are parameters."""


def constant(_done: float, _initial: float, final: float) -> float:
    """Prune to the final sparsity at once, at --begin.

    >>> constant(0.1, 0.0, 0.8)
    0.8
    """
    return final


def polynomial(done: float, initial: float, final: float, *, power: float = 3.0) -> float:
    """Rise fast, then slowly: ``final + (initial - final) * (1 - done) ** power`` (Zhu & Gupta 2017).

    >>> round(polynomial(0.5, 0.0, 0.8), 12)
    0.7
    """
    return final + (initial - final) * math.pow(1.0 - done, power)


def linear(done: float, initial: float, final: float) -> float:
    """Rise in a straight line.

    >>> linear(0.5, 0.0, 0.8)
    0.4
    """
    return initial + (final - initial) * done


def cosine(done: float, initial: float, final: float) -> float:
    """Rise along half a cosine: slowly, fast, slowly.

    >>> round(cosine(0.5, 0.0, 0.8), 12)
    0.4
    """
    return final + (initial - final) * (1.0 + math.cos(math.pi * done)) / 2.0


def exponential(done: float, initial: float, final: float) -> float:
    """Prune the same share of kept weights each time: ``1 - (1 - initial) * ((1 - final) / (1 - initial)) ** done``.

    >>> round(exponential(0.5, 0.0, 0.75), 12)
    0.5
    """
    if initial >= 1.0:
        return final
    return 1.0 - (1.0 - initial) * math.pow((1.0 - final) / (1.0 - initial), done)


def step(done: float, initial: float, final: float, *, stairs: int = 4) -> float:
    """Rise in equal stairs, the first at --begin (stairs=4).

    >>> [step(done, 0.0, 0.8) for done in (0.0, 0.25, 0.5, 0.75)]
    [0.2, 0.4, 0.6000000000000001, 0.8]
    """
    climbed = min(math.floor(done * stairs + 1e-9) + 1, stairs)
    return final if climbed == stairs else initial + (final - initial) * climbed / stairs


def one_cycle(done: float, initial: float, final: float, *, alpha: float = 14.0, beta: float = 5.0) -> float:
    """Rise along a logistic curve, as in one-cycle pruning (Hubens et al. 2021).

    >>> one_cycle(1.0, 0.0, 0.8)
    0.8
    """

    def logistic(x: float) -> float:
        return 1.0 / (1.0 + math.exp(beta - alpha * x))

    # The published curve begins slightly above the initial sparsity; scaled, it begins exactly there.
    share = (logistic(done) - logistic(0.0)) / (logistic(1.0) - logistic(0.0))
    return initial + (final - initial) * share


CURVES: Mapping[str, Curve] = {
    "constant": constant,
    "polynomial": polynomial,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "step": step,
    "one-cycle": one_cycle,
}


def line_of(curve: Curve) -> str:
    """The summary of a curve: the first line of its docstring."""
    return (curve.__doc__ or "").partition("\n")[0].replace("``", "")


class Schedule(Protocol):
    """The interface for training loops; a step is a batch, and the first step is 0."""

    @property
    def final(self) -> float:
        """The sparsity at the end."""

    @property
    def last_update_step(self) -> int:
        """The step from which on the final sparsity holds."""

    def sparsity_at(self, step: int) -> float:
        """The sparsity at a step."""

    def prunes_at(self, step: int) -> bool:
        """Whether a step is a pruning step, at which masks change."""


@dataclass(frozen=True, slots=True)
class SparsitySchedule:
    """Rise from one sparsity to another along a curve, given by its name so that the schedule can be saved."""

    curve: str
    final: float
    begin: int = 0
    end: int | None = None
    """The step at which the final sparsity is reached; None for no end, which only `constant` may have."""
    initial: float = 0.0
    frequency: int = 100
    params: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, ratio in (("sparsity", self.final), ("initial sparsity", self.initial)):
            if not 0.0 <= ratio <= 1.0:
                raise UsageError(f"the {name} must be from 0 to 1, not {ratio:g}", hint="write 0.8 or 80%")
        if self.begin < 0 or (self.end is not None and self.end < self.begin):
            raise UsageError(f"a schedule cannot run from step {self.begin} to step {self.end}")
        if self.frequency < 1:
            raise UsageError("--frequency is the number of steps between pruning steps and must be at least 1")
        if self.end is None and self.curve != "constant":
            raise UsageError(f"the schedule {self.curve} needs an end", hint="add --end 80%")
        self._evaluate(0.0)

    def _evaluate(self, done: float) -> float:
        try:
            return float(_curve(self.curve, self.params)(done, self.initial, self.final))
        except (ArithmeticError, TypeError, ValueError) as error:
            raise WorkError(f"the schedule {self.curve} raised {type(error).__name__}: {error}") from error

    @property
    def last_update_step(self) -> int:
        """The step from which on the final sparsity holds."""
        return self.begin if self.end is None else self.end

    def sparsity_at(self, step: int) -> float:
        """The sparsity at a step; constant before `begin` and after `end`."""
        length = (self.end or 0) - self.begin
        done = min(max((step - self.begin) / length, 0.0), 1.0) if length > 0 else float(step >= self.begin)
        sparsity = self._evaluate(done)
        if not 0.0 <= sparsity <= 1.0:
            raise WorkError(
                f"the schedule {self.curve} returned a sparsity of {sparsity:g} at step {step}; it must be from 0 to 1"
            )
        return sparsity

    def prunes_at(self, step: int) -> bool:
        """Whether masks change at a step: every `frequency` steps from `begin`, as in tfmot."""
        if step < self.begin or (self.end is not None and step > self.end):
            return False
        return (step - self.begin) % self.frequency == 0


@dataclass(frozen=True, slots=True)
class ChainedSchedule:
    """Follow one schedule until a step, then another that starts counting from zero."""

    first: Schedule
    switch_step: int
    second: Schedule

    @property
    def final(self) -> float:
        """The sparsity at the end of the second."""
        return self.second.final

    @property
    def last_update_step(self) -> int:
        """The last pruning step of the second."""
        return self.switch_step + self.second.last_update_step

    def sparsity_at(self, step: int) -> float:
        """The sparsity of the schedule that holds at the step."""
        return (
            self.first.sparsity_at(step)
            if step < self.switch_step
            else self.second.sparsity_at(step - self.switch_step)
        )

    def prunes_at(self, step: int) -> bool:
        """Whether the schedule that holds at the step prunes at it."""
        return self.first.prunes_at(step) if step < self.switch_step else self.second.prunes_at(step - self.switch_step)


@cache
def _curve(name: str, params: tuple[str, ...]) -> Callable[..., Any]:
    """The curve with a name, and its parameters bound."""
    curve: Any = find("schedule", name, CURVES)
    if not callable(curve):
        raise UsageError(f"{name} is not a function of progress (0 to 1), initial and final sparsity")
    try:
        inspect.signature(curve).bind_partial(0.0, 0.0, 0.0)
    except TypeError as error:
        raise UsageError(
            f"the schedule {name} cannot be called with three numbers: {error}",
            hint="it takes (done, initial, final), where done goes from 0 to 1, and returns the sparsity",
        ) from error
    # `bind_params` skips the first argument of a function, but a curve has three that are not parameters.
    return partial(curve, **bind_params(params, partial(curve, 0.0, 0.0)))
