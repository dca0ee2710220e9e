"""The network that a cut should equal, by PyTorch alone: every layer's lost channels set to zero as they come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from prunectl.channels.prune import ChannelPruneResult
from tests.channels.nets import nn

MAKERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)


def lost(found: ChannelPruneResult) -> dict[str, list[int]]:
    """The numbers of the outputs that went, by the name of a weight."""
    gone: dict[str, list[int]] = {}
    for loss in found.pruned_groups:
        for number in loss.dropped:
            for place, indices in zip(loss.group.axes, loss.group.channel(number), strict=True):
                if place.role in {"out", "scale"}:
                    gone.setdefault(place.tensor, []).extend(indices)
    return gone


def masked(net: Any, found: ChannelPruneResult, images: Any) -> Any:
    """What a network says when these channels say nothing."""
    gone = lost(found)
    names = set(dict(net.named_parameters()))
    assert gone.keys() <= names
    for name, module in net.named_modules():
        if isinstance(module, MAKERS) and (indices := gone.get(f"{name}.weight")):

            def silence(module: Any, _: Any, made: Any, indices: list[int] = indices) -> Any:
                made = made.clone()
                made[(..., indices) if isinstance(module, nn.Linear) else (slice(None), indices)] = 0
                return made

            module.register_forward_hook(silence)
    with torch.no_grad():
        return net(images).numpy()


def run(path: Path, images: Any) -> Any:
    """What a file says of images."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: np.asarray(images)})[0])
