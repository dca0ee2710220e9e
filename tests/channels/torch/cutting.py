"""Cutting what PyTorch saved, and loading what is left without prunectl."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

import torch

from prunectl.channels.prune import ChannelPruneResult, prune_channels
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest


def cut(path: Path, output: Path | None, *, is_trusted: bool = False, **asked: Any) -> ChannelPruneResult:
    """Half of the channels, unless something else is asked."""
    request = PruneRequest(**{"sparsity": 0.5, "pattern": "channel", "inputs": ("1,3,16,16",)} | asked)
    return prune_channels(path, request, Destination(output) if output else None, is_trusted=is_trusted)


def saved(net: Any, path: Path) -> Path:
    """Write the weights alone."""
    torch.save(net.state_dict(), path)
    return path


def built(code: Path, name: str) -> Any:
    """Return the class that was written, made from nothing but its text."""
    home = types.ModuleType("generated")
    exec(compile(code.read_text(), code.name, "exec"), home.__dict__)
    return getattr(home, name)().eval()


def loaded(path: Path, name: str) -> Any:
    """Return the class beside a file with the weights of the file in it."""
    net = built(path.with_suffix(".py"), name)
    net.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return net


def said(net: Any, *inputs: Any) -> list[Any]:
    """What comes out, as arrays."""
    with torch.no_grad():
        return [one.numpy() for one in torch.utils._pytree.tree_leaves(net(*inputs))]


def exported(net: Any, path: Path, *inputs: Any, **more: Any) -> Path:
    """Write a program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, inputs, **more), path)
    return path
