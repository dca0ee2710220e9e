"""Parse the graph of a functional Keras model: calls and their inbound tensors, in the dialects of Keras 1 to 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.formats import budgets
from prunectl.formats.base import Shape
from prunectl.formats.keras.config import listed, part, text
from prunectl.formats.keras.flops.shapes import shape_in


@dataclass(frozen=True, slots=True)
class TensorRef:
    """An output of a call of a layer."""

    layer: str
    node: int
    tensor: int
    shape: Shape | None = None
    """What Keras 3 says of its shape."""


@dataclass(frozen=True, slots=True)
class NodeCall:
    """One use of a layer."""

    layer: str
    description: Mapping[str, Any]
    """The layer as the configuration describes it."""
    node: int
    arguments: tuple[TensorRef, ...] = ()
    named: tuple[tuple[str, TensorRef], ...] = ()
    """What it takes by name; a list has its name several times."""

    @property
    def keywords(self) -> Mapping[str, TensorRef]:
        """The first that each name stands for."""
        return dict(reversed(self.named))

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        """All that it takes."""
        return (*self.arguments, *(source for _, source in self.named))


def name_of(layer: Mapping[str, Any]) -> str:
    """The name of a layer."""
    return text(layer, "name") or text(part(layer, "config"), "name") or text(layer, "class_name")


def parse_calls(model: Any) -> tuple[NodeCall, ...]:
    """Every call in a model whose layers say where their inputs come from."""
    return tuple(call for layer in listed(model) for call in _calls(layer))


def model_ends(model: Any, key: str) -> tuple[TensorRef, ...]:
    """The inputs or the outputs of a model."""
    references = part(model, "config").get(key)
    return tuple(_sources(references, 0))


def _calls(layer: Mapping[str, Any]) -> Iterator[NodeCall]:
    nodes = layer.get("inbound_nodes")
    if not isinstance(nodes, list) or not nodes:
        yield NodeCall(name_of(layer), layer, 0)
        return
    for number, node in enumerate(nodes):
        if isinstance(node, dict):
            named = part(node, "kwargs")
            arguments = tuple(_sources(node.get("args"), 0))
        else:
            named = _named(node)
            arguments = tuple(_sources(node, 0))
        named_inputs = tuple((key, source) for key, value in named.items() for source in _sources(value, 0))
        yield NodeCall(name_of(layer), layer, number, arguments, named_inputs)


def _named(node: Any) -> Mapping[str, Any]:
    """What a node of Keras 2 takes by name: it stands behind each tensor."""
    entries = [node] if _is_reference(node) else node if isinstance(node, list) else []
    return {
        key: value
        for entry in entries
        if _is_reference(entry) and len(entry) > 3 and isinstance(entry[3], dict)
        for key, value in entry[3].items()
    }


def _sources(value: Any, nesting: int) -> Iterator[TensorRef]:
    if nesting > budgets.MAX_INBOUND_DEPTH:
        return
    if _is_reference(value):
        yield from _source(value)
    elif isinstance(value, list):
        for item in value:
            yield from _sources(item, nesting + 1)
    elif isinstance(value, dict):
        config = part(value, "config")
        if _is_reference(config.get("keras_history")):
            yield from _source(config["keras_history"], shape_in(config.get("shape")))
        elif "class_name" not in value:
            for item in value.values():
                yield from _sources(item, nesting + 1)


def _source(reference: list[Any], shape: Shape | None = None) -> Iterator[TensorRef]:
    layer, node, tensor = reference[:3]
    # Keras 2 marks constants with negative numbers.
    if node >= 0 and tensor >= 0:
        yield TensorRef(layer, node, tensor, shape)


def _is_reference(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 3 <= len(value) <= 4
        and isinstance(value[0], str)
        and type(value[1]) is int
        and type(value[2]) is int
    )
