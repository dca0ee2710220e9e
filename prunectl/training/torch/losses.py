"""Losses by name, and the one that fits where none is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from prunectl.errors import UsageError
from prunectl.plugins import find
from prunectl.training.ending import Ending, by_numbers

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _cross_entropy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # The classes are axis 1 for PyTorch; a row of outputs for each word of a sentence has them last.
    if out.ndim == 3 and y.ndim == 2 and y.shape == out.shape[:2]:
        out = out.transpose(1, 2)
    labels = y.reshape(out.shape[0], *out.shape[2:]) if not y.is_floating_point() else y
    return functional.cross_entropy(out, labels.long() if not y.is_floating_point() else labels)


def _nll(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.nll_loss(out, y.long().reshape(out.shape[0], *out.shape[2:]))


def _nll_of_shares(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _nll(_log(out), y)


def _log(shares: torch.Tensor) -> torch.Tensor:
    """The logarithm of probabilities: finite at zero, and with a gradient there, which a clamp would take away."""
    return (shares + torch.finfo(shares.dtype).eps).log()


def _kl(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _kl_of_logs(functional.log_softmax(out, 1), y)


def _kl_of_shares(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _kl_of_logs(_log(out), y)


def _kl_of_logs(logs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum over the classes of y log(y / p), the mean over all else, as Keras has it."""
    wanted = _shaped(y, logs).to(logs.dtype)
    return functional.kl_div(logs, wanted, reduction="none").sum(1).mean()


_KL = {Ending.SOFTMAX: _kl_of_shares, Ending.SIGMOID: _kl_of_shares, Ending.LOG_SOFTMAX: _kl_of_logs}


def _hinge(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Targets of 0 and 1 are taken for -1 and 1, as Keras does.
    signs = torch.where(((y == 0) | (y == 1)).all(), 2 * y - 1, y)
    return (1 - out * signs).clamp_min(0).mean()


def _alike(loss: Callable[..., torch.Tensor]) -> Loss:
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
    "probabilities": _nll_of_shares,
    "bce": _alike(functional.binary_cross_entropy_with_logits),
    "bce-probabilities": _alike(functional.binary_cross_entropy),
    "mse": _alike(functional.mse_loss),
    "mae": _alike(functional.l1_loss),
    "huber": _alike(functional.huber_loss),
    "kl": _kl,
    "hinge": _alike(_hinge),
}
_CLASSIFY = {"cross-entropy", "nll", "probabilities"}


@dataclass(frozen=True, slots=True)
class Chosen:
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
        """Return outputs of a classifier as logits."""
        return _log(out) if self.name == "probabilities" else out

    @property
    def ending(self) -> Ending:
        """What outputs this loss is for, as far as it tells."""
        return _ENDINGS_OF.get(self.name, Ending.UNKNOWN)


_BY_ENDING = {
    Ending.SOFTMAX: "probabilities",
    Ending.LOG_SOFTMAX: "nll",
    Ending.SIGMOID: "bce-probabilities",
}
_ENDINGS_OF = {
    **{name: ending for ending, name in _BY_ENDING.items()},
    "cross-entropy": Ending.RAW,
    "bce": Ending.RAW,
}


def choose(name: str, out: torch.Tensor, y: torch.Tensor | None, ending: Ending = Ending.UNKNOWN) -> Chosen:
    """Return the loss of a name; without one, that which fits outputs and targets.

    The ending is the model's last activation. Where it is unknown the numbers of the outputs have to tell.
    """
    if ending is Ending.UNKNOWN:
        ending = by_numbers(out.detach().float().cpu().numpy(), 1)
    if name == "kl":
        return Chosen(name, _KL.get(ending, _kl))
    if name:
        found: Any = find("loss", name, LOSSES)
        return Chosen(name, found)
    if y is None:
        raise UsageError("there is no target to learn from, and no --loss", hint="--loss module:function")
    guess = _guess(out, y, ending)
    return Chosen(guess, LOSSES[guess])


def without_targets(out: torch.Tensor, ending: Ending) -> Chosen:
    """Return what compares outputs with a teacher's alone: classes where the model ends in them, else numbers."""
    if ending is Ending.UNKNOWN:
        ending = by_numbers(out.detach().float().cpu().numpy(), 1)
    name = _BY_ENDING.get(ending, "mse")
    return Chosen(name, LOSSES[name])


def _guess(out: torch.Tensor, y: torch.Tensor, ending: Ending) -> str:
    is_label = not y.is_floating_point()
    if is_label and out.ndim >= 2 and out.shape[1] > 1 and y.numel() * out.shape[1] == out.numel():
        return _BY_ENDING[ending] if ending in {Ending.SOFTMAX, Ending.LOG_SOFTMAX} else "cross-entropy"
    if is_label and out.ndim == 3 and y.shape == out.shape[:2]:
        return "cross-entropy"
    if y.numel() == out.numel() and bool(((y == 0) | (y == 1)).all()):
        return "bce-probabilities" if ending in {Ending.SIGMOID, Ending.SOFTMAX} else "bce"
    if y.numel() == out.numel():
        return "mse"
    raise UsageError(
        f"no loss fits outputs of {tuple(out.shape)} and targets of {tuple(y.shape)}",
        hint=f"--loss NAME ({', '.join(LOSSES)}) or --loss module:function",
    )
