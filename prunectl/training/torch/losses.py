"""Losses by name, and the one that fits where none is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from prunectl.errors import PrunectlError, UsageError, first_line
from prunectl.plugins import find
from prunectl.training.backend import FinalActivation, activation_of_values
from prunectl.training.monitor import metric_mismatch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _cross_entropy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # The classes are axis 1 for PyTorch; a row of outputs for each word of a sentence has them last.
    if out.ndim == 3 and y.ndim == 2 and y.shape == out.shape[:2]:
        out = out.transpose(1, 2)
    labels = y.reshape(out.shape[0], *out.shape[2:]) if not y.is_floating_point() else y
    return functional.cross_entropy(out, labels.long() if not y.is_floating_point() else labels)


def _nll(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.nll_loss(out, y.long().reshape(out.shape[0], *out.shape[2:]))


def _nll_of_probabilities(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _nll(_log(out), y)


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


_BY_ENDING = {
    FinalActivation.SOFTMAX: "probabilities",
    FinalActivation.LOG_SOFTMAX: "nll",
    FinalActivation.SIGMOID: "bce-probabilities",
}
_ENDINGS_OF = {
    **{name: ending for ending, name in _BY_ENDING.items()},
    "cross-entropy": FinalActivation.RAW,
    "bce": FinalActivation.RAW,
}


def resolve_loss(
    name: str, out: torch.Tensor, y: torch.Tensor | None, ending: FinalActivation = FinalActivation.UNKNOWN
) -> TorchLoss:
    """The loss of a name; without one, that which fits outputs and targets.

    The ending is the model's last activation. Where it is unknown the numbers of the outputs have to tell.
    """
    if ending is FinalActivation.UNKNOWN:
        ending = activation_of_values(out.detach().float().cpu().numpy(), 1)
    if name == "kl":
        return TorchLoss(name, _KL.get(ending, _kl))
    if name:
        found: Any = find("loss", name, LOSSES)
        return TorchLoss(name, found)
    if y is None:
        raise UsageError("there is no target to learn from, and no --loss", hint="--loss module:function")
    guess = _guess(out, y, ending)
    return TorchLoss(guess, LOSSES[guess])


def without_targets(out: torch.Tensor, ending: FinalActivation) -> TorchLoss:
    """What compares outputs with a teacher's alone: classes where the model ends in them, else numbers."""
    if ending is FinalActivation.UNKNOWN:
        ending = activation_of_values(out.detach().float().cpu().numpy(), 1)
    name = _BY_ENDING.get(ending, "mse")
    return TorchLoss(name, LOSSES[name])


def _guess(out: torch.Tensor, y: torch.Tensor, ending: FinalActivation) -> str:
    is_label = not y.is_floating_point()
    if is_label and out.ndim >= 2 and out.shape[1] > 1 and y.numel() * out.shape[1] == out.numel():
        return (
            _BY_ENDING[ending] if ending in {FinalActivation.SOFTMAX, FinalActivation.LOG_SOFTMAX} else "cross-entropy"
        )
    if is_label and out.ndim == 3 and y.shape == out.shape[:2]:
        return "cross-entropy"
    if y.numel() == out.numel() and bool(((y == 0) | (y == 1)).all()):
        return "bce-probabilities" if ending in {FinalActivation.SIGMOID, FinalActivation.SOFTMAX} else "bce"
    if y.numel() == out.numel():
        return "mse"
    raise UsageError(
        f"no loss fits outputs of {tuple(out.shape)} and targets of {tuple(y.shape)}",
        hint=f"--loss NAME ({', '.join(LOSSES)}) or --loss module:function",
    )


Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From outputs and targets to the mean over the examples."""


def _accuracy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if out.ndim == 3 and y.ndim == 2 and y.shape == out.shape[:2]:
        return (out.argmax(-1) == y).float().mean()
    return (out.argmax(1) == _labels(out, y)).float().mean()


def _top5(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    best = out.topk(min(5, out.shape[1]), 1).indices
    return (best == _labels(out, y).unsqueeze(1)).any(1).float().mean()


def _labels(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The number of the class of each example, which may be said as one-hot."""
    if y.shape == out.shape and y.ndim > 1:
        return y.argmax(1)
    if y.is_floating_point() and not bool((y == y.round()).all()):
        raise ValueError("the targets are no labels")
    return y.reshape(out.shape[0], *out.shape[2:])


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
    is_label = not y.is_floating_point()
    if is_label and out.ndim >= 2 and out.shape[1] > 1 and y.numel() * out.shape[1] == out.numel():
        return ("accuracy",)
    if is_label and out.ndim == 3 and y.shape == out.shape[:2]:
        return ("accuracy",)
    return ("mae",) if y.numel() == out.numel() and not (is_label and chosen.name not in LOSSES) else ()


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
