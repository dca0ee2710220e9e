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
from prunectl.training.task import FinalActivation

TARGETS, TEACHER = "targets", "guide"
_TINY = 1e-7
"""Below the precision of 32-bit probabilities."""


@dataclass(frozen=True, slots=True)
class OutputLoss:
    """How one output is compared with the teacher's."""

    is_classification: bool
    ending: FinalActivation


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """The weight of the teacher, the temperature, and the loss of each output."""

    library: KerasLibrary
    outputs: Sequence[OutputLoss]
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
        _output_loss(config, output, teacher, student)
        for output, teacher, student in zip(config.outputs, flatten(teacher_outputs), flatten(y_pred), strict=True)
    ]
    return sum(losses[1:], losses[0]) / _num_replicas(config.library)


def _output_loss(config: DistillationConfig, output: OutputLoss, teacher: Any, student: Any) -> Any:
    ops = config.library.ops
    teacher, student = ops.cast(teacher, "float32"), ops.cast(student, "float32")
    if not output.is_classification:
        return ops.mean(ops.square(teacher - student))
    temperature = config.temperature
    if output.ending is FinalActivation.SIGMOID or student.shape[-1] == 1:
        return temperature**2 * ops.mean(_binary_kl(ops, output, teacher, student, temperature))
    teacher_log, student_log = (_log_probabilities(ops, output, logits, temperature) for logits in (teacher, student))
    return temperature**2 * ops.mean(ops.sum(ops.exp(teacher_log) * (teacher_log - student_log), axis=-1))


def _log_probabilities(ops: Any, output: OutputLoss, outputs: Any, temperature: float) -> Any:
    # Where a model ends in softmax, the logarithm of what comes out is a logit as good as the one that went in.
    logits = ops.log(ops.maximum(outputs, _TINY)) if output.ending is FinalActivation.SOFTMAX else outputs
    return ops.log_softmax(logits / temperature)


def _binary_kl(ops: Any, output: OutputLoss, teacher: Any, student: Any, temperature: float) -> Any:
    """KL divergence of Bernoulli distributions."""
    if output.ending is FinalActivation.SIGMOID:
        teacher, student = (
            ops.log(ops.maximum(outputs, _TINY)) - ops.log(ops.maximum(1.0 - outputs, _TINY))
            for outputs in (teacher, student)
        )
    teacher, student = teacher / temperature, student / temperature
    p = ops.sigmoid(teacher)
    positive = p * (ops.log_sigmoid(teacher) - ops.log_sigmoid(student))
    return positive + (1.0 - p) * (ops.log_sigmoid(-teacher) - ops.log_sigmoid(-student))


def _num_replicas(library: KerasLibrary) -> int:
    """How many processes add up their losses."""
    return int(library.tensorflow.distribute.get_strategy().num_replicas_in_sync) if library.is_on_tensorflow else 1
