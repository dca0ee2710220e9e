"""The network that a cut should equal, by Keras alone: what each layer makes of its lost channels is set to zero."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.channels.prune import ChannelPruneResult
from prunectl.formats.registry import open_model

MAKERS = {"out", "scale", "shift", "state"}


def layers(model: Any) -> Iterator[Any]:
    """Every layer, however deep."""
    for layer in getattr(model, "layers", ()):
        yield layer
        yield from layers(layer)
        if hasattr(layer, "layer"):
            yield layer.layer
            yield from layers(layer.layer)


def silence(model: Any, found: ChannelPruneResult) -> Any:
    """Let a model's layers say nothing in the channels that went."""
    tensors = {tensor.name: tensor for tensor in open_model(Path(found.before.path)).tensors}
    gone: dict[str, set[int]] = {}
    for loss in found.pruned_groups:
        for number in loss.dropped:
            for place, indices in zip(loss.group.axes, loss.group.channel(number), strict=True):
                tensor = tensors[place.tensor]
                is_inside = "depthwise" in tensor.name and tensor.kind.startswith("Separable")
                if place.role in MAKERS and not is_inside:
                    # One that goes channel by channel makes several of each, one beside the other.
                    times = tensor.shape[-1] if tensor.kind.startswith("Depthwise") and len(tensor.shape) > 1 else 1
                    made = {index * times + turn for index in indices for turn in range(times)}
                    gone.setdefault(tensor.layer.rpartition("/")[2], set()).update(made)
    held = {layer.name: layer for layer in layers(model)}
    for name, indices in gone.items():
        _silence(held[name], sorted(indices))
    return model


def _silence(layer: Any, indices: list[int]) -> None:
    call = layer.call

    def silent(*inputs: Any, **words: Any) -> Any:
        made = np.array(call(*inputs, **words))
        made[..., indices] = 0
        return made

    layer.call = silent
