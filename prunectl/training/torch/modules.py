"""What is done to a network as a whole: normalisations frozen or recalibrated, images laid channels last in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from prunectl.errors import UsageError
from prunectl.training.data.source import Arrays, as_tuple
from prunectl.training.torch._compat import BatchNorm


def frozen_batch_norms(module: torch.nn.Module, frozen: set[str]) -> list[torch.nn.Module]:
    """The normalisations of which something is frozen: they stay as they are altogether."""
    return [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, BatchNorm) and any(f"{name}.{part}" in frozen for part in dict(layer.state_dict()))
    ]


def recalibrate(module: torch.nn.Module, inputs: Iterable[Arrays], run: Callable[[Arrays], None]) -> int:
    """Average the statistics over all examples, and return how many layers have some."""
    layers = [one for one in module.modules() if isinstance(one, BatchNorm) and one.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    total = 0
    for x in inputs if layers else ():
        count = len(as_tuple(x)[0])
        total += count
        for layer in layers:
            layer.momentum = count / total  # every example counts the same: the last batch may be a smaller one
        run(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    return len(layers)


_ONEDNN_BLOCK = 16
"""Channels that oneDNN computes at once, at most: 8 with AVX2, 16 with AVX-512."""


def _is_written_past(layer: torch.nn.Conv2d) -> bool:
    """Whether oneDNN corrupts memory in its gradient if channels come last (uxlfoundation/oneDNN#6035)."""
    is_strided = set(layer.kernel_size) == {1} and max(layer.stride) > 1
    return is_strided and layer.in_channels // layer.groups < _ONEDNN_BLOCK


def lay_channels_last(module: torch.nn.Module, run: Callable[[bool], object]) -> bool:
    """Lay the weights of a network so that channels come last in memory; say whether it runs so, else lay them back.

    Processors convolve and pool such images up to twice as fast. A network that takes a `view` of them does not run
    so. It is tried in training as well, and nothing of that is kept.
    """
    convolutions = [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d)]
    if not convolutions or any(map(_is_written_past, convolutions)):
        return False
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run(False)
            run(True)
    except (UsageError, ValueError):
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return False
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return True
