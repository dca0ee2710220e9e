"""The graph of objects that TensorFlow 2 stores beside its variables: what it called each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.protobuf import (
    BYTES,
    VARINT,
    BudgetedReader,
    Field,
    WireError,
    fields,
    length_prefix,
    number,
    text,
)
from prunectl.formats.tensorflow.bundle import Bundle
from prunectl.formats.tensorflow.variable_names import OPTIMIZER_ROOTS

KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"
NODES, CHILDREN, ATTRIBUTES, SLOTS = 1, 1, 2, 3
NODE_ID, _LOCAL_NAME = 1, 2
_FULL_NAME, CHECKPOINT_KEY = 2, 3
ORIGINAL_ID, SLOT_ID = 1, 3


@dataclass(frozen=True, slots=True)
class ObjectNode:
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
    nodes: tuple[ObjectNode, ...]

    @property
    def full_names(self) -> dict[str, str]:
        """TensorFlow's own name of each variable, by its key in the checkpoint."""
        return {key: name for node in self.nodes for key, name in node.names.items()}


def read(bundle: Bundle) -> ObjectGraph:
    """Return the graph of objects; one without objects for a checkpoint that has names only."""
    walk = BudgetedReader(memoryview(bundle.text(KEY, budgets.MAX_OBJECT_GRAPH_BYTES)), budgets.MAX_OBJECT_GRAPH_FIELDS)
    try:
        return ObjectGraph(walk.data, tuple(_node(walk, node) for node in walk.messages(None, NODES)))
    except WireError as error:
        raise InputError(f"{bundle.index} is damaged: its graph of objects holds {error}") from error


def _node(walk: BudgetedReader, node: Field) -> ObjectNode:
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
    return ObjectNode(node.begin, node.end, names, tuple(children), tuple(slots))


def _text(walk: BudgetedReader, facts: Mapping[tuple[int, int], Field], number: int) -> str:
    found = facts.get((number, BYTES))
    return text(walk.data, found) if found is not None else ""


def _number(facts: Mapping[tuple[int, int], Field], number: int) -> int:
    found = facts.get((number, VARINT))
    return found.value if found is not None else 0


_REFERENCES = {CHILDREN: (NODE_ID,), SLOTS: (ORIGINAL_ID, SLOT_ID)}


def remove_nodes(graph: ObjectGraph, gone: Collection[int]) -> bytes:
    """Return the text of a graph without some objects and all that refers to them."""
    kept = [at for at in range(len(graph.nodes)) if at not in gone]
    numbers = {old: new for new, old in enumerate(kept)}
    out = bytearray()
    for at in kept:
        node = b"".join(_cleaned(graph.text, graph.nodes[at].begin, graph.nodes[at].end, numbers))
        out += length_prefix(NODES, len(node)) + node
    return bytes(out)


def _cleaned(text: memoryview, begin: int, end: int, numbers: Mapping[int, int]) -> Iterator[bytes]:
    for raw, found in _raw_fields(text, begin, end):
        ids = _REFERENCES.get(found.number, ()) if found.wire == BYTES else ()
        if not ids:
            yield raw
            continue
        said = dict.fromkeys(ids, 0) | {
            inner.number: inner.value for _, inner in _raw_fields(text, found.begin, found.end) if inner.number in ids
        }
        if all(said[key] in numbers for key in ids):
            rest = b"".join(raw for raw, inner in _raw_fields(text, found.begin, found.end) if inner.number not in ids)
            message = b"".join(number(key, new) for key in ids if (new := numbers[said[key]])) + rest
            yield length_prefix(found.number, len(message)) + message


def _raw_fields(text: memoryview, begin: int, end: int) -> Iterator[tuple[bytes, Field]]:
    """Yield the fields of a message, each with all of its bytes."""
    at = begin
    for found in fields(text, begin, end):
        yield bytes(text[at : found.end]), found
        at = found.end


_SIGNS = (frozenset({"_iterations", "_learning_rate"}), frozenset({"beta1_power", "beta2_power"}))
"""What Keras since 2.11 and TensorFlow 1 call what their optimizers have; one with slots needs no sign."""
_WEAK_SIGN = frozenset({"iter", "learning_rate"})
"""What Keras before 2.11 calls it, and perhaps a trainer too, which then has a model as well."""
_WEIGHTS = "_trainable_variables"
"""Under this name Keras 3 lists in an optimizer the weights that it trains."""


@dataclass(frozen=True, slots=True)
class VariableOwnership:
    """Whose the variables are."""

    dead: frozenset[int]
    """Objects that only optimizers lead to, and the optimizers themselves."""
    paths: dict[str, str]
    """How a model leads to each of its variables, by its key; an optimizer may lead there faster and name it."""

    def keys(self, graph: ObjectGraph) -> frozenset[str]:
        """Return the keys of variables that only optimizers lead to."""
        return frozenset(key for number in self.dead for key in graph.nodes[number].names)


