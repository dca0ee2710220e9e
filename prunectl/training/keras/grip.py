"""What is done to gradients and weights inside of every step: masks, evidence, frozen weights.

The optimizer's own function that takes gradients is wrapped, so that whatever trains through it, Keras' training step
or one of the model's own, is held: evidence is taken from the gradient as it comes, the gradient of what is masked is
zeroed before the optimizer sees it, and what is masked is zeroed after it, whatever decay, averages, constraints or
noise it has put there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prunectl.training.evidence import Evidence
from prunectl.training.keras import numbers
from prunectl.training.keras.library import Library
from prunectl.training.network import Array


class Grip(ABC):
    """Holds the weights of a model while an optimizer moves them."""

    def __init__(self, library: Library, optimizer: Any) -> None:
        self._library = library
        self._optimizer = optimizer
        self._masks: dict[int, Any] = {}
        self._variables: dict[int, Any] = {}
        self._sums: dict[int, Any] = {}
        self._evidence = Evidence.NONE
        self.has_seen_gradients = False
        """Whether any step has gone through the optimizer."""

    @abstractmethod
    def _extra(self, like: Any, kind: str, *, is_mask: bool) -> Any:
        """Return a new variable of the same shape: ones for a mask, zeros for a sum."""

    @abstractmethod
    def _where(self, mask: Any, value: Any) -> Any:
        """Return a value where a mask keeps it, and zero elsewhere."""

    @abstractmethod
    def _assign(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Zero variables where their masks do not keep them."""

    @abstractmethod
    def _gather(self, total: Any, variable: Any, gradient: Any) -> None:
        """Add the evidence of a step to a sum."""

    @abstractmethod
    def slots(self, variable: Any) -> list[Any]:
        """Return what the optimizer keeps for a variable, number by number."""

    def hold(self, masks: Iterable[tuple[Any, Array]]) -> bool:
        """Put masks on, and return whether the training step has to be traced anew for them."""
        is_new = False
        for variable, mask in masks:
            key = id(variable)
            keep = np.asarray(mask, np.bool_)
            value = numbers.read(self._library, variable)
            numbers.write(self._library, variable, np.where(keep, value, np.zeros((), value.dtype)))
            if not self.is_moved(variable):
                continue
            if key not in self._masks:
                self._masks[key], self._variables[key] = self._extra(variable, "mask", is_mask=True), variable
                is_new = True
            numbers.write(self._library, self._masks[key], keep)
            for slot in self.slots(variable):
                kept = numbers.read(self._library, slot)
                numbers.write(self._library, slot, np.where(keep, kept, np.zeros((), kept.dtype)))
        return is_new

    @abstractmethod
    def is_moved(self, variable: Any) -> bool:
        """Whether the optimizer moves a variable."""

    def watch(self, evidence: Evidence, variables: Iterable[Any]) -> None:
        """Gather evidence from the next step on; the training step has to be traced anew."""
        self._evidence = evidence
        for variable in variables:
            key = id(variable)
            if key not in self._sums and self.is_moved(variable):
                self._sums[key] = self._extra(variable, "evidence", is_mask=False)
        self.forget()

    def evidence(self, variables: Mapping[str, Any]) -> dict[str, Array]:
        """Return what was gathered, of those that are watched."""
        return {
            name: numbers.read(self._library, self._sums[id(variable)])
            for name, variable in variables.items()
            if id(variable) in self._sums
        }

    def remember(self, variable: Any, total: Array) -> None:
        """Take up a sum that was kept."""
        if id(variable) in self._sums:
            numbers.write(self._library, self._sums[id(variable)], total)

    def forget(self) -> None:
        """Begin all sums anew."""
        for total in self._sums.values():
            numbers.write(self._library, total, np.zeros(numbers.shape(total), numbers.dtype(total)))

    def owns(self, variable: Any) -> bool:
        """Whether a variable of the optimizer is one of these masks and sums."""
        return any(variable is one for one in (*self._masks.values(), *self._sums.values()))

    def enforce(self) -> None:
        """Zero what is masked from outside of the training step."""
        self._assign([(self._variables[key], mask) for key, mask in self._masks.items()])

    def _before(self, gradient: Any, variable: Any) -> Any:
        """Return the gradient that the optimizer is to see."""
        if gradient is None:
            return None
        key = id(variable)
        if key in self._sums:
            self._gather(self._sums[key], variable, gradient)
        return self._where(self._masks[key], gradient) if key in self._masks else gradient

    def _after(self, variables: Iterable[Any]) -> None:
        held = [(variable, self._masks[id(variable)]) for variable in variables if id(variable) in self._masks]
        if held:
            self._assign(held)


def paired_slots(optimizer: Any, at: int, count: int, shape: tuple[int, ...]) -> list[Any]:
    """Return what stands at the place of a variable in each of the lists that an optimizer keeps, if it fits."""
    found = []
    for value in vars(optimizer).values():
        if isinstance(value, list | tuple) and len(value) == count:
            slot = value[at]
            if hasattr(slot, "assign") and numbers.shape(slot) == shape and numbers.is_float(slot):
                found.append(slot)
    return found
