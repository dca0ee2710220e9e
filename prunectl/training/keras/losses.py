"""Losses and metrics: by name, from a file's configuration, or the defaults for outputs and targets.

Knowledge distillation (Hinton et al. 2015): loss = alpha T^2 KL(teacher at T || student at T) + (1 - alpha) loss of the
targets, where T is the temperature that logits are divided by. Weight penalties are added in full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import wraps
from typing import Any

from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.formats.keras.config import object_in, string_in
from prunectl.training import user_code
from prunectl.training.keras.backend import KerasLibrary
from prunectl.training.keras.outputs import ModelOutput, flatten
from prunectl.training.monitor import metric_mismatch
from prunectl.training.task import (
    DistilledOutput,
    FinalActivation,
    TaskKind,
    distillation_loss,
    has_same_size,
    shape_matches,
    target_mismatch,
)

_SHORT_NAMES = {
    "mse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "kl": "KLDivergence",
    "hinge": "Hinge",
    "huber": "Huber",
}
_CROSS_ENTROPY = "cross-entropy"
_CROSS_ENTROPY_NAMES = frozenset({_CROSS_ENTROPY, "ce", "crossentropy"})


class CrossEntropy(StrEnum):
    """The cross-entropy by the encoding of its targets; OTHER is any other loss."""

    SPARSE = "SparseCategoricalCrossentropy"
    CATEGORICAL = "CategoricalCrossentropy"
    BINARY = "BinaryCrossentropy"
    OTHER = ""

    @property
    def is_classification(self) -> bool:
        """Whether the loss compares classes."""
        return self is not CrossEntropy.OTHER


@dataclass(frozen=True, slots=True)
class KerasLoss:
    """A loss for one output."""

    kind: CrossEntropy
    loss: Any
    """The loss as Keras takes it, an object or a function."""
    from_logits: bool = False
    name: str = ""


_ENCODINGS = {
    TaskKind.LABELS: CrossEntropy.SPARSE,
    TaskKind.SHARES: CrossEntropy.CATEGORICAL,
    TaskKind.BINARY: CrossEntropy.BINARY,
}
_FUNCTIONS = {
    "sparse_categorical_crossentropy": CrossEntropy.SPARSE,
    "categorical_crossentropy": CrossEntropy.CATEGORICAL,
    "binary_crossentropy": CrossEntropy.BINARY,
}


def default_loss(library: KerasLibrary, output: ModelOutput, y: Array | None) -> KerasLoss | None:
    """The default loss for an output and its targets; None without targets."""
    if y is None:
        return None
    encoding = _ENCODINGS.get(output.task(y).kind)
    return _instance(library, "MeanSquaredError") if encoding is None else cross_entropy(library, encoding, output)


def cross_entropy(library: KerasLibrary, encoding: CrossEntropy, output: ModelOutput) -> KerasLoss:
    """A cross-entropy for the output's final activation: from logits or from probabilities."""
    is_of_logits = output.activation is FinalActivation.RAW
    loss = getattr(library.keras.losses, encoding.value)(from_logits=is_of_logits)
    return KerasLoss(encoding, loss, is_of_logits, _snake_case(encoding))


def loss_by_name(library: KerasLibrary, name: str, output: ModelOutput, y: Array | None) -> KerasLoss:
    """The loss that the user chose."""
    text = name.strip()
    if ":" in text:
        function = user_code.resolve_function(text, "--loss")
        loss = function() if isinstance(function, type) else function
        return describe_loss(loss)
    if text.lower() in _CROSS_ENTROPY_NAMES:
        return cross_entropy(library, _encoding(output, y), output)
    if text.lower() == "bce":
        return cross_entropy(library, CrossEntropy.BINARY, output)
    if text.lower() == "kl" and output.activation is FinalActivation.RAW:
        return KerasLoss(CrossEntropy.OTHER, _kl_of_logits(library), name="kl_divergence")
    if text.lower() in _SHORT_NAMES:
        return _instance(library, _SHORT_NAMES[text.lower()])
    known = describe_loss(_loss_of_keras(library, text))
    return cross_entropy(library, known.kind, output) if known.kind.is_classification else known


