"""Learning from a teacher's outputs as well as from targets (Hinton et al. 2015).

loss = share T^2 KL(teacher at T || student at T) + (1 - share) loss of the targets

T is the temperature that logits are divided by. Penalties on the weights are not shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.training.backend import Ending
from prunectl.training.keras.backend import Library
from prunectl.training.keras.compile.outputs import flat

TARGETS, GUIDE = "targets", "guide"
_TINY = 1e-7
"""Below the precision of 32-bit probabilities."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How one output is compared with the teacher's."""

    is_classification: bool
    ending: Ending


@dataclass(frozen=True, slots=True)
class Guidance:
    """How much a teacher counts, and how it is compared."""

    library: Library
    manners: Sequence[Manner]
    share: float
    temperature: float


def install(model: Any, guidance: Guidance) -> Callable[[], None]:
    """Make a model's loss take targets that come with a teacher's outputs, and return what forgets its mean."""
    plain_loss, plain_metrics = model.compute_loss, model.compute_metrics
    # Keras 2 takes down the loss of the targets alone; Keras 3 what is returned here.
    mean = guidance.library.keras.metrics.Mean(name="loss") if guidance.library.is_two else None

    def compute_loss(x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, **more: Any) -> Any:
        def plain(targets: Any) -> Any:
            return plain_loss(x=x, y=targets, y_pred=y_pred, sample_weight=sample_weight, **more)

        if not is_guided(y):
            return plain(y)
        found = _whole(model, guidance, y, y_pred, plain)
        if mean is not None:
            mean.update_state(found * _replicas(guidance.library), sample_weight=_examples(guidance.library, y_pred))
        return found

    def compute_metrics(x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if not is_guided(y):
            return plain_metrics(x, y, y_pred, sample_weight)
        if TARGETS in y:
            found = dict(plain_metrics(x, y[TARGETS], y_pred, sample_weight))
        else:
            found = {one.name: one.result() for one in model.metrics if one.name == "loss"}
        return {**found, "loss": mean.result()} if mean is not None else found

    model.compute_loss = compute_loss
    model.compute_metrics = compute_metrics
    return mean.reset_state if mean is not None else lambda: None


def _whole(model: Any, guidance: Guidance, y: Any, y_pred: Any, plain: Callable[[Any], Any]) -> Any:
    """The loss of targets and teacher together; what weights cost counts wholly."""
    taught = _distance(guidance, y[GUIDE], y_pred)
    penalties = sum(model.losses) if model.losses else 0.0
    if TARGETS not in y:
        return taught + penalties
    return guidance.share * (taught + penalties) + (1.0 - guidance.share) * plain(y[TARGETS])


def _examples(library: Library, y_pred: Any) -> Any:
    tf = library.tensorflow
    return tf.cast(tf.shape(flat(y_pred)[0])[0], tf.float32)


def is_guided(y: Any) -> bool:
    """Whether targets come with a teacher's outputs."""
    return isinstance(y, dict) and GUIDE in y


def _distance(guidance: Guidance, guide: Any, y_pred: Any) -> Any:
    parts = [
        _compared(guidance, manner, theirs, ours)
        for manner, theirs, ours in zip(guidance.manners, flat(guide), flat(y_pred), strict=True)
    ]
    return sum(parts[1:], parts[0]) / _replicas(guidance.library)


def _compared(guidance: Guidance, manner: Manner, theirs: Any, ours: Any) -> Any:
    maths = _Maths(guidance.library)
    theirs, ours = maths.float32(theirs), maths.float32(ours)
    if not manner.is_classification:
        return maths.mean(maths.square(theirs - ours))
    heat = guidance.temperature
    if manner.ending is Ending.SIGMOID or ours.shape[-1] == 1:
        return heat**2 * maths.mean(_yes_no(maths, manner, theirs, ours, heat))
    them, us = (_log_probabilities(maths, manner, one, heat) for one in (theirs, ours))
    return heat**2 * maths.mean(maths.total(maths.exp(them) * (them - us)))


def _log_probabilities(maths: _Maths, manner: Manner, found: Any, heat: float) -> Any:
    # Where a model ends in softmax, the logarithm of what comes out is a logit as good as the one that went in.
    logits = maths.log(maths.at_least(found, _TINY)) if manner.ending is Ending.SOFTMAX else found
    return maths.log_softmax(logits / heat)


def _yes_no(maths: _Maths, manner: Manner, theirs: Any, ours: Any, heat: float) -> Any:
    """The divergence of one yes or no from another."""
    if manner.ending is Ending.SIGMOID:
        theirs, ours = (
            maths.log(maths.at_least(one, _TINY)) - maths.log(maths.at_least(1.0 - one, _TINY))
            for one in (theirs, ours)
        )
    theirs, ours = theirs / heat, ours / heat
    yes = maths.sigmoid(theirs)
    for_yes = yes * (maths.log_sigmoid(theirs) - maths.log_sigmoid(ours))
    return for_yes + (1.0 - yes) * (maths.log_sigmoid(-theirs) - maths.log_sigmoid(-ours))


class _Maths:
    """The same words for TensorFlow under Keras 2 and for what Keras 3 works on."""

    def __init__(self, library: Library) -> None:
        self._is_two = library.is_two
        self._own = library.tensorflow if library.is_two else library.keras.ops

    def float32(self, found: Any) -> Any:
        return self._own.cast(found, "float32")

    def mean(self, found: Any) -> Any:
        return self._own.reduce_mean(found) if self._is_two else self._own.mean(found)

    def total(self, found: Any) -> Any:
        """The sums over the last axis."""
        return self._own.reduce_sum(found, axis=-1) if self._is_two else self._own.sum(found, axis=-1)

    def square(self, found: Any) -> Any:
        return self._own.square(found)

    def exp(self, found: Any) -> Any:
        return self._own.exp(found)

    def log(self, found: Any) -> Any:
        return self._own.math.log(found) if self._is_two else self._own.log(found)

    def at_least(self, found: Any, least: float) -> Any:
        return self._own.maximum(found, least)

    def log_softmax(self, found: Any) -> Any:
        return self._own.nn.log_softmax(found) if self._is_two else self._own.log_softmax(found)

    def sigmoid(self, found: Any) -> Any:
        return self._own.sigmoid(found)

    def log_sigmoid(self, found: Any) -> Any:
        return self._own.math.log_sigmoid(found) if self._is_two else self._own.log_sigmoid(found)


def _replicas(library: Library) -> int:
    """How many processes add up their losses."""
    return int(library.tensorflow.distribute.get_strategy().num_replicas_in_sync) if library.is_on_tensorflow else 1
