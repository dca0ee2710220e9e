"""Holding weights in Keras 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prunectl.training.evidence import Evidence
from prunectl.training.keras import numbers
from prunectl.training.keras.grip import Grip, paired_slots
from prunectl.training.keras.library import Library
from prunectl.training.keras.sparse import dense, where_kept


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
        """Return what the optimizer keeps for a variable, number by number."""
        at = list(self._moved).index(id(variable))
        return paired_slots(self._optimizer, at, len(self._moved), numbers.shape(variable))

    def _is_shared(self) -> bool:
        return int(self._tf.distribute.get_strategy().num_replicas_in_sync) > 1

    def _extra(self, like: Any, kind: str, *, is_mask: bool) -> Any:
        tf = self._tf
        shape, dtype = numbers.shape(like), tf.bool if is_mask else tf.float32
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
