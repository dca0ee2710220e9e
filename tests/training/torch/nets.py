"""Small modules to train, named for what is special about them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Plain(nn.Module):
    """Two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 16)
        self.two = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


class Centred(Plain):
    """Takes a buffer as it is handed over, and moves it while it trains."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def _load_from_state_dict(self, state: Any, prefix: str, *more: Any) -> None:
        self.mean = state.pop(f"{prefix}mean")
        super()._load_from_state_dict(state, prefix, *more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.mean(0).detach())
        return super().forward(x - self.mean)


class Noisy(nn.Module):
    """Convolutions with batch normalisation, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1)))


class Reader(nn.Module):
    """An embedding, an LSTM, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.words(x))[0][:, -1])


class Forked(nn.Module):
    """Two inputs, two outputs, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.left = nn.Linear(12, 3)
        self.right = nn.Linear(12, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([torch.relu(self.shared(a)), torch.relu(self.shared(b))], 1)
        return self.left(both), self.right(both)


class Shares(Plain):
    """Ends in a softmax."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(1)


def squared(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return a loss, as a training step of one's own does."""
    return (module(x) - nn.functional.one_hot(y, 4)).square().mean()


class Pooled(torch.nn.Module):
    """Convolutions, normalised and pooled, whose images are flattened: by a view in training, in prediction, or not."""

    def __init__(self, views: str = "") -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = torch.nn.BatchNorm2d(8), torch.nn.Linear(8 * 9, 4)
        self._views = {"": (), "training": (True,), "predicting": (False,)}[views]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.second(torch.nn.functional.max_pool2d(torch.relu(self.first(x)), 2))))
        return self.head(x.view(len(x), -1) if self.training in self._views else x.flatten(1))


def pooled_by_view_in_training() -> Pooled:
    return Pooled("training")


def pooled_by_view() -> Pooled:
    return Pooled("predicting")


def pooled_by_strided_kernel() -> Pooled:
    """Return one in whose gradient oneDNN would write past its memory if channels came last."""
    network = Pooled()
    network.first, network.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 8, 1, stride=2)
    network.head = torch.nn.Linear(8 * 4, 4)
    return network
