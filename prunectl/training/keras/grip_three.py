"""Holding weights in Keras 3, on any backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunectl.training.evidence import Evidence
from prunectl.training.keras import numbers
from prunectl.training.keras.grip import Grip, paired_slots
from prunectl.training.keras.library import Library
from prunectl.training.keras.sparse import dense, where_kept


class GripThree(Grip):
    """Wraps `apply`; masks and sums are variables of the optimizer, since JAX knows no others inside of a step."""

    def __init__(self, library: Library, optimizer: Any) -> None:
        super().__init__(library, optimizer)
        plain = optimizer.apply

        def apply(grads: Sequence[Any], trainable_variables: Any = None) -> None:
            self.has_seen_gradients = True
            moved = list(optimizer._trainable_variables if trainable_variables is None else trainable_variables)  # noqa: SLF001
            seen = [self._before(gradient, one) for gradient, one in zip(grads, moved, strict=True)]
            plain(seen, None if trainable_variables is None else moved)
            self._after(moved)

        optimizer.apply = apply

    def is_moved(self, variable: Any) -> bool:
        """Whether the optimizer moves a variable."""
        return any(variable is one for one in self._optimizer._trainable_variables)  # noqa: SLF001

    def slots(self, variable: Any) -> list[Any]:
        """Return what the optimizer keeps for a variable, number by number."""
        moved = self._optimizer._trainable_variables  # noqa: SLF001
        at = next(at for at, one in enumerate(moved) if one is variable)
        own = paired_slots(self._optimizer, at, len(moved), numbers.shape(variable))
        return [one for one in own if one is not variable and not self.owns(one)]

    def _extra(self, like: Any, kind: str, *, is_mask: bool) -> Any:
        return self._optimizer.add_variable(
            shape=numbers.shape(like),
            initializer="ones" if is_mask else "zeros",
            dtype="bool" if is_mask else "float32",
            name=f"prunectl_{kind}",
        )

    def _where(self, mask: Any, value: Any) -> Any:
        if self._library.is_on_tensorflow:
            return where_kept(self._library.tensorflow, mask.value, value)
        ops = self._library.keras.ops
        return ops.where(mask.value, value, ops.zeros_like(value))

    def _assign(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        ops = self._library.keras.ops
        for variable, mask in pairs:
            variable.assign(ops.where(mask.value, variable.value, ops.zeros_like(variable.value)))

    def _gather(self, total: Any, variable: Any, gradient: Any) -> None:
        ops = self._library.keras.ops
        if self._library.is_on_tensorflow:
            gradient = dense(self._library.tensorflow, gradient)
        slope, weight = ops.cast(gradient, "float32"), ops.cast(variable.value, "float32")
        added = {
            Evidence.GRADIENT: lambda: slope,
            Evidence.SALIENCE: lambda: ops.abs(weight * slope),
            Evidence.MOVEMENT: lambda: -weight * slope,
        }[self._evidence]()
        total.assign_add(added)
