"""Which nodes of an ONNX graph use a tensor, followed through those that only hand it on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from prunectl.training.onnx import nodes
from prunectl.training.onnx.held import Held

_REAL = frozenset({1, 10, 11, 16})
"""Types of element that a cast may lead to."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """A tensor at an input of a node."""

    name: str
    node: Any
    at: int
    """Number of the node in its graph."""
    place: int
    """Number of the input."""
    order: tuple[int, ...]
    """Which axis of the tensor each axis is that the node sees."""
    shape: tuple[int, ...]
    """As the node sees it."""


class Meetings:
    """The users of every value of a graph."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._users: dict[str, list[tuple[int, Any, int]]] = defaultdict(list)
        for at, node in enumerate(held.proto.graph.node):
            for place, name in enumerate(node.input):
                self._users[name].append((at, node, place))

    def of(self, names: Collection[str]) -> list[Meeting]:
        """Return where these tensors are used, in the order of the graph."""
        found = [
            meeting
            for name in dict.fromkeys(names)
            if name in self._held.weights and self._held.tensor(name).is_float
            for meeting in self._of(name)
        ]
        return sorted(found, key=lambda meeting: meeting.at)

    def _of(self, name: str) -> list[Meeting]:
        shape = self._held.tensor(name).shape
        waiting = [(name, tuple(range(len(shape))))]
        found = []
        # A value has one maker, so that none is seen twice.
        for value, order in waiting:
            for at, node, place in self._users[value]:
                behind = _behind(node, order)
                if behind is None:
                    seen = tuple(shape[axis] for axis in order)
                    found.append(Meeting(name, node, at, place, order, seen))
                elif nodes.output_of(node, 0):
                    waiting.append((nodes.output_of(node, 0), behind))
        return found


def _behind(node: Any, order: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the order of the axes behind a node that hands a tensor on; none if it does something else to it."""
    if node.domain not in nodes.STANDARD:
        return None
    match node.op_type:
        case "Identity":
            return order
        case "Cast" if nodes.setting(node, "to", 0) in _REAL:
            return order
        case "Transpose":
            turned = nodes.setting(node, "perm", tuple(reversed(range(len(order)))))
            return tuple(order[axis] for axis in turned)
        case _:
            return None
