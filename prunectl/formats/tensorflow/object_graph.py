"""The `TrackableObjectGraph` of a TensorFlow 2 checkpoint: names, ownership by optimizers, matching, removal."""

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
    length_prefix,
    number,
    raw_fields,
    text,
)
from prunectl.formats.tensorflow.bundle import Bundle

KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"
NODES, CHILDREN, ATTRIBUTES, SLOTS = 1, 1, 2, 3
NODE_ID, _LOCAL_NAME = 1, 2
_FULL_NAME, CHECKPOINT_KEY = 2, 3
ORIGINAL_ID, SLOT_ID = 1, 3


@dataclass(frozen=True, slots=True)
class ObjectNode:
    """An object, and its byte range in the serialized graph."""

    begin: int
    end: int
    names: Mapping[str, str]
    """TensorFlow's full names of the object's variables, by their keys in the checkpoint."""
    children: tuple[tuple[str, int], ...]
    slots: tuple[tuple[int, int], ...]
    """Pairs of a weight and its slot variable in an optimizer, by node number."""


@dataclass(frozen=True, slots=True)
class ObjectGraph:
    """All objects of a checkpoint."""

    text: memoryview
    nodes: tuple[ObjectNode, ...]

    @property
    def full_names(self) -> dict[str, str]:
        """TensorFlow's full name of each variable, by its key in the checkpoint."""
        return {key: name for node in self.nodes for key, name in node.names.items()}


def read(bundle: Bundle) -> ObjectGraph:
    """The object graph; it is empty for a name-based checkpoint."""
    reader = BudgetedReader(
        memoryview(bundle.text(KEY, budgets.MAX_OBJECT_GRAPH_BYTES)), budgets.MAX_OBJECT_GRAPH_FIELDS
    )
    try:
        return ObjectGraph(reader.data, tuple(_node(reader, node) for node in reader.messages(None, NODES)))
    except WireError as error:
        raise InputError(f"{bundle.index} is damaged: its graph of objects holds {error}") from error


def _node(reader: BudgetedReader, node: Field) -> ObjectNode:
    names: dict[str, str] = {}
    children: list[tuple[str, int]] = []
    slots: list[tuple[int, int]] = []
    for field in reader.fields(node):
        if field.wire != BYTES or field.number not in {CHILDREN, ATTRIBUTES, SLOTS}:
            continue
        members = {(fact.number, fact.wire): fact for fact in reader.fields(field)}
        if field.number == CHILDREN:
            children.append((_text(reader, members, _LOCAL_NAME), _number(members, NODE_ID)))
        elif field.number == ATTRIBUTES:
            names[_text(reader, members, CHECKPOINT_KEY)] = _text(reader, members, _FULL_NAME)
        else:
            slots.append((_number(members, ORIGINAL_ID), _number(members, SLOT_ID)))
    return ObjectNode(node.begin, node.end, names, tuple(children), tuple(slots))


def _text(reader: BudgetedReader, members: Mapping[tuple[int, int], Field], number: int) -> str:
    field = members.get((number, BYTES))
    return text(reader.data, field) if field is not None else ""


def _number(members: Mapping[tuple[int, int], Field], number: int) -> int:
    field = members.get((number, VARINT))
    return field.value if field is not None else 0


_REFERENCES = {CHILDREN: (NODE_ID,), SLOTS: (ORIGINAL_ID, SLOT_ID)}


def remove_nodes(graph: ObjectGraph, removed: Collection[int]) -> bytes:
    """Serialize the graph without some objects and the references to them; the others are renumbered."""
    kept = [index for index in range(len(graph.nodes)) if index not in removed]
    numbers = {old: new for new, old in enumerate(kept)}
    encoded = bytearray()
    for index in kept:
        node = b"".join(_without_references(graph.text, graph.nodes[index].begin, graph.nodes[index].end, numbers))
        encoded += length_prefix(NODES, len(node)) + node
    return bytes(encoded)


def _without_references(text: memoryview, begin: int, end: int, numbers: Mapping[int, int]) -> Iterator[bytes]:
    for raw, field in raw_fields(text, begin, end):
        ids = _REFERENCES.get(field.number, ()) if field.wire == BYTES else ()
        if not ids:
            yield raw
            continue
        references = dict.fromkeys(ids, 0) | {
            inner.number: inner.value for _, inner in raw_fields(text, field.begin, field.end) if inner.number in ids
        }
        if all(references[key] in numbers for key in ids):
            unchanged = b"".join(
                raw for raw, inner in raw_fields(text, field.begin, field.end) if inner.number not in ids
            )
            message = b"".join(number(key, new) for key in ids if (new := numbers[references[key]])) + unchanged
            yield length_prefix(field.number, len(message)) + message


_OPTIMIZER_MARKERS = (frozenset({"_iterations", "_learning_rate"}), frozenset({"beta1_power", "beta2_power"}))
"""Children that mark optimizers of Keras since 2.11 and of TensorFlow 1; an object with slots needs no marker."""
_WEAK_MARKERS = frozenset({"iter", "learning_rate"})
"""Children that mark optimizers of Keras before 2.11; a trainer may have them too, but then also has a model."""
OPTIMIZER_ROOTS = frozenset({"optimizer", "_optimizer", "optimizer_v2"})
"""Names under which a model tracks its optimizer."""
_TRAINED_WEIGHTS = "_trainable_variables"
"""Name under which an optimizer of Keras 3 lists the weights that it trains."""


