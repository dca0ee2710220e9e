"""Inlining of ONNX functions, inside of which the converters to fewer bits see nothing."""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.formats.safe_json import require
from prunectl.onnx_graph import MAX_MESSAGE_BYTES, inner_graphs, is_too_large

_GROWTH = 4
_FEW_NODES, _MANY_NODES = 1_000, 100_000
"""Node counts up to which a model may always grow, and beyond which it may never."""
_SMALL_BYTES = 1024
"""Nodes below this size hold no weights that count."""
_CAP = 1 << 62
"""Counts end here: those of nested functions can double with each level."""

_Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class _Size:
    """What a graph or function becomes once the functions that it calls are inlined."""

    nodes: int
    num_bytes: int
    references: int
    """The attributes that take their value from the call, of which each gets a copy."""


def inline_functions(proto: Any, saving: int) -> Any:
    """Inline the functions of a model, unless the copies need more bytes or nodes than they may.

    Weights need `saving` times fewer bytes once they are converted, so their copies may need that many times more.
    """
    if not proto.functions or is_too_large(proto):
        return proto
    functions = {_key(function): function for function in proto.functions}
    calls = {key: {_key(node, is_call=True) for node in _nodes(function)} for key, function in functions.items()}
    sorter = graphlib.TopologicalSorter({key: called & functions.keys() for key, called in calls.items()})
    sizes: dict[_Key, _Size] = {}
    try:
        for key in sorter.static_order():
            sizes[key] = _inlined_size(functions[key], functions, sizes)
    except graphlib.CycleError:
        return proto
    after = _inlined_size(proto.graph, functions, sizes)
    before = [_inlined_size(scope, {}, {}) for scope in (proto.graph, *proto.functions)]
    if after.nodes > min(max(_GROWTH * sum(size.nodes for size in before), _FEW_NODES), _MANY_NODES):
        return proto
    outside = _own_bytes(proto.graph, functions)
    inside = sum(size.num_bytes for size in before) - outside
    if after.num_bytes - outside > min(saving * inside, MAX_MESSAGE_BYTES - proto.ByteSize()):
        return proto
    return require("onnx.inliner", extra="onnx").inline_local_functions(proto)


def _inlined_size(scope: Any, functions: Mapping[_Key, Any], sizes: Mapping[_Key, _Size]) -> _Size:
    num_nodes = references = 0
    num_bytes = _own_bytes(scope, functions)
    for node in _nodes(scope):
        key = _key(node, is_call=True)
        own_references = sum(bool(attribute.ref_attr_name) for attribute in node.attribute)
        if key not in functions:
            num_nodes += 1
            references += own_references
            continue
        size = sizes[key]
        defaults = sum(attribute.ByteSize() for attribute in functions[key].attribute_proto)
        num_nodes += size.nodes
        num_bytes += size.num_bytes + size.references * (_weight_bytes(node) + defaults)
        references += size.references if own_references else 0
    return _Size(min(num_nodes, _CAP), min(num_bytes, _CAP), min(references, _CAP))


def _own_bytes(scope: Any, functions: Mapping[_Key, Any]) -> int:
    """The bytes of the weights in nodes that call no function."""
    return sum(_weight_bytes(node) for node in scope.node if _key(node, is_call=True) not in functions)


def _nodes(scope: Any) -> Iterator[Any]:
    """Yield the nodes of a graph or function and those of the graphs inside them."""
    for node in scope.node:
        yield node
        for _, inner in inner_graphs(node):
            yield from _nodes(inner)


def _weight_bytes(node: Any) -> int:
    num_bytes: int = node.ByteSize()
    return num_bytes if num_bytes >= _SMALL_BYTES else 0


def _key(entry: Any, *, is_call: bool = False) -> _Key:
    """What tells a function from others, in its own message or in a node that calls it."""
    domain = "" if entry.domain == "ai.onnx" else entry.domain
    return domain, entry.op_type if is_call else entry.name, getattr(entry, "overload", "")
