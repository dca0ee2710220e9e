"""A program of PyTorch without some channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from prunectl.channels.after import After
from prunectl.channels.source import Axes
from prunectl.channels.torch.numbers import renumber
from prunectl.channels.torch.opening import Opened
from prunectl.channels.torch.run import Network
from prunectl.channels.torch.tracing import quietly


def cut(found: Opened, axes: Mapping[str, Axes], after: After, replaced: Mapping[str, torch.Tensor]) -> Network:
    """Return the smaller program, its weights slices of those of the larger, or of what replaces them."""
    values = dict(replaced)
    for name, of in found.names.items():
        own = axes.get(found.aliases.get(of, of))
        if own is not None:
            values[name] = sliced(values.get(name, attribute(found.module, name)), own)
    with quietly():
        graph = copy.deepcopy(found.module.graph)
        renumber(graph, after)
        graph.lint()
        return Network(torch.fx.GraphModule(found.module, graph), values)


def sliced(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    """Return a tensor without some indices of some axes, its memory its own."""
    for axis, indices in axes.items():
        kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
        kept[torch.from_numpy(indices)] = False
        tensor = tensor.index_select(axis, kept.nonzero()[:, 0].to(tensor.device))
    return tensor.detach()


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a weight or a buffer by its name."""
    owner, _, last = name.rpartition(".")
    found = getattr(module.get_submodule(owner), last)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"{name} is no tensor")
    return found
