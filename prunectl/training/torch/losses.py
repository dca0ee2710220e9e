"""Losses by name, and the one that fits where none is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from prunectl.errors import UsageError
from prunectl.plugins import find

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_SUM_TOLERANCE = 1e-3


def _cross_entropy(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # The classes are axis 1 for PyTorch; a row of outputs for each word of a sentence has them last.
    if out.ndim == 3 and y.ndim == 2 and y.shape == out.shape[:2]:
        out = out.transpose(1, 2)
    labels = y.reshape(out.shape[0], *out.shape[2:]) if not y.is_floating_point() else y
    return functional.cross_entropy(out, labels.long() if not y.is_floating_point() else labels)


def _nll(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.nll_loss(out, y.long().reshape(out.shape[0], *out.shape[2:]))


def _nll_of_shares(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _nll(out.clamp_min(torch.finfo(out.dtype).tiny).log(), y)


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
    "kl": _alike(lambda out, y: functional.kl_div(functional.log_softmax(out, 1), y, reduction="batchmean")),
    "hinge": _alike(lambda out, y: (1 - out * (2 * y - 1)).clamp_min(0).mean()),
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
        return out.clamp_min(torch.finfo(out.dtype).tiny).log() if self.name == "probabilities" else out


def choose(name: str, out: torch.Tensor, y: torch.Tensor | None) -> Chosen:
    """Return the loss of a name; without one, that which fits outputs and targets."""
    if name:
        found: Any = find("loss", name, LOSSES)
        return Chosen(name, found)
    if y is None:
        raise UsageError("there is no target to learn from, and no --loss", hint="--loss module:function")
    guess = _guess(out, y)
    return Chosen(guess, LOSSES[guess])


def _guess(out: torch.Tensor, y: torch.Tensor) -> str:
    is_label = not y.is_floating_point()
    if is_label and out.ndim >= 2 and out.shape[1] > 1 and y.numel() * out.shape[1] == out.numel():
        return _kind_of_classes(out)
    if is_label and out.ndim == 3 and y.shape == out.shape[:2]:
        return "cross-entropy"
    if y.numel() == out.numel() and bool(((y == 0) | (y == 1)).all()):
        return "bce-probabilities" if bool(((out >= 0) & (out <= 1)).all()) else "bce"
    if y.numel() == out.numel():
        return "mse"
    raise UsageError(
        f"no loss fits outputs of {tuple(out.shape)} and targets of {tuple(y.shape)}",
        hint=f"--loss NAME ({', '.join(LOSSES)}) or --loss module:function",
    )


def _kind_of_classes(out: torch.Tensor) -> str:
    def is_one(sums: torch.Tensor) -> bool:
        return bool(((sums - 1).abs() < _SUM_TOLERANCE).all())

    if bool((out >= 0).all()) and is_one(out.sum(1)):
        return "probabilities"
    return "nll" if bool((out <= 0).all()) and is_one(out.exp().sum(1)) else "cross-entropy"