def find_ownership(graph: ObjectGraph) -> VariableOwnership:
    """Return what of a graph is there for its optimizers only."""
    nodes = graph.nodes
    optimizers = _optimizers(nodes)
    paths = _paths(nodes, optimizers)
    dead = _reachable(nodes, optimizers) - paths.keys() - _reachable(nodes, _trained(nodes, optimizers))
    named = {key: path for number, path in paths.items() for key in nodes[number].names}
    return VariableOwnership(frozenset(dead), named)


def _optimizers(nodes: tuple[ObjectNode, ...]) -> frozenset[int]:
    found = {number for number, node in enumerate(nodes) if node.slots or _looks_like_optimizer(node, nodes)}
    # A wrapper around an optimizer, such as one that scales losses, goes with it.
    around = {
        number
        for node in nodes
        for name, number in node.children
        if name in OPTIMIZER_ROOTS
        and number < len(nodes)
        and any(child in found for _, child in nodes[number].children)
    }
    return frozenset(found | around) - {0}


def _looks_like_optimizer(node: ObjectNode, nodes: tuple[ObjectNode, ...]) -> bool:
    names = {name for name, _ in node.children}
    are_leaves = all(not nodes[child].children for _, child in node.children if child < len(nodes))
    return any(sign <= names for sign in _SIGNS) or (names >= _WEAK_SIGN and are_leaves)


def _trained(nodes: tuple[ObjectNode, ...], optimizers: Iterable[int]) -> Iterator[int]:
    """Yield the weights that optimizers know: they are none of their own, even if nothing else leads there."""
    for index in optimizers:
        yield from (child for name, child in nodes[index].children if name == _WEIGHTS and child < len(nodes))
        yield from (original for original, _ in nodes[index].slots if original < len(nodes))


def _paths(nodes: tuple[ObjectNode, ...], closed: Collection[int]) -> dict[int, str]:
    """Return the shortest way from the root to each object that can be reached without the closed ones."""
    found = {0: ""} if nodes else {}
    pending = list(found)
    for index in pending:
        for name, child in nodes[index].children:
            if child < len(nodes) and child not in found and child not in closed:
                found[child] = f"{found[index]}/{name}".lstrip("/")
                pending.append(child)
    return found


def _reachable(nodes: tuple[ObjectNode, ...], starts: Iterable[int]) -> set[int]:
    found = set(starts)
    pending = list(found)
    for index in pending:
        for child in (*(child for _, child in nodes[index].children), *(slot for _, slot in nodes[index].slots)):
            if child < len(nodes) and child not in found:
                found.add(child)
                pending.append(child)
    return found


_LISTS = frozenset(
    {
        "keras_api",
        "layers",
        "metrics",
        "non_trainable_variables",
        "optimizer",
        "regularization_losses",
        "signatures",
        "trainable_variables",
        "variables",
    }
)
"""What numbers its variables anew once some are gone."""
PRUNED, _INNER = "pruning_vars", "layer"


def match_objects(wrapped: ObjectGraph, plain: ObjectGraph) -> dict[str, str]:
    """Return the key in the wrapped model of each variable of the plain one that the same names lead to."""
    found: dict[str, str] = {}
    pending = [(0, 0)] if wrapped.nodes and plain.nodes else []
    seen = set(pending)
    for one, other in pending:
        ours, theirs = _inside(wrapped, one), plain.nodes[other]
        found.update(zip(theirs.names, ours.names, strict=False))
        near = dict(ours.children)
        for name, child in theirs.children:
            if name in _LISTS or name not in near:
                continue
            pair = near[name], child
            if pair not in seen and pair[0] < len(wrapped.nodes) and child < len(plain.nodes):
                seen.add(pair)
                pending.append(pair)
    return found


def match_masks(graph: ObjectGraph) -> dict[str, str]:
    """Return the key of the mask of each pruned weight, by the key of the weight."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        for several in _children(graph, node, PRUNED):
            for _, child in several.children:
                members = dict(graph.nodes[child].children)
                weight, mask = (graph.nodes[members[at]].names for at in ("0", "1"))
                found.update(zip(weight, mask, strict=True))
    return found


def _inside(graph: ObjectGraph, number: int) -> ObjectNode:
    """Return an object, or for a pruning wrapper the layer in it."""
    node = graph.nodes[number]
    inner = _children(graph, node, _INNER)
    return inner[0] if inner and _children(graph, node, PRUNED) else node


def _children(graph: ObjectGraph, node: ObjectNode, wanted: str) -> list[ObjectNode]:
    return [graph.nodes[child] for name, child in node.children if name == wanted and child < len(graph.nodes)]
