"""Kilobytes of every kind of network in PyTorch; half of each kernel is zero."""

from __future__ import annotations

import torch
from torch import nn


def _normed(ins: int, outs: int, kernel: int, **more: int) -> nn.Sequential:
    conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False, **more)
    return nn.Sequential(conv, nn.BatchNorm2d(outs))


class ResNet(nn.Module):
    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = _normed(3, 6, 3), _normed(6, 6, 3), _normed(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        return self.head(torch.max_pool2d(x, 2).mean((2, 3)))


class MobileNet(nn.Module):
    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = _normed(3, 6, 3, stride=2), _normed(6, 6, 3, groups=6)
        self.point, self.head = _normed(6, 8, 1), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        six = nn.functional.relu6
        return self.head(six(self.point(six(self.deep(six(self.stem(image)))))).mean((2, 3)))


class LSTM(nn.Module):
    shape = (6, 3)

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(steps)[0][:, -1])


class Transformer(nn.Module):
    shape = (6, 8)

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(words))


class Several(nn.Module):
    shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(7, 2), nn.Linear(7, 5)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([left, right], 1)
        return self.one(both), self.other(both)


NETS = {"ResNet": ResNet, "MobileNet": MobileNet, "LSTM": LSTM, "Transformer": Transformer, "Several": Several}


@torch.no_grad()
def made(name: str) -> nn.Module:
    """Return a network with numbers that only its name decides, ready to predict."""
    torch.manual_seed(len(name))
    net = NETS[name]().eval()
    for key, value in net.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.1 if value.ndim == 1 else torch.randn(value.shape) / 2)
            if value.ndim > 1:
                value[torch.rand(value.shape) < 0.5] = 0
        assert key
    return net