def _kl_of_logits(library: KerasLibrary) -> Any:
    """KL divergence for a model that outputs logits."""
    keras = library.keras

    def kl_divergence_of_logits(y_true: Any, y_pred: Any) -> Any:
        return keras.losses.kl_divergence(y_true, keras.activations.softmax(y_pred))

    return kl_divergence_of_logits


def describe_loss(loss: Any) -> KerasLoss:
    """Wrap a Keras loss, and infer its kind from its name."""
    name = getattr(loss, "__name__", "") or _snake_case(type(loss).__name__)
    kind = _FUNCTIONS.get(name, CrossEntropy.OTHER)
    settings = loss.get_config() if kind is not CrossEntropy.OTHER and hasattr(loss, "get_config") else {}
    return KerasLoss(kind, loss, bool(settings.get("from_logits", False)), name)


def loss_from_config(library: KerasLibrary, entry: Any, objects: Mapping[str, Any]) -> Any:
    """Create a loss from a file's configuration; raises Keras' own errors if it is unknown."""
    with library.keras.utils.custom_object_scope(dict(objects)):
        return library.keras.losses.deserialize(entry) if isinstance(entry, dict) else library.keras.losses.get(entry)


def match_targets(
    library: KerasLibrary, loss: KerasLoss, output: ModelOutput, y: Array | None
) -> tuple[KerasLoss, str]:
    """Replace a cross-entropy by the one for the encoding of the targets; returns a note if it was replaced."""
    if y is None or loss.kind not in {CrossEntropy.SPARSE, CrossEntropy.CATEGORICAL}:
        return loss, ""
    encoding = _encoding(output, y)
    if encoding is loss.kind or encoding is CrossEntropy.BINARY:
        return loss, ""
    replacement = getattr(library.keras.losses, encoding.value)(from_logits=loss.from_logits)
    shape = "numbers of classes" if encoding is CrossEntropy.SPARSE else "one-hot"
    note = f"The file's loss is {loss.name}, but the targets are {shape}: using {_snake_case(encoding)} instead."
    return KerasLoss(encoding, replacement, loss.from_logits, _snake_case(encoding)), note


_ELEMENTWISE = frozenset(
    {"mean_squared_error", "mean_absolute_error", "huber", "mean_squared_logarithmic_error", "log_cosh", "hinge"}
)
"""Elementwise losses, for which TensorFlow would broadcast targets of fewer numbers."""


def check_shape(loss: KerasLoss, output: ModelOutput, y: Array | None) -> None:
    """Refuse targets whose size differs from the output's, for elementwise losses."""
    shape = output.shape[1:]
    if y is not None and loss.name in _ELEMENTWISE and None not in shape and not has_same_size(shape, y.shape[1:]):
        raise target_mismatch(y.shape[1:], shape, f"the output {output.name} is")


def _encoding(output: ModelOutput, y: Array | None) -> CrossEntropy:
    """The cross-entropy for the shape of targets that are known to be classes."""
    if output.width == 1:
        return CrossEntropy.BINARY
    if y is None or not shape_matches(y.shape[1:], output.shape[1:]):
        return CrossEntropy.SPARSE
    return CrossEntropy.BINARY if output.activation is FinalActivation.SIGMOID else CrossEntropy.CATEGORICAL


def _instance(library: KerasLibrary, name: str) -> KerasLoss:
    return KerasLoss(CrossEntropy.OTHER, getattr(library.keras.losses, name)(), name=_snake_case(name))


def _loss_of_keras(library: KerasLibrary, name: str) -> Any:
    try:
        loss = library.keras.losses.get(name)
    except (ValueError, TypeError) as error:
        names = loss_names(library)
        raise UsageError(
            f"{name} is not a known loss",
            did_you_mean=tuple(get_close_matches(name, names, n=3, cutoff=0.5)),
            hint=f"known: {_CROSS_ENTROPY}, bce, {', '.join(_SHORT_NAMES)}, the losses of Keras, or my_module:my_loss",
        ) from error
    return loss() if isinstance(loss, type) else loss


def loss_names(library: KerasLibrary) -> Sequence[str]:
    """The names of all losses."""
    keras_names = [name for name in dir(library.keras.losses) if not name.startswith("_")]
    return [_CROSS_ENTROPY, "bce", *_SHORT_NAMES, *keras_names]


