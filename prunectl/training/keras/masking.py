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

from prunectl.training.backend import Array, Evidence
from prunectl.training.keras import backend
from prunectl.training.keras.backend import Library, dense, where_kept


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
        """A new variable of the same shape: ones for a mask, zeros for a sum."""

    @abstractmethod
    def _where(self, mask: Any, value: Any) -> Any:
        """A value where a mask keeps it, and zero elsewhere."""

    @abstractmethod
    def _assign(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Zero variables where their masks do not keep them."""

    @abstractmethod
    def _gather(self, total: Any, variable: Any, gradient: Any) -> None:
        """Add the evidence of a step to a sum."""

    @abstractmethod
    def slots(self, variable: Any) -> list[Any]:
        """What the optimizer keeps for a variable, number by number."""

    def hold(self, masks: Iterable[tuple[Any, Array]]) -> bool:
        """Put masks on, and return whether the training step has to be traced anew for them."""
        is_new = False
        for variable, mask in masks:
            key = id(variable)
            keep = np.asarray(mask, np.bool_)
            value = backend.read(self._library, variable)
            backend.write(self._library, variable, np.where(keep, value, np.zeros((), value.dtype)))
            if not self.is_moved(variable):
                continue
            if key not in self._masks:
                self._masks[key], self._variables[key] = self._extra(variable, "mask", is_mask=True), variable
                is_new = True
            backend.write(self._library, self._masks[key], keep)
            for slot in self.slots(variable):
                kept = backend.read(self._library, slot)
                backend.write(self._library, slot, np.where(keep, kept, np.zeros((), kept.dtype)))
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
        """What was gathered, of those that are watched."""
        return {
            name: backend.read(self._library, self._sums[id(variable)])
            for name, variable in variables.items()
            if id(variable) in self._sums
        }

    def remember(self, variable: Any, total: Array) -> None:
        """Take up a sum that was kept."""
        if id(variable) in self._sums:
            backend.write(self._library, self._sums[id(variable)], total)

    def forget(self) -> None:
        """Begin all sums anew."""
        for total in self._sums.values():
            backend.write(self._library, total, np.zeros(backend.shape(total), backend.dtype(total)))

    def owns(self, variable: Any) -> bool:
        """Whether a variable of the optimizer is one of these masks and sums."""
        return any(variable is one for one in (*self._masks.values(), *self._sums.values()))

    def enforce(self) -> None:
        """Zero what is masked from outside of the training step."""
        self._assign([(self._variables[key], mask) for key, mask in self._masks.items()])

    def _before(self, gradient: Any, variable: Any) -> Any:
        """The gradient that the optimizer is to see."""
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
    """What stands at the place of a variable in each of the lists that an optimizer keeps, if it fits."""
    found = []
    for value in vars(optimizer).values():
        if isinstance(value, list | tuple) and len(value) == count:
            slot = value[at]
            if hasattr(slot, "assign") and backend.shape(slot) == shape and backend.is_float(slot):
                found.append(slot)
    return found


class GripTwo(Grip):
    """Wraps `apply_gradients`."""

    def __init__(self, library: Library, optimizer: Any, moved: Sequence[Any]) -> None:
        super().__init__(library, optimizer)
        self._tf = library.tensorflow
        self._moved = {id(variable): variable for variable in moved}
        optimizer.build(moved)
        plain = optimizer.apply_gradients

        def apply_gradients(grads_and_vars: Iterable[tuple[Any, Any]], *words: Any, **more: Any) -> Any:
            self.has_seen_gradients = True
            pairs = [(gradient, one) for gradient, one in grads_and_vars if id(one) in self._moved]
            if self._is_shared() and not more.get("skip_gradients_aggregation"):
                # Evidence and masks are of the gradient of all processes.
                pairs, more["skip_gradients_aggregation"] = list(optimizer.aggregate_gradients(pairs)), True
            done = plain([(self._before(gradient, one), one) for gradient, one in pairs], *words, **more)
            self._after([one for _, one in pairs])
            return done

        optimizer.apply_gradients = apply_gradients

    def is_moved(self, variable: Any) -> bool:
        """Whether the optimizer moves a variable."""
        return id(variable) in self._moved

    def slots(self, variable: Any) -> list[Any]:
        """What the optimizer keeps for a variable, number by number."""
        at = list(self._moved).index(id(variable))
        return paired_slots(self._optimizer, at, len(self._moved), backend.shape(variable))

    def _is_shared(self) -> bool:
        return int(self._tf.distribute.get_strategy().num_replicas_in_sync) > 1

    def _extra(self, like: Any, kind: str, *, is_mask: bool) -> Any:
        tf = self._tf
        shape, dtype = backend.shape(like), tf.bool if is_mask else tf.float32
        return tf.Variable(
            tf.ones(shape, dtype) if is_mask else tf.zeros(shape, dtype),
            trainable=False,
            name=f"prunectl_{kind}",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def _where(self, mask: Any, value: Any) -> Any:
        return where_kept(self._tf, mask, value)

    def _assign(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        tf = self._tf

        def everywhere(strategy: Any, variables: Sequence[Any], masks: Sequence[Any]) -> None:
            for variable, mask in zip(variables, masks, strict=True):
                strategy.extended.update(variable, _zeroed, args=(mask,), group=False)

        def _zeroed(variable: Any, mask: Any) -> Any:
            return variable.assign(tf.where(mask, variable, tf.zeros_like(variable)))

        if not self._is_shared():
            for variable, mask in pairs:
                _zeroed(variable, mask)
            return
        variables, masks = [one for one, _ in pairs], [mask for _, mask in pairs]
        if tf.distribute.in_cross_replica_context():
            everywhere(tf.distribute.get_strategy(), variables, masks)
        else:
            tf.distribute.get_replica_context().merge_call(everywhere, args=(variables, masks))

    def _gather(self, total: Any, variable: Any, gradient: Any) -> None:
        tf = self._tf
        slope = tf.cast(dense(tf, gradient), tf.float32)
        weight = tf.cast(tf.convert_to_tensor(variable), tf.float32)
        added = {
            Evidence.GRADIENT: lambda: slope,
            Evidence.SALIENCE: lambda: tf.abs(weight * slope),
            Evidence.MOVEMENT: lambda: -weight * slope,
        }[self._evidence]()
        if self._is_shared():
            tf.distribute.get_replica_context().merge_call(
                lambda strategy, one, more: strategy.extended.update(
                    one, lambda inner, piece: inner.assign_add(piece), args=(more,), group=False
                ),
                args=(total, added),
            )
        else:
            total.assign_add(added)


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
        """What the optimizer keeps for a variable, number by number."""
        moved = self._optimizer._trainable_variables  # noqa: SLF001
        at = next(at for at, one in enumerate(moved) if one is variable)
        own = paired_slots(self._optimizer, at, len(moved), backend.shape(variable))
        return [one for one in own if one is not variable and not self.owns(one)]

    def _extra(self, like: Any, kind: str, *, is_mask: bool) -> Any:
        return self._optimizer.add_variable(
            shape=backend.shape(like),
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
