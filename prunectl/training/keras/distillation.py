"""Knowledge distillation (Hinton et al. 2015), for Keras 2 and 3.

loss = alpha T^2 KL(teacher at T || student at T) + (1 - alpha) loss of the targets

T is the temperature that logits are divided by. Penalties on the weights are not shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.training.keras.backend import KerasLibrary
from prunectl.training.keras.compile.outputs import flatten
from prunectl.training.task import DistilledOutput, distillation_loss

TARGETS, TEACHER = "targets", "guide"


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """The weight of the teacher, the temperature, and the loss of each output."""

    library: KerasLibrary
    outputs: Sequence[DistilledOutput]
    alpha: float
    temperature: float


def install_distillation(model: Any, config: DistillationConfig) -> Callable[[], None]:
    """Make a model's loss take targets with a teacher's outputs; returns a function that resets its mean."""
    plain_loss, plain_metrics = model.compute_loss, model.compute_metrics
    # Keras 2 takes down the loss of the targets alone; Keras 3 what is returned here.
    mean = config.library.keras.metrics.Mean(name="loss") if config.library.is_keras2 else None

    def compute_loss(
        x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, **options: Any
    ) -> Any:
        def plain(targets: Any) -> Any:
            return plain_loss(x=x, y=targets, y_pred=y_pred, sample_weight=sample_weight, **options)

        if not has_teacher(y):
            return plain(y)
        loss = _total_loss(model, config, y, y_pred, plain)
        if mean is not None:
            mean.update_state(loss * _num_replicas(config.library), sample_weight=_num_examples(config.library, y_pred))
        return loss

    def compute_metrics(x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if not has_teacher(y):
            return plain_metrics(x, y, y_pred, sample_weight)
        if TARGETS in y:
            logs = dict(plain_metrics(x, y[TARGETS], y_pred, sample_weight))
        else:
            logs = {metric.name: metric.result() for metric in model.metrics if metric.name == "loss"}
        return {**logs, "loss": mean.result()} if mean is not None else logs

    model.compute_loss = compute_loss
    model.compute_metrics = compute_metrics
    return mean.reset_state if mean is not None else lambda: None


def _total_loss(model: Any, config: DistillationConfig, y: Any, y_pred: Any, plain: Callable[[Any], Any]) -> Any:
    """The combined loss; penalties on weights are added in full."""
    distilled = _distillation_loss(config, y[TEACHER], y_pred)
    penalties = sum(model.losses) if model.losses else 0.0
    if TARGETS not in y:
        return distilled + penalties
    return config.alpha * (distilled + penalties) + (1.0 - config.alpha) * plain(y[TARGETS])


def _num_examples(library: KerasLibrary, y_pred: Any) -> Any:
    tf = library.tensorflow
    return tf.cast(tf.shape(flatten(y_pred)[0])[0], tf.float32)


def has_teacher(y: Any) -> bool:
    """Whether targets come with a teacher's outputs."""
    return isinstance(y, dict) and TEACHER in y


def _distillation_loss(config: DistillationConfig, teacher_outputs: Any, y_pred: Any) -> Any:
    losses = [
        distillation_loss(config.library.ops, output, teacher, student, config.temperature)
        for output, teacher, student in zip(config.outputs, flatten(teacher_outputs), flatten(y_pred), strict=True)
    ]
    return sum(losses[1:], losses[0]) / _num_replicas(config.library)


def _num_replicas(library: KerasLibrary) -> int:
    """How many processes add up their losses."""
    return int(library.tensorflow.distribute.get_strategy().num_replicas_in_sync) if library.is_on_tensorflow else 1