def _snake_case(name: str) -> str:
    """A class name in snake case, which is the name of the corresponding function."""
    spaced = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    return spaced.lstrip("_")


ACCURACY = frozenset({"accuracy", "acc"})
_ACCURACIES = ACCURACY | {"sparse_categorical_accuracy", "categorical_accuracy"}
"""Names of accuracies in files; the targets decide which accuracy is used."""
_TOP = re.compile(r"top-?_?(\d+)(?:-?_?accuracy)?")


_ELEMENTWISE_METRICS = frozenset({"mae", "mse", "mape", "msle", "rmse", "logcosh", "r2_score"})
"""Elementwise metrics, besides names that end with `_error`: Keras may broadcast targets of fewer numbers."""


def default_metrics(library: KerasLibrary, loss: KerasLoss | None, output: ModelOutput, y: Array | None) -> list[Any]:
    """The default metrics."""
    if loss is None:
        return []
    if loss.kind.is_classification:
        return [accuracy(library, loss)]
    kind = TaskKind.NUMBERS if y is None else output.task(y).kind
    if kind is TaskKind.LABELS:
        return [library.keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    if kind is TaskKind.SHARES and loss.name not in _ELEMENTWISE:
        return [library.keras.metrics.CategoricalAccuracy(name="accuracy")]
    is_compared = kind is TaskKind.UNKNOWN or loss.name == "mean_absolute_error"
    return [] if is_compared else [library.keras.metrics.MeanAbsoluteError(name="mae")]


def check_metric_shape(name: str, output: ModelOutput, y: Array | None) -> None:
    """Refuse an elementwise metric if outputs and targets differ in size."""
    text, shape = name.strip().lower(), output.shape[1:]
    is_elementwise = text in _ELEMENTWISE_METRICS or text.endswith("_error")
    if y is not None and is_elementwise and None not in shape and not has_same_size(shape, y.shape[1:]):
        raise metric_mismatch(name, [0, *(size or 0 for size in shape)], y.shape)


def metric_by_name(library: KerasLibrary, name: str, loss: KerasLoss | None, objects: Mapping[str, Any]) -> Any:
    """The metric that the user chose, by a name known to Keras or in the custom objects."""
    text = name.strip()
    if ":" in text:
        metric = user_code.resolve_function(text, "--metric")
        return metric() if isinstance(metric, type) else _per_example(library, metric)
    if text.lower() in ACCURACY:
        return accuracy(library, loss)
    if top := _TOP.fullmatch(text.lower()):
        return _top_k(library, int(top[1]), loss)
    classes = {cls.__name__.lower(): cls for cls in _metric_classes(library)}
    if text.lower().replace("-", "") in classes:
        return classes[text.lower().replace("-", "")](name=text.lower())
    try:
        with library.keras.utils.custom_object_scope(dict(objects)):
            metric = library.keras.metrics.get(text)
        if isinstance(metric, str):  # Keras 2 hands back what it does not know
            raise ValueError(metric)  # noqa: TRY004, TRY301
    except (ValueError, TypeError) as error:
        names = [*ACCURACY, *classes, *(name for name in dir(library.keras.metrics) if name.islower())]
        raise UsageError(
            f"{name} is not a known metric",
            did_you_mean=tuple(get_close_matches(text.lower(), names, n=3, cutoff=0.5)),
            hint="known: accuracy, top5, auc, precision, recall, mae, the metrics of Keras, or my_module:my_metric",
        ) from error
    # A function is named as the user typed it; a metric object has a name of its own.
    return library.keras.metrics.MeanMetricWrapper(metric, name=text) if not hasattr(metric, "result") else metric


def _per_example(library: KerasLibrary, function: Any) -> Any:
    """Make a metric function return a value for each example, so that a smaller last batch counts less."""
    ops = library.ops

    @wraps(function)
    def measured(y_true: Any, y_pred: Any) -> Any:
        value = function(y_true, y_pred)
        if len(getattr(value, "shape", ())):
            return value
        output = flatten(y_pred)[0]
        per_example = output[(slice(None), *([0] * (len(output.shape) - 1)))]
        return value + ops.cast(ops.zeros_like(per_example), getattr(value, "dtype", "float32"))

    return measured


def accuracy(library: KerasLibrary, loss: KerasLoss | None) -> Any:
    """The accuracy that fits the targets of a loss."""
    metrics = library.keras.metrics
    if loss is None or loss.kind is CrossEntropy.OTHER:
        return "accuracy"  # Keras chooses by the shapes of targets and outputs
    if loss.kind is CrossEntropy.BINARY:
        return metrics.BinaryAccuracy(name="accuracy", threshold=0.0 if loss.from_logits else 0.5)
    if loss.kind is CrossEntropy.SPARSE:
        return metrics.SparseCategoricalAccuracy(name="accuracy")
    return metrics.CategoricalAccuracy(name="accuracy")


def metric_from_config(library: KerasLibrary, entry: Any, objects: Mapping[str, Any]) -> Any:
    """Create a metric from a file's configuration; raises Keras' own errors if it is unknown."""
    # Keras saves the kind of accuracy that it chose, which may be wrong if it had not seen any targets.
    if (entry if isinstance(entry, str) else string_in(object_in(entry, "config"), "name")) in _ACCURACIES:
        return "accuracy"
    if isinstance(entry, str):
        with library.keras.utils.custom_object_scope(dict(objects)):
            metric = library.keras.metrics.get(entry)
        if isinstance(metric, str):
            raise ValueError(entry)  # noqa: TRY004 - Keras 2 hands back what it does not know
        return entry
    with library.keras.utils.custom_object_scope(dict(objects)):
        return library.keras.metrics.deserialize(entry)


def _top_k(library: KerasLibrary, count: int, loss: KerasLoss | None) -> Any:
    is_sparse = loss is not None and loss.kind is CrossEntropy.SPARSE
    kind = "SparseTopKCategoricalAccuracy" if is_sparse else "TopKCategoricalAccuracy"
    return getattr(library.keras.metrics, kind)(k=count, name=f"top{count}")


def _metric_classes(library: KerasLibrary) -> list[type]:
    metrics = library.keras.metrics
    members = [getattr(metrics, name) for name in dir(metrics) if not name.startswith("_")]
    return [member for member in members if isinstance(member, type) and issubclass(member, metrics.Metric)]


TARGETS, TEACHER = "targets", "teacher"


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """The weight of the teacher, the temperature, and the loss of each output."""

    library: KerasLibrary
    outputs: Sequence[DistilledOutput]
    alpha: float
    temperature: float
    has_penalties: bool = True
    """Whether weight penalties are added to the distillation loss."""


def install_distillation(model: Any, config: DistillationConfig) -> Callable[[], None]:
    """Make a model's loss accept targets with teacher outputs; returns a function that resets the mean loss."""
    plain_loss, plain_metrics = model.compute_loss, model.compute_metrics
    # Keras 2 logs only the loss of the targets; Keras 3 logs what is returned here.
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
    """The combined loss; weight penalties are added in full."""
    distilled = _distillation_loss(config, y[TEACHER], y_pred)
    penalties = sum(model.losses) if config.has_penalties and model.losses else 0.0
    if TARGETS not in y:
        return distilled + penalties
    return config.alpha * (distilled + penalties) + (1.0 - config.alpha) * plain(y[TARGETS])


def _num_examples(library: KerasLibrary, y_pred: Any) -> Any:
    tf = library.tensorflow
    return tf.cast(tf.shape(flatten(y_pred)[0])[0], tf.float32)


def has_teacher(y: Any) -> bool:
    """Whether targets include a teacher's outputs."""
    return isinstance(y, dict) and TEACHER in y


def _distillation_loss(config: DistillationConfig, teacher_outputs: Any, y_pred: Any) -> Any:
    losses = [
        distillation_loss(config.library.ops, output, teacher, student, config.temperature)
        for output, teacher, student in zip(config.outputs, flatten(teacher_outputs), flatten(y_pred), strict=True)
    ]
    return sum(losses[1:], losses[0]) / _num_replicas(config.library)


def _num_replicas(library: KerasLibrary) -> int:
    """The number of replicas, whose losses are summed."""
    return int(library.tensorflow.distribute.get_strategy().num_replicas_in_sync) if library.is_on_tensorflow else 1
