"""Losses and metrics by name, or inferred from outputs and targets; their means over batches; distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.plugins import find
from prunectl.training.monitor import GatheredMetric, Metric, metric_factory, metric_failures
from prunectl.training.task import (
    IGNORED_LABEL,
    DistilledOutput,
    FinalActivation,
    TaskKind,
    activation_of_values,
    distillation_loss,
    infer_task,
    label_axis,
    target_mismatch,
)
from prunectl.training.user_code import find_guarded

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _nll(logs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logs, y = _by_classes(logs, y)
    return -(logs * y).sum(1).mean() if y.is_floating_point() else _mean_of_kept(functional.nll_loss, logs, y)


def _cross_entropy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out, y = _by_classes(out, y)
    return (
        functional.cross_entropy(out, y) if y.is_floating_point() else _mean_of_kept(functional.cross_entropy, out, y)
    )


def _mean_of_kept(loss: Callable[..., torch.Tensor], out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over the labels that are not ignored; 0 if all are, where PyTorch's own mean is NaN."""
    return loss(out, labels, reduction="sum") / _count_kept(labels).clamp_min(1)


def _count_kept(labels: torch.Tensor) -> torch.Tensor:
    return (labels != IGNORED_LABEL).sum()


def _by_classes(out: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs with their classes in axis 1, and targets as int64 labels or as a probability for each class."""
    axis = label_axis(out.shape[1:], y.shape[1:], is_channels_first=True)
    if axis is None and y.shape == out.shape:
        return out, y.to(out.dtype)
    if y.is_floating_point() and not bool((y == y.round()).all()):
        raise UsageError("the targets are not labels", hint="for targets that are numbers use --loss mse")
    out = out if axis is None else out.movedim(axis, 1)
    return out, y.long().reshape(out.shape[0], *out.shape[2:])


def _log(shares: torch.Tensor) -> torch.Tensor:
    """The logarithm of probabilities; at zero it is finite and, unlike with a clamp, has a gradient."""
    return (shares + torch.finfo(shares.dtype).eps).log()


def _kl(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _kl_of_logs(functional.log_softmax(out, 1), y)


def _kl_of_probabilities(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _kl_of_logs(_log(out), y)


def _kl_of_logs(logs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KL divergence as in Keras: the sum over classes of y log(y / p), and the mean over all other axes."""
    targets = _shaped(y, logs).to(logs.dtype)
    return functional.kl_div(logs, targets, reduction="none").sum(1).mean()


_KL = {
    FinalActivation.SOFTMAX: _kl_of_probabilities,
    FinalActivation.SIGMOID: _kl_of_probabilities,
    FinalActivation.LOG_SOFTMAX: _kl_of_logs,
}


def _hinge(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Targets of 0 and 1 mean -1 and 1, as in Keras.
    signs = torch.where(((y == 0) | (y == 1)).all(), 2 * y - 1, y)
    return (1 - out * signs).clamp_min(0).mean()


def _elementwise(loss: Callable[..., torch.Tensor]) -> Loss:
    return lambda out, y: loss(out, _shaped(y, out).to(out.dtype))


def _shaped(y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if y.numel() != out.numel():
        raise target_mismatch(y.shape[1:], out.shape[1:], "the model gives")
    return y.reshape(out.shape)


LOSSES: Mapping[str, Loss] = {
    "cross-entropy": _cross_entropy,
    "nll": _nll,
    "probabilities": lambda out, y: _nll(_log(out), y),
    "bce": _elementwise(functional.binary_cross_entropy_with_logits),
    "bce-probabilities": _elementwise(functional.binary_cross_entropy),
    "mse": _elementwise(functional.mse_loss),
    "mae": _elementwise(functional.l1_loss),
    "huber": _elementwise(functional.huber_loss),
    "kl": _kl,
    "hinge": _elementwise(_hinge),
}
_CLASSIFY = {"cross-entropy", "nll", "probabilities"}


@dataclass(frozen=True, slots=True)
class TorchLoss:
    """A loss function and its name."""

    name: str
    loss: Loss

    @property
    def classifies(self) -> bool:
        """Whether it is a classification loss over several classes."""
        return self.name in _CLASSIFY

    @property
    def is_binary(self) -> bool:
        """Whether it is a binary cross-entropy."""
        return self.name.startswith("bce")

    @property
    def activation(self) -> FinalActivation:
        """The final activation of the outputs that this loss expects; unknown if it expects none in particular."""
        return _ACTIVATIONS.get(self.name, FinalActivation.UNKNOWN)


def examples_labelled(targets: Array, chosen: TorchLoss) -> float:
    """The number of examples of a batch that count: less by the share of labels that are ignored."""
    if not chosen.classifies or targets.dtype.kind not in "iu":
        return len(targets)
    return len(targets) * np.count_nonzero(targets != IGNORED_LABEL) / max(targets.size, 1)


_CROSS_ENTROPIES = {
    FinalActivation.SOFTMAX: "probabilities",
    FinalActivation.LOG_SOFTMAX: "nll",
    FinalActivation.UNKNOWN: "cross-entropy",
}
_LOSSES_OF_TASKS: Mapping[TaskKind, Mapping[FinalActivation, str]] = {
    TaskKind.LABELS: _CROSS_ENTROPIES,
    TaskKind.SHARES: {**_CROSS_ENTROPIES, FinalActivation.SIGMOID: "bce-probabilities"},
    TaskKind.BINARY: {
        FinalActivation.SOFTMAX: "bce-probabilities",
        FinalActivation.SIGMOID: "bce-probabilities",
        FinalActivation.UNKNOWN: "bce",
    },
    TaskKind.NUMBERS: {FinalActivation.UNKNOWN: "mse"},
}
"""The loss of a task by the last activation; UNKNOWN stands for all others."""
_ACTIVATIONS = {
    "probabilities": FinalActivation.SOFTMAX,
    "nll": FinalActivation.LOG_SOFTMAX,
    "bce-probabilities": FinalActivation.SIGMOID,
    "cross-entropy": FinalActivation.RAW,
    "bce": FinalActivation.RAW,
}


def resolve_loss(
    name: str, out: torch.Tensor, y: torch.Tensor | None, activation: FinalActivation = FinalActivation.UNKNOWN
) -> TorchLoss:
    """The loss with a name, in the variant for the model's last activation; without a name, the loss of the task.

    If the activation is unknown, it is inferred from the values of the outputs.
    """
    apparent = activation or activation_of_values(out.detach().float().cpu().numpy(), 1)
    if name == "kl":
        return TorchLoss(name, _KL.get(apparent, _kl))
    if name:
        kind = _KINDS_BY_NAME.get(name, TaskKind.UNKNOWN)
        if kind is TaskKind.LABELS and math.prod(out.shape[1:2]) == 1:
            kind = TaskKind.BINARY  # one output for two classes
        name = _loss_of_task(kind, activation) or name
        return TorchLoss(name, find_guarded("loss", name, LOSSES))
    if y is None:
        raise UsageError("the data has no targets, and no --loss is given", hint="add --loss module:function")
    task = infer_task(out.shape[1:], activation, y.cpu().numpy(), is_channels_first=True)
    name = _loss_of_task(task.kind, apparent)
    if not name:
        raise UsageError(
            f"no loss fits outputs of {tuple(out.shape)} and targets of {tuple(y.shape)}",
            hint=f"use --loss NAME ({', '.join(LOSSES)}) or --loss module:function",
        )
    return TorchLoss(name, LOSSES[name])


_KINDS_BY_NAME = {"cross-entropy": TaskKind.LABELS, "bce": TaskKind.BINARY}
"""The task of losses that have a variant for logits and one for probabilities."""


def _loss_of_task(kind: TaskKind, activation: FinalActivation) -> str:
    names = _LOSSES_OF_TASKS.get(kind, {})
    return names.get(activation) or names.get(FinalActivation.UNKNOWN, "")


def without_targets(out: torch.Tensor, activation: FinalActivation) -> TorchLoss:
    """The loss for distillation without targets: classification if the model ends in class probabilities, else MSE."""
    if activation is FinalActivation.UNKNOWN:
        activation = activation_of_values(out.detach().float().cpu().numpy(), 1)
    name = _LOSSES_OF_TASKS[TaskKind.SHARES].get(activation, "mse")
    return TorchLoss(name, LOSSES[name])


MeanFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes the mean over the examples from outputs and targets."""


@dataclass(frozen=True, slots=True)
class TorchMetric:
    """A metric with its name: a mean over examples, or a metric of the user."""

    name: str
    function: Any

    @property
    def is_mean(self) -> bool:
        """Whether the mean over batches, weighted by their examples, equals the metric of all examples."""
        return self.name in METRICS

    def start(self, *, is_training: bool) -> Metric | None:
        """A new accumulator of batches; None if the mean over batches is used.

        The outputs of a training epoch are not kept, so that in training a user's function is averaged over batches.
        """
        make = metric_factory(self.name, self.function)
        if make is not None:
            return make()
        if self.is_mean or is_training:
            return None
        return GatheredMetric(self.function, lambda tensors: torch.cat(list(tensors)))

    def mean(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The mean over the examples of a batch."""
        with metric_failures(self.name, out.shape, y.shape):
            return _scalar(self.function(out, y))


def _scalar(number: Any) -> torch.Tensor:
    value = torch.as_tensor(number)
    if value.numel() != 1:
        raise ValueError(f"it returns {value.numel()} numbers instead of one")
    return value.reshape(())


def _accuracy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out, labels = _with_labels(out, y)
    return _mean_of_labels(out.argmax(1) == labels, labels)


def _top5(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out, labels = _with_labels(out, y)
    best = out.topk(min(5, out.shape[1]), 1).indices
    return _mean_of_labels((best == labels.unsqueeze(1)).any(1), labels)


def _mean_of_labels(is_right: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return is_right.sum() / _count_kept(labels).clamp_min(1)


def _with_labels(out: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs with their classes in axis 1, and the label of each example, also of one-hot targets."""
    if y.shape == out.shape and y.ndim > 1:
        return out, y.argmax(1)
    if y.is_floating_point() and not bool((y == y.round()).all()):
        raise ValueError("the targets are not labels")
    return _by_classes(out, y)


METRICS: Mapping[str, MeanFunction] = {
    "accuracy": _accuracy,
    "top5": _top5,
    "mae": lambda out, y: (out - y.reshape(out.shape)).abs().mean(),
    "mse": lambda out, y: (out - y.reshape(out.shape)).square().mean(),
}


class Perplexity:
    """Perplexity: the exponential of the mean cross-entropy over all targets."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def update(self, out: torch.Tensor, y: torch.Tensor) -> None:
        """Add the logits and labels of a batch."""
        out, labels = _with_labels(out, y)
        self._total += float(functional.cross_entropy(out, labels, reduction="sum"))
        self._count += int(_count_kept(labels))

    def compute(self) -> torch.Tensor:
        """The perplexity over all batches that were added."""
        return torch.tensor(self._total / self._count, dtype=torch.float64).exp()


def _binary_of_logits(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((out > 0) == (y.reshape(out.shape) > 0.5)).float().mean()


def _binary_of_probabilities(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((out > 0.5) == (y.reshape(out.shape) > 0.5)).float().mean()


def resolve_metrics(
    names: tuple[str, ...], chosen: TorchLoss, out: torch.Tensor, y: torch.Tensor | None
) -> tuple[TorchMetric, ...]:
    """The metrics with these names; without names, the usual metric for such outputs and targets."""
    known = {**METRICS, "perplexity": Perplexity}
    functions: dict[str, Any] = {
        name: find("metric", name, known) for name in names or _default_metrics(chosen, out, y)
    }
    if chosen.is_binary and "accuracy" in functions:
        functions["accuracy"] = _binary_of_logits if chosen.name == "bce" else _binary_of_probabilities
    return tuple(map(TorchMetric, functions, functions.values()))


def _default_metrics(chosen: TorchLoss, out: torch.Tensor, y: torch.Tensor | None) -> tuple[str, ...]:
    if chosen.classifies or chosen.is_binary:
        return ("accuracy",)
    if y is None:
        return ()
    task = infer_task(out.shape[1:], FinalActivation.UNKNOWN, y.cpu().numpy(), is_channels_first=True)
    is_named = chosen.name in LOSSES
    if task.kind is TaskKind.LABELS or (task.kind is TaskKind.SHARES and not is_named):
        return ("accuracy",)
    return () if task.kind is TaskKind.UNKNOWN else ("mae",)


def _double(number: torch.Tensor) -> torch.Tensor:
    """A number in double precision; in single precision on Apple GPUs, which have no double."""
    return number.float() if number.device.type == "mps" else number.double()


LossPart = tuple[torch.Tensor, float]
"""A term of the loss, such as that of one output, as a mean, and the number of examples that it is the mean of."""


class MetricAverager:
    """Averages loss and metrics over batches, with sums over examples that stay on the device."""

    def __init__(self, metrics: Sequence[TorchMetric] = (), *, is_training: bool) -> None:
        self._metrics, self._is_training = metrics, is_training
        self._reset()

    def _reset(self) -> None:
        started = {metric.name: metric.start(is_training=self._is_training) for metric in self._metrics}
        self._accumulators = {name: metric for name, metric in started.items() if metric is not None}
        self._sums: dict[str | int, torch.Tensor] = {}
        """By the number of a loss term or the name of a metric."""
        self._counts: dict[str | int, float] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def update(
        self, parts: Sequence[LossPart], pair: tuple[torch.Tensor, torch.Tensor] | None = None, count: float = 0.0
    ) -> None:
        """Add loss terms, and for the metrics a pair of outputs and targets in which `count` examples count."""
        for index, (mean, examples) in enumerate(parts):
            self._add(index, mean.detach(), examples)
        if pair is None:
            return
        out, y = pair[0].detach().float(), pair[1]
        self._last = (out, y)
        for metric in self._metrics:
            accumulator = self._accumulators.get(metric.name)
            self._add(metric.name, metric.mean(out, y) if accumulator is None else out.new_zeros(()), count)
            if accumulator is not None:
                with metric_failures(metric.name, out.shape, y.shape):
                    accumulator.update(*((out.cpu(), y.cpu()) if isinstance(accumulator, GatheredMetric) else (out, y)))

    def _add(self, key: str | int, mean: torch.Tensor, count: float) -> None:
        value = _double(mean) * count
        self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._counts[key] = self._counts.get(key, 0.0) + count

    def compute(self) -> dict[str, float]:
        """The means over all processes since the last call, which starts new sums."""
        if not self._sums:
            return {}
        for name, accumulator in self._accumulators.items() if self._last is not None else ():
            with metric_failures(name, *(tensor.shape for tensor in self._last or ())):
                value = _scalar(accumulator.compute())
            self._sums[name] = _double(value.detach().to(self._sums[name].device)) * self._counts[name]
        sums = torch.stack([*self._sums.values()])
        totals = torch.stack([sums, sums.new_tensor([*self._counts.values()])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        keys = [*self._sums]
        self._reset()
        # A count is zero if all labels are ignored.
        means = {key: value / count for key, value, count in zip(keys, *totals.tolist(), strict=True) if count}
        parts = [means[key] for key in keys if isinstance(key, int) and key in means]
        loss = math.fsum(parts) if parts else math.nan
        return {"loss": loss, **{key: means.get(key, math.nan) for key in keys if isinstance(key, str)}}


_OPS = SimpleNamespace(
    cast=lambda tensor, _: tensor.float(),
    exp=torch.exp,
    log=torch.log,
    log_sigmoid=functional.logsigmoid,
    log_softmax=functional.log_softmax,
    mean=torch.mean,
    sigmoid=torch.sigmoid,
    square=torch.square,
    sum=torch.sum,
)


def compared_by_loss(losses: Sequence[TorchLoss], outs: Sequence[torch.Tensor]) -> tuple[DistilledOutput, ...]:
    """How each output is compared with a teacher's, according to its loss."""
    return tuple(
        DistilledOutput(loss.classifies or loss.is_binary, loss.is_binary, loss.activation, min(1, out.ndim - 1))
        for loss, out in zip(losses, outs, strict=False)
    )


def distilled(
    compared: Sequence[DistilledOutput],
    outs: Sequence[torch.Tensor],
    teacher_outs: Sequence[torch.Tensor],
    temperature: float,
) -> torch.Tensor:
    """The sum of the distillation losses of all outputs."""
    parts = []
    for output, out, teacher_out in zip(compared, outs, teacher_outs, strict=False):
        if out.shape != teacher_out.shape:
            raise UsageError(
                f"the teacher's outputs have the shape {tuple(teacher_out.shape)}, the model's {tuple(out.shape)}"
            )
        parts.append(distillation_loss(_OPS, output, teacher_out, out, temperature))
    return torch.stack(parts).sum()
