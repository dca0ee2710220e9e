"""Runs a network on labels in place of numbers, noting which index of which weight each channel is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from prunectl.channels.graph import Graph, Node
from prunectl.channels.labels import LabelArray, Labels, fixed


class Part(StrEnum):
    """What an index of a weight does for its channel."""

    OUT = "out"
    """Makes it."""
    IN = "in"
    """Reads it."""
    BIAS = "bias"
    SCALE = "scale"
    SHIFT = "shift"
    STATE = "state"
    """Means and variances."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Note:
    """The labels along an axis of a weight."""

    tensor: str
    axis: int
    part: Part
    labels: LabelArray
    node: str


class Trace:
    """What is known of a network while it is followed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.labels = Labels()
        self.values: dict[str, LabelArray] = {}
        self.notes: list[Note] = []
        self._readers: dict[str, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for name in node.inputs:
                self._readers[name].append(node)

    def readers(self, node: Node) -> list[Node]:
        """Return the operations that read what one gives."""
        return [reader for name in node.outputs for reader in self._readers[name]]

    def of(self, name: str) -> LabelArray:
        """Return the labels of a value; those of inputs and constants are fixed."""
        found = self.values.get(name)
        return fixed(self.graph.shapes.get(name, ())) if found is None else found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value."""
        return self.graph.shapes[name]

    def note(self, node: Node, name: str, axis: int, part: Part, labels: LabelArray) -> None:
        """Note which channel each index of a weight is, on an axis as the operation sees it."""
        view = self.graph.views[name]
        own = view.axes[axis]
        if own is None:
            self.labels.lock(labels, blame(node))
        else:
            self.notes.append(Note(view.tensor, own, part, labels, node.name))

    def is_view(self, node: Node, place: int) -> bool:
        """Whether an input of an operation is a weight."""
        return place < len(node.inputs) and node.inputs[place] in self.graph.views

    def line(self, node: Node, labels: LabelArray, axis: int) -> LabelArray:
        """Return one label for each index of an axis; where there are more, they are locked."""
        found = self.labels.along(labels, axis)
        if found is None:
            self.labels.lock(labels, f"{blame(node)} mixes channels with positions")
            return np.array(fixed((labels.shape[axis],)))
        return found

    def settle(self) -> None:
        """Unite what several uses of a weight say of it, and lock what only some of them say."""
        said: dict[tuple[str, int], list[Note]] = {}
        for note in self.notes:
            said.setdefault((note.tensor, note.axis), []).append(note)
        for (tensor, _), notes in said.items():
            for note in notes[1:]:
                self.labels.unite(notes[0].labels, note.labels, f"{tensor} is shared")
            if len(notes) != self.graph.uses[tensor]:
                self.labels.lock(notes[0].labels, f"{tensor} is used elsewhere in another way")


def blame(node: Node) -> str:
    """Return an operation as the reason why channels are locked."""
    return f"{node.op} {node.name}"
