"""A program without some channels: its weights sliced, the lengths that its operations name set right."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from prunectl.channels.adapter import Axes, PrunedShapes
from prunectl.channels.torch.export import TracedModel
from prunectl.channels.torch.fx import OpContext, WeightedProgram, op_name
from prunectl.channels.torch.ops import RULES
from prunectl.channels.torch.tracing import quiet


def update_sizes(graph: torch.fx.Graph, after: PrunedShapes) -> None:
    """Update the lengths in the arguments of operations."""
    shapes, views = dict(after.trace.graph.shapes), dict(after.trace.graph.views)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        op = OpContext(node, shapes, views)
        names = (*op.tensors, *(name for name in op.outputs if name in shapes))
        rule = RULES.get(op_name(node))
        if rule is not None and rule.resize is not None and any(map(after.has_changed, names)):
            rule.resize(op, after)


def prune_program(
    traced: TracedModel, axes: Mapping[str, Axes], after: PrunedShapes, replaced: Mapping[str, torch.Tensor]
) -> WeightedProgram:
    """The smaller program, its weights slices of those of the larger, or of what replaces them."""
    values = dict(replaced)
    for name, tensor in traced.names.items():
        removed = axes.get(traced.aliases.get(tensor, tensor))
        if removed is not None:
            values[name] = delete_tensor_indices(values.get(name, attribute(traced.module, name)), removed)
    with quiet():
        graph = copy.deepcopy(traced.module.graph)
        update_sizes(graph, after)
        graph.lint()
        return WeightedProgram(torch.fx.GraphModule(traced.module, graph), values)


def delete_tensor_indices(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    """A tensor without some indices of some axes, its memory its own."""
    for axis, indices in axes.items():
        kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
        kept[torch.from_numpy(indices)] = False
        tensor = tensor.index_select(axis, kept.nonzero()[:, 0].to(tensor.device))
    return tensor.detach()


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A weight or a buffer by its name."""
    owner, _, last = name.rpartition(".")
    weight = getattr(module.get_submodule(owner), last)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} is no tensor")
    return weight
