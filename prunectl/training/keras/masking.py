"""Masks and gradient statistics inside every optimizer step.

The optimizer's method that receives gradients is wrapped, so that masks apply to Keras' training step and to custom
ones alike. Statistics are taken from the original gradient. The gradient of masked weights is then zeroed before the
optimizer sees it, and the weights themselves afterwards, in case of weight decay, averaging, constraints or noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prunectl.formats.base import Array
from prunectl.training.backend import GradientStatistic, gradient_statistic
from prunectl.training.keras import backend
from prunectl.training.keras._compat import trained_variables
from prunectl.training.keras.backend import KerasLibrary, densify, mask_gradient


class OptimizerMasking(ABC):
    """Wraps an optimizer so that masked weights stay zero, and gradient statistics are accumulated."""

    def __init__(self, library: KerasLibrary, optimizer: Any) -> None:
        self._library = library
        self._optimizer = optimizer
        self._masks: dict[int, Any] = {}
        self._variables: dict[int, Any] = {}
        self._sums: dict[int, Any] = {}
        self._statistic = GradientStatistic.NONE
        self.has_seen_gradients = False
        """Whether the optimizer has received any gradients."""

    @abstractmethod
    def _new_variable(self, like: Any, kind: str, *, is_mask: bool) -> Any:
        """A new variable of the same shape: ones for a mask, zeros for a sum."""

    @abstractmethod
    def _where(self, mask: Any, value: Any) -> Any:
        """The value, zeroed where the mask is False."""

    @abstractmethod
    def _assign(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Zero variables where their masks are False."""

    @abstractmethod
    def _accumulate(self, total: Any, variable: Any, gradient: Any) -> None:
        """Add the gradient statistic of a step to its sum."""

    @abstractmethod
    def optimizer_slots(self, variable: Any) -> list[Any]:
        """The optimizer's slots of a variable, such as momentum."""

    def set_masks(self, masks: Iterable[tuple[Any, Array]]) -> bool:
        """Set masks; returns whether the training step must be retraced."""
        is_new = False
        for variable, mask in masks:
            key = id(variable)
            keep = np.asarray(mask, np.bool_)
            value = backend.get_value(self._library, variable)
            backend.set_value(variable, np.where(keep, value, np.zeros((), value.dtype)))
            if not self.is_trained(variable):
                continue
            if key not in self._masks:
                self._masks[key], self._variables[key] = self._new_variable(variable, "mask", is_mask=True), variable
                is_new = True
            backend.set_value(self._masks[key], keep)
            for slot in self.optimizer_slots(variable):
                slot_value = backend.get_value(self._library, slot)
                backend.set_value(slot, np.where(keep, slot_value, np.zeros((), slot_value.dtype)))
        return is_new

    @abstractmethod
    def is_trained(self, variable: Any) -> bool:
        """Whether the optimizer trains a variable."""

    def track(self, statistic: GradientStatistic, variables: Iterable[Any]) -> None:
        """Accumulate a statistic from the next step on; the training step must be retraced."""
        self._statistic = statistic
        for variable in variables:
            key = id(variable)
            if key not in self._sums and self.is_trained(variable):
                self._sums[key] = self._new_variable(variable, "evidence", is_mask=False)
        self.reset()

    def statistics(self, variables: Mapping[str, Any]) -> dict[str, Array]:
        """The accumulated statistics of tracked variables."""
        return {
            name: backend.get_value(self._library, self._sums[id(variable)])
            for name, variable in variables.items()
            if id(variable) in self._sums
        }

    def restore_statistic(self, variable: Any, total: Array) -> None:
        """Restore the sum of a variable."""
        if id(variable) in self._sums:
            backend.set_value(self._sums[id(variable)], total)

    def reset(self) -> None:
        """Set all sums to zero."""
        for total in self._sums.values():
            backend.set_value(total, np.zeros(backend.shape(total), backend.dtype(total)))

    def is_own_variable(self, variable: Any) -> bool:
        """Whether a variable of the optimizer is one of the masks or sums of this object."""
        return any(variable is own for own in (*self._masks.values(), *self._sums.values()))

    def apply_masks(self) -> None:
        """Apply the masks outside a training step."""
        self._assign([(self._variables[key], mask) for key, mask in self._masks.items()])

    def _before_update(self, gradient: Any, variable: Any) -> Any:
        """Accumulate statistics, and return the masked gradient for the optimizer."""
        if gradient is None:
            return None
        key = id(variable)
        if key in self._sums:
            self._accumulate(self._sums[key], variable, gradient)
        return self._where(self._masks[key], gradient) if key in self._masks else gradient

    def _after_update(self, variables: Iterable[Any]) -> None:
        masked = [(variable, self._masks[id(variable)]) for variable in variables if id(variable) in self._masks]
        if masked:
            self._assign(masked)


def paired_slots(optimizer: Any, index: int, count: int, shape: tuple[int, ...]) -> list[Any]:
    """The slots of a variable: from each list of the optimizer, the entry at its index, if the shapes agree."""
    slots = []
    for value in vars(optimizer).values():
        if isinstance(value, list | tuple) and len(value) == count:
            slot = value[index]
            if hasattr(slot, "assign") and backend.shape(slot) == shape and backend.is_float(slot):
                slots.append(slot)
    return slots