@dataclass(frozen=True, slots=True)
class VariableOwnership:
    """Which variables belong to optimizers."""

    training_only: frozenset[int]
    """Node numbers of optimizers, and of objects that are only reachable through them."""
    paths: dict[str, str]
    """Path to each variable outside optimizers, by its key; the key may be a shorter path through an optimizer."""

    def keys(self, graph: ObjectGraph) -> frozenset[str]:
        """The keys of variables that are only reachable through optimizers."""
        return frozenset(key for number in self.training_only for key in graph.nodes[number].names)


def find_ownership(graph: ObjectGraph) -> VariableOwnership:
    """The part of a graph that only its optimizers need, by reachability from the root."""
    nodes = graph.nodes
    optimizers = _optimizers(nodes)
    paths = _paths(nodes, optimizers)
    training_only = _reachable(nodes, optimizers) - paths.keys() - _reachable(nodes, _trained_nodes(nodes, optimizers))
    named_paths = {key: path for number, path in paths.items() for key in nodes[number].names}
    return VariableOwnership(frozenset(training_only), named_paths)


def _optimizers(nodes: tuple[ObjectNode, ...]) -> frozenset[int]:
    optimizers = {number for number, node in enumerate(nodes) if node.slots or _looks_like_optimizer(node, nodes)}
    # A wrapper around an optimizer, such as one that scales losses, counts as an optimizer.
    wrappers = {
        number
        for node in nodes
        for name, number in node.children
        if name in OPTIMIZER_ROOTS
        and number < len(nodes)
        and any(child in optimizers for _, child in nodes[number].children)
    }
    return frozenset(optimizers | wrappers) - {0}


def _looks_like_optimizer(node: ObjectNode, nodes: tuple[ObjectNode, ...]) -> bool:
    names = {name for name, _ in node.children}
    are_leaves = all(not nodes[child].children for _, child in node.children if child < len(nodes))
    return any(marker <= names for marker in _OPTIMIZER_MARKERS) or (names >= _WEAK_MARKERS and are_leaves)


def _trained_nodes(nodes: tuple[ObjectNode, ...], optimizers: Iterable[int]) -> Iterator[int]:
    """Yield the weights that optimizers refer to, which are not optimizer state even if nothing else uses them."""
    for index in optimizers:
        yield from (child for name, child in nodes[index].children if name == _TRAINED_WEIGHTS and child < len(nodes))
        yield from (original for original, _ in nodes[index].slots if original < len(nodes))


def _paths(nodes: tuple[ObjectNode, ...], closed: Collection[int]) -> dict[int, str]:
    """Shortest paths (breadth-first) from the root to each object, except those through `closed` objects."""
    paths = {0: ""} if nodes else {}
    pending = list(paths)
    for index in pending:
        for name, child in nodes[index].children:
            if child < len(nodes) and child not in paths and child not in closed:
                paths[child] = f"{paths[index]}/{name}".lstrip("/")
                pending.append(child)
    return paths


def _reachable(nodes: tuple[ObjectNode, ...], starts: Iterable[int]) -> set[int]:
    reached = set(starts)
    pending = list(reached)
    for index in pending:
        for child in (*(child for _, child in nodes[index].children), *(slot for _, slot in nodes[index].slots)):
            if child < len(nodes) and child not in reached:
                reached.add(child)
                pending.append(child)
    return reached


_RENUMBERED_LISTS = frozenset(
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
"""Lists whose variables are renumbered when some are removed."""
PRUNED, _INNER = "pruning_vars", "layer"


def match_objects(wrapped: ObjectGraph, plain: ObjectGraph) -> dict[str, str]:
    """Keys of the plain model's variables, each with the key in the wrapped model at the same path."""
    pairs: dict[str, str] = {}
    pending = [(0, 0)] if wrapped.nodes and plain.nodes else []
    seen = set(pending)
    for wrapped_index, plain_index in pending:
        wrapped_node, plain_node = _unwrapped(wrapped, wrapped_index), plain.nodes[plain_index]
        pairs.update(zip(plain_node.names, wrapped_node.names, strict=False))
        members = dict(wrapped_node.children)
        for name, child in plain_node.children:
            if name in _RENUMBERED_LISTS or name not in members:
                continue
            pair = members[name], child
            if pair not in seen and pair[0] < len(wrapped.nodes) and child < len(plain.nodes):
                seen.add(pair)
                pending.append(pair)
    return pairs


def match_masks(graph: ObjectGraph) -> dict[str, str]:
    """The key of the mask of each pruned weight, by the key of the weight."""
    masks: dict[str, str] = {}
    for node in graph.nodes:
        for group in _children(graph, node, PRUNED):
            for _, child in group.children:
                members = dict(graph.nodes[child].children)
                weight, mask = (graph.nodes[members[name]].names for name in ("0", "1"))
                masks.update(zip(weight, mask, strict=True))
    return masks


def _unwrapped(graph: ObjectGraph, number: int) -> ObjectNode:
    """An object, or the layer inside it if it is a pruning wrapper."""
    node = graph.nodes[number]
    inner = _children(graph, node, _INNER)
    return inner[0] if inner and _children(graph, node, PRUNED) else node


def _children(graph: ObjectGraph, node: ObjectNode, name: str) -> list[ObjectNode]:
    return [
        graph.nodes[child] for child_name, child in node.children if child_name == name and child < len(graph.nodes)
    ]
