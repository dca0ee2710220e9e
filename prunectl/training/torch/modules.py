"""Changes to a whole network: freeze or recalibrate batch normalisation, use channels-last memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from prunectl.errors import UsageError
from prunectl.training.data.source import Arrays, as_tuple
from prunectl.training.torch._compat import BatchNorm


def frozen_batch_norms(module: torch.nn.Module, frozen: set[str]) -> list[torch.nn.Module]:
    """The batch normalisation layers with a frozen tensor: their running statistics are frozen too."""
    return [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, BatchNorm) and any(f"{name}.{part}" in frozen for part in dict(layer.state_dict()))
    ]


def recalibrate(module: torch.nn.Module, inputs: Iterable[Arrays], run: Callable[[Arrays], None]) -> int:
    """Recompute the running statistics of batch normalisation over all examples; return the number of these layers."""
    layers = [norm for norm in module.modules() if isinstance(norm, BatchNorm) and norm.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    total = 0
    for x in inputs if layers else ():
        count = len(as_tuple(x)[0])
        total += count
        for layer in layers:
            layer.momentum = count / total  # every example has the same weight, even if the last batch is smaller
        run(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    return len(layers)


_ONEDNN_BLOCK = 16
"""The most channels that oneDNN computes at once: 8 with AVX2, 16 with AVX-512."""


def _corrupts_memory(layer: torch.nn.Conv2d) -> bool:
    """Whether oneDNN corrupts memory in the gradient of a channels-last convolution (uxlfoundation/oneDNN#6035)."""
    is_strided = set(layer.kernel_size) == {1} and max(layer.stride) > 1
    return is_strided and layer.in_channels // layer.groups < _ONEDNN_BLOCK


def lay_channels_last(module: torch.nn.Module, run: Callable[[bool], object]) -> bool:
    """Convert a network to the channels-last memory format; return whether it runs so, and convert it back if not.

    CPUs convolve and pool such images up to twice as fast. A network that calls `view` on them fails. Both evaluation
    and training are tried, and the buffers that this changes are restored.
    """
    convolutions = [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d)]
    if not convolutions or any(map(_corrupts_memory, convolutions)):
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
