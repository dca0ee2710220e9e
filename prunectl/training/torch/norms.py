"""Batch normalisation: its statistics, taken anew or left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from prunectl.training.data.source import Arrays, each

BatchNorm = torch.nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the only name of what all of them are


def still(module: torch.nn.Module, frozen: set[str]) -> list[torch.nn.Module]:
    """Return the normalisations of which something is frozen: they stay as they are altogether."""
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
    seen = 0
    for x in inputs if layers else ():
        count = len(each(x)[0])
        seen += count
        for layer in layers:
            layer.momentum = count / seen  # every example counts the same: the last batch may be a smaller one
        run(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    return len(layers)
