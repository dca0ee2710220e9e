"""Losses by name, and the one that fits where none is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from prunectl.errors import PrunectlError, UsageError, first_line
from prunectl.plugins import find
from prunectl.training.monitor import metric_mismatch
from prunectl.training.task import FinalActivation, TargetKind, activation_of_values, infer_task, label_axis

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _cross_entropy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(*_by_classes(out, y))


def _nll(logs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logs, y = _by_classes(logs, y)
    return -(logs * y).sum(1).mean() if y.is_floating_point() else functional.nll_loss(logs, y)


def _nll_of_probabilities(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _nll(_log(out), y)


def _by_classes(out: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs with their classes in axis 1, and targets as labels of type int64, or as a share of each class."""
    axis = label_axis(out.shape[1:], y.shape[1:], is_channels_first=True)
    if axis is None and y.shape == out.shape:
        return out, y.to(out.dtype)
    if y.is_floating_point() and not bool((y == y.round()).all()):
        raise UsageError("the targets are no labels", hint="--loss mse compares numbers with numbers")
    out = out if axis is None else out.movedim(axis, 1)
    return out, y.long().reshape(out.shape[0], *out.shape[2:])


def _log(shares: torch.Tensor) -> torch.Tensor:
    """The logarithm of probabilities: finite at zero, and with a gradient there, which a clamp would take away."""
    return (shares + torch.finfo(shares.dtype).eps).log()


