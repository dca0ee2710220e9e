"""Small modules to look at, named for what is special about them."""

from __future__ import annotations

import torch
from torch import nn


class One(nn.Module):
    """A single layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)


class Windows(nn.Module):
    """Convolutions of every kind, a norm, and a layer that nothing ever calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4 * 36, 4)
        self.idle = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        return self.head(x.flatten(1))


class Attentive(nn.Module):
    """A layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[:, 0])


class Gaps(nn.Module):
    """Its outputs are numbers, its gradients are none: the root is infinitely steep at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        return torch.sqrt(y - y) + y


class Chain(nn.Module):
    """Six layers, one after the other."""

    DEPTH = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(self.DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Roots(nn.Module):
    """Its outputs are no numbers where a root is taken of less than nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(self.one(x))
