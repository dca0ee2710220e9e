"""Layers of every kind, with the shape of one input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear over steps": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "conv1d, strided and dilated": (lambda: nn.Conv1d(3, 4, 3, stride=2, dilation=2), (3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2)), (3, 6, 5)),
    "conv2d, padded": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), stride=(1, 2)), (3, 6, 5)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=(1, 2)), (4, 6, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), padding=(0, 1, 1), stride=(1, 2, 1)), (2, 4, 5, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 4, (3, 2), dilation=(2, 1)), (3, 4, 5)),
    "transposed 2d, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=(3, 2), padding=1, output_padding=(2, 1), groups=2),
        (4, 4, 3),
    ),
    "transposed 2d, cut deeply": (lambda: nn.ConvTranspose2d(2, 3, 2, padding=1), (2, 4, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2)),
}


def made(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer without a bias, in double precision."""
    make, shape = LAYERS[kind]
    torch.manual_seed(len(kind))
    layer = make().double()
    layer.bias = None
    return layer, shape
