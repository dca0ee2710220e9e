"""Which objects of a checkpoint are optimizers, and what belongs to them alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from prunectl.formats.tensorflow.object_graph import Node, ObjectGraph
from prunectl.formats.tensorflow.variable_names import OPTIMIZER_ROOTS

_SIGNS = (frozenset({"_iterations", "_learning_rate"}), frozenset({"beta1_power", "beta2_power"}))
"""What Keras since 2.11 and TensorFlow 1 call what their optimizers have; one with slots needs no sign."""
_WEAK_SIGN = frozenset({"iter", "learning_rate"})
"""What Keras before 2.11 calls it, and perhaps a trainer too, which then has a model as well."""
_WEIGHTS = "_trainable_variables"
"""Under this name Keras 3 lists in an optimizer the weights that it trains."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whose the variables are."""

    dead: frozenset[int]
    """Objects that only optimizers lead to, and the optimizers themselves."""
    paths: dict[str, str]
    """How a model leads to each of its variables, by its key; an optimizer may lead there faster and name it."""

    def keys(self, graph: ObjectGraph) -> frozenset[str]:
        """Return the keys of variables that only optimizers lead to."""
        return frozenset(key for number in self.dead for key in graph.nodes[number].names)


def ownership(graph: ObjectGraph) -> Ownership:
    """Return what of a graph is there for its optimizers only."""
    nodes = graph.nodes
    optimizers = _optimizers(nodes)
    paths = _paths(nodes, optimizers)
    dead = _reached(nodes, optimizers) - paths.keys() - _reached(nodes, _trained(nodes, optimizers))
    named = {key: path for number, path in paths.items() for key in nodes[number].names}
    return Ownership(frozenset(dead), named)


def _optimizers(nodes: tuple[Node, ...]) -> frozenset[int]:
    found = {number for number, node in enumerate(nodes) if node.slots or _has_sign(node, nodes)}
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


def _has_sign(node: Node, nodes: tuple[Node, ...]) -> bool:
    names = {name for name, _ in node.children}
    are_leaves = all(not nodes[child].children for _, child in node.children if child < len(nodes))
    return any(sign <= names for sign in _SIGNS) or (names >= _WEAK_SIGN and are_leaves)


def _trained(nodes: tuple[Node, ...], optimizers: Iterable[int]) -> Iterator[int]:
    """Yield the weights that optimizers know: they are none of their own, even if nothing else leads there."""
    for number in optimizers:
        yield from (child for name, child in nodes[number].children if name == _WEIGHTS and child < len(nodes))
        yield from (original for original, _ in nodes[number].slots if original < len(nodes))


def _paths(nodes: tuple[Node, ...], closed: Collection[int]) -> dict[int, str]:
    """Return the shortest way from the root to each object that can be reached without the closed ones."""
    found = {0: ""} if nodes else {}
    pending = list(found)
    for number in pending:
        for name, child in nodes[number].children:
            if child < len(nodes) and child not in found and child not in closed:
                found[child] = f"{found[number]}/{name}".lstrip("/")
                pending.append(child)
    return found


def _reached(nodes: tuple[Node, ...], starts: Iterable[int]) -> set[int]:
    found = set(starts)
    pending = list(found)
    for number in pending:
        for child in (*(child for _, child in nodes[number].children), *(slot for _, slot in nodes[number].slots)):
            if child < len(nodes) and child not in found:
                found.add(child)
                pending.append(child)
    return found
