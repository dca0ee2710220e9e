"""Weights as operations of a program see them, followed through those that only hand them on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from prunectl.channels.graph import View
from prunectl.channels.torch.seen import Seen, Shape, op

_HANDED_ON = frozenset({"to", "_to_copy", "contiguous", "clone", "detach", "alias", "lift_fresh_copy"})
_SAME_NUMBERS = frozenset({"view", "reshape", "unsqueeze", "squeeze", "_unsafe_view"})


def views(nodes: Iterable[torch.fx.Node], names: Mapping[str, str], shapes: dict[str, Shape]) -> dict[str, View]:
    """Return the views of weights by the names of values."""
    found: dict[str, View] = {}
    for node in nodes:
        if node.op == "get_attr" and str(node.target) in names and node.name in shapes:
            found[node.name] = View(names[str(node.target)], tuple(range(len(shapes[node.name]))))
        elif node.op == "call_function" and node.all_input_nodes and node.all_input_nodes[0].name in found:
            axes = _axes(Seen(node, shapes, found), found[node.all_input_nodes[0].name].axes)
            if axes is not None:
                found[node.name] = View(found[node.all_input_nodes[0].name].tensor, axes)
    return found


def uses(nodes: Iterable[torch.fx.Node], seen: Mapping[str, View]) -> Counter[str]:
    """Return how often each weight meets an operation that does not only hand it on, or leaves the network."""
    found: Counter[str] = Counter()
    for node in nodes:
        if node.name not in seen:
            read = [*_flat(node.args), *_flat(tuple(node.kwargs.values()))]
            found.update(seen[one.name].tensor for one in read if one.name in seen)
    return found


def _flat(value: object) -> list[torch.fx.Node]:
    if isinstance(value, torch.fx.Node):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [found for one in value for found in _flat(one)] if isinstance(value, list | tuple) else []


def _axes(seen: Seen, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    name = op(seen.node)
    if seen.node.name not in seen.shapes:
        return None
    before, after = seen.shapes[seen.tensors[0]], seen.shapes[seen.node.name]
    if name in _HANDED_ON:
        return axes
    if name in {"t", "numpy_T"}:
        return tuple(reversed(axes))
    if name == "permute":
        return tuple(axes[axis] for axis in seen.arg("dims"))
    if name == "transpose":
        order = list(axes)
        one, other = seen.arg("dim0"), seen.arg("dim1")
        order[one], order[other] = order[other], order[one]
        return tuple(order)
    kept = [length for length in before if length != 1]
    if name in _SAME_NUMBERS and kept == [length for length in after if length != 1]:
        # Only axes of length 1 come and go: the others keep their order.
        longer = iter([axis for axis, length in zip(axes, before, strict=True) if length != 1])
        return tuple(None if length == 1 else next(longer) for length in after)
    return None
