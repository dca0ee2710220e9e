"""Queries, keys and values out of one matrix, as attention of PyTorch takes them apart: three slices say the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prunectl.channels.torch.seen import arguments, op

_BETWEEN: tuple[tuple[str, Mapping[str, int]], ...] = (
    ("contiguous", {}),
    ("squeeze", {"dim": -2}),
    ("transpose", {"dim0": 0, "dim1": -2}),
    ("unsqueeze", {"dim": 0}),
)
"""What stands between what is taken and what was taken apart, from behind."""


def unpack(graph: torch.fx.Graph) -> None:
    """Take parts of the last axis directly where they are moved to the front first."""
    for node in list(graph.nodes):
        found = _origin(node) if node.op == "call_function" and op(node) == "select" else None
        if found is not None:
            whole, width, number = found
            with graph.inserting_before(node):
                cut = graph.call_function(
                    torch.ops.aten.slice.Tensor, (whole, -1, number * width, (number + 1) * width)
                )
                # As it lay in memory before: what follows may see it in another shape without a copy.
                part = graph.call_function(torch.ops.aten.contiguous.default, (cut,))
            cut.meta, part.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    graph.eliminate_dead_code(_is_needed)


def _origin(node: torch.fx.Node) -> tuple[torch.fx.Node, int, int] | None:
    """Return what a part is taken from, how wide it is, and which it is."""
    said = arguments(node)
    if said["dim"] != 0 or type(said["index"]) is not int or said["index"] < 0:
        return None
    above = said["self"]
    for name, wanted in _BETWEEN:
        held = arguments(above) if isinstance(above, torch.fx.Node) and above.op == "call_function" else {}
        if not held or op(above) != name or any(held.get(key) != value for key, value in wanted.items()):
            return None
        above = held["self"]
    if above.op != "call_function" or op(above) != "unflatten":
        return None
    held = arguments(above)
    sizes = held["sizes"]
    if held["dim"] != -1 or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        return None
    return held["self"], sizes[1], said["index"]


def _is_needed(node: torch.fx.Node) -> bool:
    """Whether an operation may do more than give a value: only what took the parts apart goes."""
    names = {"unflatten", *(name for name, _ in _BETWEEN)}
    return node.op != "call_function" or op(node) not in names
