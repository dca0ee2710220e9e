"""Metrics: their protocol, whether higher is better, and which metric selects the best epoch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from prunectl.errors import PrunectlError, UsageError, first_line
from prunectl.training.backend import TrainOptions
from prunectl.training.request import LOSS, MAX, MIN
from prunectl.training.task import format_shape


class Metric(Protocol):
    """A metric that is updated with each batch and computed at the end, like those of torchmetrics."""

    def update(self, outputs: Any, targets: Any, /) -> None:
        """Add the outputs and targets of a batch."""

    def compute(self) -> Any:
        """The value over all batches since the metric was created."""


class GatheredMetric:
    """Calls a function once on all outputs and targets: F1 and Dice are not means over batches."""

    def __init__(self, function: Callable[[Any, Any], Any], concatenate: Callable[[Sequence[Any]], Any]) -> None:
        self._function, self._concatenate = function, concatenate
        self._batches: list[tuple[Any, Any]] = []

    def update(self, outputs: Any, targets: Any, /) -> None:
        """Store the outputs and targets of a batch."""
        self._batches.append((outputs, targets))

    def compute(self) -> Any:
        """The function's value for all batches together."""
        return self._function(*map(self._concatenate, zip(*self._batches, strict=True)))


def metric_factory(name: str, metric: Any) -> Callable[[], Metric] | None:
    """A factory of metrics from a class or an object with `update` and `compute`; None for a plain function."""
    if not all(callable(getattr(metric, method, None)) for method in ("update", "compute")):
        return None
    if not isinstance(metric, type):
        return partial(deepcopy, metric)

    def make() -> Metric:
        try:
            instance: Metric = metric()
        except Exception as error:
            raise UsageError(
                f"the metric {name} cannot be created without arguments: {first_line(error)}",
                hint="name an instance that your module creates with its arguments",
            ) from error
        return instance

    return make


@contextmanager
def metric_failures(name: str, outputs: Sequence[int], targets: Sequence[int]) -> Iterator[None]:
    """Report exceptions of a metric as an error about outputs and targets of these shapes."""
    try:
        yield
    except PrunectlError:
        raise
    except Exception as error:
        raise metric_mismatch(name, outputs, targets, first_line(error)) from error


_UP = """
accuracy acc binary_accuracy categorical_accuracy sparse_categorical_accuracy top_k_categorical_accuracy
sparse_top_k_categorical_accuracy auc precision recall precision_at_recall recall_at_precision
sensitivity_at_specificity specificity_at_sensitivity true_positives true_negatives f1 f1_score fbeta_score
iou binary_iou one_hot_iou mean_iou one_hot_mean_iou cosine_similarity r2 r2_score pearson_correlation
concordance_correlation
"""
_DOWN = """
loss mae mean_absolute_error mse mean_squared_error rmse root_mean_squared_error mape mean_absolute_percentage_error
msle mean_squared_logarithmic_error mean_relative_error logcosh log_cosh log_cosh_error huber huber_loss
hinge squared_hinge categorical_hinge kl kld kl_divergence kullback_leibler_divergence poisson nll
ce cross_entropy crossentropy bce binary_crossentropy categorical_crossentropy sparse_categorical_crossentropy
binary_focal_crossentropy categorical_focal_crossentropy categorical_generalized_cross_entropy ctc circle
false_positives false_negatives perplexity
"""
_TOP = re.compile(r"top\d+(?:accuracy)?")
_COUNTED = re.compile(r"_\d+$")
"""The suffix that Keras adds to a name that is already taken."""


def _normalize(name: str) -> str:
    """A normalised name: `MeanIoU`, `mean_io_u` and `mean-iou` are the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_KNOWN = {**{_normalize(name): True for name in _UP.split()}, **{_normalize(name): False for name in _DOWN.split()}}


def known_direction(name: str, outputs: Iterable[str] = ()) -> bool | None:
    """Whether higher is better, by the metric's name; None if unknown. Keras may put an output's name before it."""
    metric = name.rpartition(":")[2].removeprefix("val_")
    for candidate in (metric, *(metric[len(output) + 1 :] for output in outputs if metric.startswith(f"{output}_"))):
        for normalized in (_normalize(candidate), _normalize(_COUNTED.sub("", candidate))):
            if normalized in _KNOWN:
                return _KNOWN[normalized]
            if _TOP.fullmatch(normalized):
                return True
    return None


@dataclass(frozen=True, slots=True)
class Monitor:
    """The metric that is monitored, and whether higher is better."""

    name: str
    higher_is_better: bool

    def is_better(self, new: float, old: float | None) -> bool:
        """Whether a value is better than the best so far; NaN never is."""
        if new != new:  # NaN  # noqa: PLR0124
            return False
        return old is None or (new > old if self.higher_is_better else new < old)


def monitored_log(logs: Mapping[str, float], requested: str = "", outputs: Iterable[str] = ()) -> str:
    """The name of the monitored log: the requested metric, else the first metric, else the loss."""
    if requested in logs:
        return requested
    others = [name for name in logs if name != LOSS]
    if not requested:
        # Keras adds the loss of each output if there are several.
        losses = {f"{output}_{LOSS}" for output in outputs}
        return next((name for name in others if name not in losses), LOSS)
    # The framework may log the requested metric under a longer name.
    short = requested.rpartition(":")[2]
    match = next((name for name in others if name == short or name.endswith(f"_{short}")), None)
    return match or next((name for name in others if not name.endswith(f"_{LOSS}")), LOSS)


def resolve_direction(name: str, goal: str = "", outputs: Iterable[str] = ()) -> bool:
    """Whether higher is better: as the user says, else by the metric's name; raise if the name is unknown."""
    direction = goal == MAX if goal else known_direction(name, outputs)
    if direction is None:
        raise UsageError(
            f"prunectl does not know whether a higher {name} is better",
            hint=f"write --metric {name}:{MAX} or --metric {name}:{MIN}",
        )
    return direction


def check_direction(options: TrainOptions) -> None:
    """Refuse a user's metric function without a direction, before a file is opened."""
    name = monitored_metric(options)
    # A bare name may be misspelled: the framework reports that.
    if ":" in name:
        resolve_direction(name, options.goal)


def make_monitor(logs: Mapping[str, float], options: TrainOptions, outputs: Iterable[str] = ()) -> Monitor:
    """Choose the monitored metric from the names of the logs."""
    requested, outputs = monitored_metric(options), tuple(outputs)
    name = monitored_log(logs, requested, outputs)
    if name == LOSS and requested not in {"", LOSS}:
        raise UsageError(
            f"the metric {requested} is not measured: only the loss is", hint=f"leave it out, or write --metric {LOSS}"
        )
    return Monitor(name, resolve_direction(name, options.goal, outputs))


def monitored_metric(options: TrainOptions) -> str:
    """The first requested metric; empty if there is none."""
    return options.decides or next(iter(options.metrics), "")


def metric_mismatch(metric: str, outputs: Sequence[int], targets: Sequence[int], why: str = "") -> UsageError:
    """The error for a metric that cannot compare outputs with targets of such shapes."""
    output, target = (format_shape(shape[1:], "one number") for shape in (outputs, targets))
    return UsageError(
        f"the metric {metric} does not fit outputs of {output} and targets of {target} for each example"
        f"{f': {why}' if why else ''}",
        hint="use --metric accuracy for labels, mae or mse for targets of the same shape as the outputs",
    )
