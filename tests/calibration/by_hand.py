"""Layers of PyTorch as uses of their weights, and what comes out of rows and columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from prunectl.calibration.im2col import im2col, weight_matrix
from prunectl.training.backend import LayerInput, SlidingWindow, WeightUse
from tests.contract import Array


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def use_of(layer: torch.nn.Module) -> WeightUse:
    """How a layer meets its inputs, from what its documentation says of its arguments."""
    if not isinstance(layer, torch.nn.modules.conv._ConvNd):
        return WeightUse(0, 1)
    is_transposed = isinstance(layer, torch.nn.modules.conv._ConvTransposeNd)
    padding: Any = layer.padding
    pads = tuple((pad, pad - more) for pad, more in zip(padding, layer.output_padding, strict=True))
    window = SlidingWindow(layer.stride, layer.dilation, pads, is_transposed)
    axes = (1, 0) if is_transposed else (0, 1)
    return WeightUse(*axes, groups=layer.groups, window=window)


def every_column(inputs: Array, use: WeightUse, kernel: tuple[int, ...]) -> Array:
    return np.concatenate([np.array(piece) for piece in im2col(inputs, use, kernel)])


def product(weights: Array, inputs: Array, use: WeightUse) -> Array:
    """What comes out, as positions by outputs, those of each group side by side."""
    kernel = use.shape or weights.shape
    found = np.einsum("pgf,gof->pgo", every_column(inputs, use, kernel), weight_matrix(weights, use))
    return found.reshape(len(found), -1)


def as_rows(outputs: Array, use: WeightUse) -> Array:
    """A layer's outputs as positions by outputs."""
    if use.window is not None:
        outputs = np.moveaxis(outputs, 1, -1)
    return outputs.reshape(-1, outputs.shape[-1])


def run(layer: torch.nn.Module, inputs: Array) -> Array:
    with torch.no_grad():
        found: Array = layer(torch.from_numpy(inputs)).numpy()
    return found


def of_outputs(use: WeightUse, begin: int, end: int) -> WeightUse:
    return replace(use, outputs=(begin, end))


def shown(inputs: Array, use: WeightUse, name: str = "w") -> LayerInput:
    return LayerInput(name, inputs, use)
