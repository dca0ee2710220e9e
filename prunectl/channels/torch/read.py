"""From a program of PyTorch to a graph that can be followed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prunectl.channels.graph import Graph, Node
from prunectl.channels.torch.kinds import steps
from prunectl.channels.torch.opening import Opened
from prunectl.channels.torch.run import Network, shapes_of
from prunectl.channels.torch.seen import Seen, is_item
from prunectl.channels.torch.views import uses, views
from prunectl.formats.base import Array, ModelFile


def graph_of(model: ModelFile, found: Opened) -> Graph:
    """Return the operations of a program by what they do to channels; weights are called what the file calls them."""
    weights = _weights(model, found)
    nodes = list(found.module.graph.nodes)
    shapes = shapes_of(Network(found.module), found.light)
    names = {name: found.aliases.get(of, of) for name, of in found.names.items()}
    seen = views(nodes, {name: of for name, of in names.items() if of in weights}, shapes)
    # A copy: what several steps see of a weight is added on the way.
    counted = uses(nodes, dict(seen))
    made: list[Node] = []
    for node in nodes:
        is_operation = node.op == "call_function" and node.name not in seen and not is_item(node)
        if is_operation and _says_numbers(node, shapes):
            made += steps(Seen(node, shapes, seen))
    return Graph(
        nodes=tuple(made),
        weights=weights,
        views=seen,
        uses=counted,
        shapes=shapes,
        inputs=tuple(node.name for node in nodes if node.op == "placeholder" and node.name in shapes),
        outputs=tuple(dict.fromkeys(one.name for one in nodes[-1].all_input_nodes if one.name in shapes)),
    )


def _says_numbers(node: torch.fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether values come out of it, and not a length alone."""
    return node.name in shapes or any(is_item(user) and user.name in shapes for user in node.users)


def _weights(model: ModelFile, found: Opened) -> dict[str, Array]:
    held = {tensor.name: tensor for tensor in model.tensors}
    return {
        name: model.read(held[name])
        for name in dict.fromkeys(found.names.values())
        if held[name].is_float and held[name].shape and name not in found.aliases
    }
