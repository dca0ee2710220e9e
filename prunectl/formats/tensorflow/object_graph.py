"""The graph of objects that TensorFlow 2 stores beside its variables: what it called each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.protobuf import BYTES, VARINT, Field, WireError, text
from prunectl.formats.tensorflow.bundle import Bundle
from prunectl.formats.walk import Walk

KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"
NODES, CHILDREN, ATTRIBUTES, SLOTS = 1, 1, 2, 3
NODE_ID, _LOCAL_NAME = 1, 2
_FULL_NAME, CHECKPOINT_KEY = 2, 3
ORIGINAL_ID, SLOT_ID = 1, 3


@dataclass(frozen=True, slots=True)
class Node:
    """An object, and where its description lies in the text of the graph."""

    begin: int
    end: int
    names: Mapping[str, str]
    """TensorFlow's own name of each of its variables, by its key in the checkpoint."""
    children: tuple[tuple[str, int], ...]
    slots: tuple[tuple[int, int], ...]
    """Weights, each with a variable that an optimizer keeps for it."""


@dataclass(frozen=True, slots=True)
class ObjectGraph:
    """Every object that a checkpoint knows."""

    text: memoryview
    nodes: tuple[Node, ...]

    @property
    def full_names(self) -> dict[str, str]:
        """TensorFlow's own name of each variable, by its key in the checkpoint."""
        return {key: name for node in self.nodes for key, name in node.names.items()}


def read(bundle: Bundle) -> ObjectGraph:
    """Return the graph of objects; one without objects for a checkpoint that has names only."""
    walk = Walk(memoryview(bundle.text(KEY, budgets.MAX_OBJECT_GRAPH_BYTES)), budgets.MAX_OBJECT_GRAPH_FIELDS)
    try:
        return ObjectGraph(walk.data, tuple(_node(walk, node) for node in walk.messages(None, NODES)))
    except WireError as error:
        raise InputError(f"{bundle.index} is damaged: its graph of objects holds {error}") from error


def _node(walk: Walk, node: Field) -> Node:
    names: dict[str, str] = {}
    children: list[tuple[str, int]] = []
    slots: list[tuple[int, int]] = []
    for field in walk.fields(node):
        if field.wire != BYTES:
            continue
        if field.number not in {CHILDREN, ATTRIBUTES, SLOTS}:
            continue
        facts = {(fact.number, fact.wire): fact for fact in walk.fields(field)}
        if field.number == CHILDREN:
            children.append((_text(walk, facts, _LOCAL_NAME), _number(facts, NODE_ID)))
        elif field.number == ATTRIBUTES:
            names[_text(walk, facts, CHECKPOINT_KEY)] = _text(walk, facts, _FULL_NAME)
        else:
            slots.append((_number(facts, ORIGINAL_ID), _number(facts, SLOT_ID)))
    return Node(node.begin, node.end, names, tuple(children), tuple(slots))


def _text(walk: Walk, facts: Mapping[tuple[int, int], Field], number: int) -> str:
    found = facts.get((number, BYTES))
    return text(walk.data, found) if found is not None else ""


def _number(facts: Mapping[tuple[int, int], Field], number: int) -> int:
    found = facts.get((number, VARINT))
    return found.value if found is not None else 0
