"""Small weights that several operations share only because their numbers are equal: each gets its own, and back."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prunectl.channels.onnx.views import read_by

_FLOATS = frozenset({1, 10, 11})


def untie(proto: Any) -> dict[str, str]:
    """Give each reader of a shared list of numbers a copy; return the originals by the names of the copies.

    Exporters merge equal initializers, so that fresh biases of layers that have nothing to do with each other are one.
    """
    graph = proto.graph
    lists = {tensor.name: tensor for tensor in graph.initializer if _is_list(tensor)}
    inner = Counter(name for node in graph.node for name in read_by(node)[len(node.input) :])
    kept = {port.name for port in (*graph.input, *graph.output)} | inner.keys()
    taken = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    seen: set[str] = set()
    copies: dict[str, str] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in lists or name in kept:
                continue
            if name in seen:
                copy = graph.initializer.add()
                copy.CopyFrom(lists[name])
                copy.name = _unused(name, taken)
                copies[copy.name] = name
                node.input[place] = copy.name
            seen.add(name)
    return copies


def retie(proto: Any, copies: dict[str, str]) -> None:
    """Let readers share again what is still equal."""
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    equal = {
        copy: name
        for copy, name in copies.items()
        if (held[copy].dims, held[copy].raw_data, held[copy].float_data, held[copy].double_data)
        == (held[name].dims, held[name].raw_data, held[name].float_data, held[name].double_data)
    }
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = equal.get(name, name)
    for name in equal:
        proto.graph.initializer.remove(held[name])


def _is_list(tensor: Any) -> bool:
    return len(tensor.dims) == 1 and tensor.data_type in _FLOATS


def _unused(name: str, taken: set[str]) -> str:
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"