def _kl(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _kl_of_logs(functional.log_softmax(out, 1), y)


def _kl_of_probabilities(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _kl_of_logs(_log(out), y)


def _kl_of_logs(logs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum over the classes of y log(y / p), the mean over all else, as Keras has it."""
    wanted = _shaped(y, logs).to(logs.dtype)
    return functional.kl_div(logs, wanted, reduction="none").sum(1).mean()


_KL = {
    FinalActivation.SOFTMAX: _kl_of_probabilities,
    FinalActivation.SIGMOID: _kl_of_probabilities,
    FinalActivation.LOG_SOFTMAX: _kl_of_logs,
}


def _hinge(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Targets of 0 and 1 are taken for -1 and 1, as Keras does.
    signs = torch.where(((y == 0) | (y == 1)).all(), 2 * y - 1, y)
    return (1 - out * signs).clamp_min(0).mean()


def _elementwise(loss: Callable[..., torch.Tensor]) -> Loss:
    return lambda out, y: loss(out, _shaped(y, out).to(out.dtype))


def _shaped(y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if y.numel() != out.numel():
        mine, theirs = ("x".join(map(str, one.shape[1:])) or "a number" for one in (y, out))
        raise UsageError(
            f"a target is {mine} for each example, and the model gives {theirs}",
            hint="choose other targets (train.npz[x,y]), or a --loss that compares such as these",
        )
    return y.reshape(out.shape)


LOSSES: Mapping[str, Loss] = {
    "cross-entropy": _cross_entropy,
    "nll": _nll,
    "probabilities": _nll_of_probabilities,
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
    """A loss, and what kind of targets it is for."""

    name: str
    loss: Loss

    @property
    def classifies(self) -> bool:
        """Whether it is about which of several classes it is."""
        return self.name in _CLASSIFY

    @property
    def is_binary(self) -> bool:
        """Whether it is about yes or no."""
        return self.name.startswith("bce")

    def logits(self, out: torch.Tensor) -> torch.Tensor:
        """Outputs of a classifier as logits."""
        return _log(out) if self.name == "probabilities" else out

    @property
    def ending(self) -> FinalActivation:
        """What outputs this loss is for, as far as it tells."""
        return _ENDINGS_OF.get(self.name, FinalActivation.UNKNOWN)


_CROSS_ENTROPIES = {
    FinalActivation.SOFTMAX: "probabilities",
    FinalActivation.LOG_SOFTMAX: "nll",
    FinalActivation.UNKNOWN: "cross-entropy",
}
_LOSSES_OF_TASKS: Mapping[TargetKind, Mapping[FinalActivation, str]] = {
    TargetKind.LABELS: _CROSS_ENTROPIES,
    TargetKind.SHARES: {**_CROSS_ENTROPIES, FinalActivation.SIGMOID: "bce-probabilities"},
    TargetKind.BINARY: {
        FinalActivation.SOFTMAX: "bce-probabilities",
        FinalActivation.SIGMOID: "bce-probabilities",
        FinalActivation.UNKNOWN: "bce",
    },
    TargetKind.NUMBERS: {FinalActivation.UNKNOWN: "mse"},
}
"""The loss of a task by the last activation; UNKNOWN stands for all others."""
_ENDINGS_OF = {
    "probabilities": FinalActivation.SOFTMAX,
    "nll": FinalActivation.LOG_SOFTMAX,
    "bce-probabilities": FinalActivation.SIGMOID,
    "cross-entropy": FinalActivation.RAW,
    "bce": FinalActivation.RAW,
}


def resolve_loss(
    name: str, out: torch.Tensor, y: torch.Tensor | None, ending: FinalActivation = FinalActivation.UNKNOWN
) -> TorchLoss:
    """The loss of a name, as the model's last activation needs it; without a name, that of the task.

    Where the activation is unknown the numbers of the outputs have to tell.
    """
    apparent = ending or activation_of_values(out.detach().float().cpu().numpy(), 1)
    if name == "kl":
        return TorchLoss(name, _KL.get(apparent, _kl))
    if name:
        kind = _KINDS_BY_NAME.get(name, TargetKind.UNKNOWN)
        if kind is TargetKind.LABELS and math.prod(out.shape[1:2]) == 1:
            kind = TargetKind.BINARY  # one output for two classes
        name = _loss_of_task(kind, ending) or name
        function: Any = find("loss", name, LOSSES)
        return TorchLoss(name, function)
    if y is None:
        raise UsageError("there is no target to learn from, and no --loss", hint="--loss module:function")
    task = infer_task(out.shape[1:], ending, y.cpu().numpy(), is_channels_first=True)
    name = _loss_of_task(task.kind, apparent)
    if not name:
        raise UsageError(
            f"no loss fits outputs of {tuple(out.shape)} and targets of {tuple(y.shape)}",
            hint=f"--loss NAME ({', '.join(LOSSES)}) or --loss module:function",
        )
    return TorchLoss(name, LOSSES[name])


_KINDS_BY_NAME = {"cross-entropy": TargetKind.LABELS, "bce": TargetKind.BINARY}
"""Losses that mean the same whether a model ends in logits or in probabilities."""


def _loss_of_task(kind: TargetKind, ending: FinalActivation) -> str:
    names = _LOSSES_OF_TASKS.get(kind, {})
    return names.get(ending) or names.get(FinalActivation.UNKNOWN, "")


def without_targets(out: torch.Tensor, ending: FinalActivation) -> TorchLoss:
    """What compares outputs with a teacher's alone: classes where the model ends in them, else numbers."""
    if ending is FinalActivation.UNKNOWN:
        ending = activation_of_values(out.detach().float().cpu().numpy(), 1)
    name = _LOSSES_OF_TASKS[TargetKind.SHARES].get(ending, "mse")
    return TorchLoss(name, LOSSES[name])


Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From outputs and targets to the mean over the examples."""


def _accuracy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out, labels = _with_labels(out, y)
    return (out.argmax(1) == labels).float().mean()


def _top5(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out, labels = _with_labels(out, y)
    best = out.topk(min(5, out.shape[1]), 1).indices
    return (best == labels.unsqueeze(1)).any(1).float().mean()


def _with_labels(out: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs with their classes in axis 1, and the number of the class of each example, which may come as one-hot."""
    if y.shape == out.shape and y.ndim > 1:
        return out, y.argmax(1)
    if y.is_floating_point() and not bool((y == y.round()).all()):
        raise ValueError("the targets are no labels")
    return _by_classes(out, y)


METRICS: Mapping[str, Metric] = {
    "accuracy": _accuracy,
    "top5": _top5,
    "mae": lambda out, y: (out - y.reshape(out.shape)).abs().mean(),
    "mse": lambda out, y: (out - y.reshape(out.shape)).square().mean(),
}


def _binary_of_logits(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((out > 0) == (y.reshape(out.shape) > 0.5)).float().mean()


def _binary_of_probabilities(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((out > 0.5) == (y.reshape(out.shape) > 0.5)).float().mean()


def resolve_metrics(
    names: tuple[str, ...], chosen: TorchLoss, out: torch.Tensor, y: torch.Tensor | None
) -> dict[str, Metric]:
    """Metrics by name; without names, the one that people judge such outputs and targets by."""
    found: dict[str, Any] = {name: find("metric", name, METRICS) for name in names or _default_metrics(chosen, out, y)}
    if chosen.is_binary and "accuracy" in found:
        found["accuracy"] = _binary_of_logits if chosen.name == "bce" else _binary_of_probabilities
    return {name: _checked(name, metric) for name, metric in found.items()}


def _default_metrics(chosen: TorchLoss, out: torch.Tensor, y: torch.Tensor | None) -> tuple[str, ...]:
    if chosen.classifies or chosen.is_binary:
        return ("accuracy",)
    if y is None:
        return ()
    task = infer_task(out.shape[1:], FinalActivation.UNKNOWN, y.cpu().numpy(), is_channels_first=True)
    is_named = chosen.name in LOSSES
    if task.kind is TargetKind.LABELS or (task.kind is TargetKind.SHARES and not is_named):
        return ("accuracy",)
    return () if task.kind is TargetKind.UNKNOWN else ("mae",)


def _checked(name: str, metric: Metric) -> Metric:
    """A metric that says so where it cannot compare outputs with targets."""

    def measure(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        try:
            return _scalar(torch.as_tensor(metric(out, y)))
        except PrunectlError:
            raise
        except Exception as error:
            raise metric_mismatch(name, out.shape, y.shape, first_line(error)) from error

    return measure


def _scalar(found: torch.Tensor) -> torch.Tensor:
    if found.numel() != 1:
        raise ValueError(f"it returns {found.numel()} numbers, and one is due")
    return found.reshape(())


def _double(found: torch.Tensor) -> torch.Tensor:
    """A number in double precision, where its device has that: Apple's GPUs have not."""
    return found.float() if found.device.type == "mps" else found.double()


class RunningMeans:
    """Means over examples, kept as sums."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, count: int, **means: torch.Tensor) -> None:
        """Count some examples with their means."""
        self._count += count
        for name, mean in means.items():
            value = _double(mean.detach()) * count
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self) -> dict[str, float]:
        """The means, over all processes, and begin anew."""
        if not self._count:
            return {}
        names = list(self._sums)
        sums = torch.stack([*(self._sums[name] for name in names), self._sums[names[0]].new_tensor(self._count)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self._sums, self._count = {}, 0
        values = sums.tolist()
        return {name: value / values[-1] for name, value in zip(names, values[:-1], strict=True)}


def distillation_loss(
    losses: Sequence[TorchLoss], outs: Sequence[torch.Tensor], guides: Sequence[torch.Tensor], temperature: float
) -> torch.Tensor:
    """The divergence of classes at a temperature, or the squared distance of numbers.

    The teacher's outputs come as the model's own would: as probabilities where it ends in them.
    """
    parts = []
    for chosen, out, guide in zip(losses, outs, guides, strict=False):
        if out.shape != guide.shape:
            raise UsageError(f"the teacher gives {tuple(guide.shape)}, the model {tuple(out.shape)}")
        if chosen.classifies:
            student = functional.log_softmax(chosen.logits(out.float()) / temperature, 1)
            teacher = functional.log_softmax(chosen.logits(guide) / temperature, 1)
            divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
            parts.append(divergence * temperature**2)
        else:
            parts.append(functional.mse_loss(out.float(), guide))
    return torch.stack(parts).sum()
