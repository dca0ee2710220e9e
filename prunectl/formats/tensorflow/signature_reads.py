"""Which variables the functions of a SavedModel are given, those that save and restore it left aside."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.errors import InputError
from prunectl.formats.protobuf import BYTES, Field, WireError, text
from prunectl.formats.tensorflow.saved_model_graph import SavedGraph
from prunectl.formats.walk import Walk

_NODES = 1
_NAME, _OPERATION, _INPUT, _ATTRIBUTES = 1, 2, 3, 5
_KEY, _VALUE, _STRING, _FUNCTION, _FUNCTION_NAME = 1, 2, 2, 10, 1
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_OWN = ("traced_save", "traced_restore")


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    operation: str
    inputs: tuple[str, ...]
    shared_name: str
    function: str


def variables_read(graph: SavedGraph) -> frozenset[str]:
    """Return the names of variables that are handed to a function other than those that save and restore."""
    try:
        nodes = [_node(graph.walk, node) for found in graph.graphs for node in graph.walk.messages(found, _NODES)]
    except WireError as error:
        raise InputError(f"{graph.path} is damaged: its graph holds {error}") from error
    handles = {node.name: node.shared_name for node in nodes if node.operation == "VarHandleOp"}
    calls = (node for node in nodes if node.operation in _CALLS and not any(own in node.function for own in _OWN))
    return frozenset(handles[name] for call in calls for name in call.inputs if name in handles)


def _node(walk: Walk, node: Field) -> _Node:
    name = operation = shared_name = function = ""
    inputs = []
    for field in walk.fields(node):
        if field.wire != BYTES:
            continue
        if field.number == _NAME:
            name = text(walk.data, field)
        elif field.number == _OPERATION:
            operation = text(walk.data, field)
        elif field.number == _INPUT:
            inputs.append(text(walk.data, field).lstrip("^").partition(":")[0])
        elif field.number == _ATTRIBUTES and operation in {"VarHandleOp", *_CALLS}:
            key = "".join(text(walk.data, found) for found in walk.messages(field, _KEY))
            for value in walk.messages(field, _VALUE):
                if key == "shared_name":
                    shared_name = "".join(text(walk.data, found) for found in walk.messages(value, _STRING))
                for called in walk.messages(value, _FUNCTION):
                    function += "".join(text(walk.data, found) for found in walk.messages(called, _FUNCTION_NAME))
    return _Node(name, operation, tuple(inputs), shared_name, function)