class TfKerasMasking(OptimizerMasking):
    """Wraps `apply_gradients`."""

    def __init__(self, library: KerasLibrary, optimizer: Any, trained: Sequence[Any]) -> None:
        super().__init__(library, optimizer)
        self._tf = library.tensorflow
        self._trained = {id(variable): variable for variable in trained}
        optimizer.build(trained)
        plain = optimizer.apply_gradients

        def apply_gradients(grads_and_vars: Iterable[tuple[Any, Any]], *args: Any, **kwargs: Any) -> Any:
            self.has_seen_gradients = True
            pairs = [(gradient, variable) for gradient, variable in grads_and_vars if id(variable) in self._trained]
            if self._is_distributed() and not kwargs.get("skip_gradients_aggregation"):
                # Statistics and masks apply to the aggregated gradient of all processes.
                pairs, kwargs["skip_gradients_aggregation"] = list(optimizer.aggregate_gradients(pairs)), True
            result = plain(
                [(self._before_update(gradient, variable), variable) for gradient, variable in pairs], *args, **kwargs
            )
            self._after_update([variable for _, variable in pairs])
            return result

        optimizer.apply_gradients = apply_gradients

    def is_trained(self, variable: Any) -> bool:
        """Whether the optimizer trains a variable."""
        return id(variable) in self._trained

    def optimizer_slots(self, variable: Any) -> list[Any]:
        """The optimizer's slots of a variable, such as momentum."""
        index = list(self._trained).index(id(variable))
        return paired_slots(self._optimizer, index, len(self._trained), backend.shape(variable))

    def _is_distributed(self) -> bool:
        return int(self._tf.distribute.get_strategy().num_replicas_in_sync) > 1

    def _new_variable(self, like: Any, kind: str, *, is_mask: bool) -> Any:
        tf = self._tf
        shape, dtype = backend.shape(like), tf.bool if is_mask else tf.float32
        return tf.Variable(
            tf.ones(shape, dtype) if is_mask else tf.zeros(shape, dtype),
            trainable=False,
            name=f"prunectl_{kind}",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def _where(self, mask: Any, value: Any) -> Any:
        return mask_gradient(self._tf, mask, value)

    def _assign(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        tf = self._tf

        def everywhere(strategy: Any, variables: Sequence[Any], masks: Sequence[Any]) -> None:
            for variable, mask in zip(variables, masks, strict=True):
                strategy.extended.update(variable, _zeroed, args=(mask,), group=False)

        def _zeroed(variable: Any, mask: Any) -> Any:
            return variable.assign(tf.where(mask, variable, tf.zeros_like(variable)))

        if not self._is_distributed():
            for variable, mask in pairs:
                _zeroed(variable, mask)
            return
        variables, masks = [variable for variable, _ in pairs], [mask for _, mask in pairs]
        if tf.distribute.in_cross_replica_context():
            everywhere(tf.distribute.get_strategy(), variables, masks)
        else:
            tf.distribute.get_replica_context().merge_call(everywhere, args=(variables, masks))

    def _accumulate(self, total: Any, variable: Any, gradient: Any) -> None:
        tf = self._tf
        dense, weight = tf.cast(densify(tf, gradient), tf.float32), tf.cast(tf.convert_to_tensor(variable), tf.float32)
        added = gradient_statistic(self._statistic, weight, dense)
        if self._is_distributed():
            tf.distribute.get_replica_context().merge_call(
                lambda strategy, mirrored, addend: strategy.extended.update(
                    mirrored, lambda replica, value: replica.assign_add(value), args=(addend,), group=False
                ),
                args=(total, added),
            )
        else:
            total.assign_add(added)


class Keras3Masking(OptimizerMasking):
    """Wraps `apply`; masks and sums are variables of the optimizer, as JAX steps can update no others."""

    def __init__(self, library: KerasLibrary, optimizer: Any) -> None:
        super().__init__(library, optimizer)
        plain = optimizer.apply

        def apply(grads: Sequence[Any], trainable_variables: Any = None) -> None:
            self.has_seen_gradients = True
            trained = trained_variables(optimizer) if trainable_variables is None else list(trainable_variables)
            masked = [
                self._before_update(gradient, variable) for gradient, variable in zip(grads, trained, strict=True)
            ]
            plain(masked, None if trainable_variables is None else trained)
            self._after_update(trained)

        optimizer.apply = apply

    def is_trained(self, variable: Any) -> bool:
        """Whether the optimizer trains a variable."""
        return any(variable is own for own in trained_variables(self._optimizer))

    def optimizer_slots(self, variable: Any) -> list[Any]:
        """The optimizer's slots of a variable, such as momentum."""
        trained = trained_variables(self._optimizer)
        index = next(index for index, slot in enumerate(trained) if slot is variable)
        slots = paired_slots(self._optimizer, index, len(trained), backend.shape(variable))
        return [slot for slot in slots if slot is not variable and not self.is_own_variable(slot)]

    def _new_variable(self, like: Any, kind: str, *, is_mask: bool) -> Any:
        return self._optimizer.add_variable(
            shape=backend.shape(like),
            initializer="ones" if is_mask else "zeros",
            dtype="bool" if is_mask else "float32",
            name=f"prunectl_{kind}",
        )

    def _where(self, mask: Any, value: Any) -> Any:
        if self._library.is_on_tensorflow:
            return mask_gradient(self._library.tensorflow, mask.value, value)
        ops = self._library.keras.ops
        return ops.where(mask.value, value, ops.zeros_like(value))

    def _assign(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        ops = self._library.keras.ops
        for variable, mask in pairs:
            variable.assign(ops.where(mask.value, variable.value, ops.zeros_like(variable.value)))

    def _accumulate(self, total: Any, variable: Any, gradient: Any) -> None:
        ops = self._library.keras.ops
        if self._library.is_on_tensorflow:
            gradient = densify(self._library.tensorflow, gradient)
        dense, weight = ops.cast(gradient, "float32"), ops.cast(variable.value, "float32")
        total.assign_add(gradient_statistic(self._statistic, weight, dense))
