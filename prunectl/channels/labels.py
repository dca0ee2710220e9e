"""Channel labels, united by union-find where operations tie channels together, and locked with a reason."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prunectl.channels.graph import ChannelGraph, OpNode

LabelArray: TypeAlias = NDArray[np.int64]
FIXED = 0
"""The label of elements that belong to no channel, or to none that could be removed."""


class UnionFind:
    """Union-find (disjoint sets) over channel labels, with the reasons why some are locked."""

    def __init__(self) -> None:
        self._parents = np.zeros(1, np.int64)
        self._reasons: dict[int, str] = {}

    def fresh(self, count: int) -> LabelArray:
        """New labels."""
        labels = np.arange(len(self._parents), len(self._parents) + count, dtype=np.int64)
        self._parents = np.concatenate([self._parents, labels])
        return labels

    def roots(self, labels: LabelArray) -> LabelArray:
        """The representative of each label."""
        parents = self._parents[labels]
        while not np.array_equal(parents, grandparents := self._parents[parents]):
            parents = grandparents
        return parents

    def unite(self, first: LabelArray, second: LabelArray, reason: str) -> None:
        """Unite labels position by position; channels that meet FIXED are locked for this reason."""
        pairs = np.stack([part.reshape(-1) for part in compact(*np.broadcast_arrays(first, second))])
        for label, other_label in np.unique(self.roots(pairs), axis=1).T:
            low, high = sorted((self._root(int(label)), self._root(int(other_label))))
            if low == FIXED and high != FIXED:
                self._reasons.setdefault(high, reason)
            elif low != high:
                self._parents[high] = low
                if high in self._reasons:
                    self._reasons.setdefault(low, self._reasons.pop(high))

    def lock(self, labels: LabelArray, reason: str) -> None:
        """Keep channels from being cut."""
        for root in np.unique(self.roots(compact(labels)[0])):
            if root != FIXED:
                self._reasons.setdefault(int(root), reason)

    def reason(self, root: int) -> str:
        """Why a channel is locked; empty if it is not."""
        return self._reasons.get(root, "")

    def varies(self, labels: LabelArray, axis: int) -> bool:
        """Whether labels differ along an axis."""
        (small,) = compact(labels)
        roots = self.roots(small)
        return bool((roots != roots.take([0], axis=axis)).any()) if roots.shape[axis] > 1 else False

    def varying(self, labels: LabelArray) -> tuple[int, ...]:
        """The axes along which labels differ."""
        return tuple(axis for axis in range(labels.ndim) if self.varies(labels, axis))

    def along(self, labels: LabelArray, axis: int) -> LabelArray | None:
        """One label for each index of an axis; None if labels also differ along other axes."""
        if set(self.varying(labels)) - {axis % labels.ndim}:
            return None
        first = tuple(slice(None) if number == axis % labels.ndim else 0 for number in range(labels.ndim))
        return np.array(labels[first])

    def _root(self, label: int) -> int:
        while (parent := int(self._parents[label])) != label:
            label = parent
        return label


def compact(*arrays: LabelArray) -> tuple[LabelArray, ...]:
    """Arrays of the same shape, with length 1 on the axes along which all of them are only broadcast."""
    index = tuple(
        slice(0, 1) if all(array.strides[axis] == 0 for array in arrays) else slice(None)
        for axis in range(arrays[0].ndim)
    )
    return tuple(array[index] for array in arrays)


def fixed(shape: tuple[int, ...]) -> LabelArray:
    """The labels of a value without channels."""
    return np.broadcast_to(np.array(FIXED, np.int64), shape)


def spread(line: LabelArray, axis: int, shape: tuple[int, ...]) -> LabelArray:
    """The labels of a value that differ only along one axis, broadcast from the labels of this axis."""
    sizes = [1] * len(shape)
    sizes[axis] = len(line)
    return np.broadcast_to(line.reshape(sizes), shape)


class AxisRole(StrEnum):
    """The role that an axis of a weight has for the channels on it."""

    OUT = "out"
    """The weight produces the channels."""
    IN = "in"
    """The weight reads the channels."""
    BIAS = "bias"
    SCALE = "scale"
    SHIFT = "shift"
    STATE = "state"
    """Running means and variances of a norm."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class AxisRecord:
    """A record that an operation uses an axis of a weight: the label of each index, and the role."""

    tensor: str
    axis: int
    role: AxisRole
    labels: LabelArray
    node: str


class LabelTrace:
    """The labels of all values and weights, as they are propagated through a network."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.labels = UnionFind()
        self.values: dict[str, LabelArray] = {}
        self.axis_records: list[AxisRecord] = []
        self._readers: dict[str, list[OpNode]] = defaultdict(list)
        for node in graph.nodes:
            for name in node.inputs:
                self._readers[name].append(node)

    def readers(self, node: OpNode) -> list[OpNode]:
        """The operations that read an output of a node."""
        return [reader for name in node.outputs for reader in self._readers[name]]

    def labels_of(self, name: str) -> LabelArray:
        """The labels of a value; those of inputs and constants are fixed."""
        labels = self.values.get(name)
        return fixed(self.graph.shapes.get(name, ())) if labels is None else labels

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value."""
        return self.graph.shapes[name]

    def record_axis(self, node: OpNode, name: str, axis: int, role: AxisRole, labels: LabelArray) -> None:
        """Record the channel of each index of a weight; `axis` is an axis of the view that the operation reads."""
        view = self.graph.views[name]
        weight_axis = view.axes[axis]
        if weight_axis is None:
            self.labels.lock(labels, op_title(node))
        else:
            self.axis_records.append(AxisRecord(view.tensor, weight_axis, role, labels, node.name))

    def is_view(self, node: OpNode, position: int) -> bool:
        """Whether an input of an operation is a weight or a view of a weight."""
        return position < len(node.inputs) and node.inputs[position] in self.graph.views

    def labels_along(self, node: OpNode, labels: LabelArray, axis: int) -> LabelArray:
        """One label for each index of an axis; if labels also differ along other axes, they are locked."""
        shared = self.labels.along(labels, axis)
        if shared is None:
            self.labels.lock(labels, f"{op_title(node)} mixes channels with positions")
            return np.array(fixed((labels.shape[axis],)))
        return shared

    def unify_shared(self) -> None:
        """Unite the labels that several uses of a weight give to an axis; lock them if a use gave none."""
        by_axis: dict[tuple[str, int], list[AxisRecord]] = {}
        for record in self.axis_records:
            by_axis.setdefault((record.tensor, record.axis), []).append(record)
        for (tensor, _), records in by_axis.items():
            for record in records[1:]:
                self.labels.unite(records[0].labels, record.labels, f"{tensor} is shared")
            if len(records) != self.graph.uses[tensor]:
                self.labels.lock(records[0].labels, f"{tensor} is also used in a different way elsewhere")


def op_title(node: OpNode) -> str:
    """The name of an operation in the reasons for locks."""
    return f"{node.op} {node.name}"
