"""Dependency groups: channels on the same axes of the same weights, and the indices that each channel has there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from prunectl.channels.adapter import GraphAdapter, open_adapter
from prunectl.channels.graph import ChannelGraph, OpKind
from prunectl.channels.labels import FIXED, AxisRole, LabelArray, LabelTrace
from prunectl.channels.rules import propagate
from prunectl.formats.base import ModelFile
from prunectl.pruning.masks import Mask
from prunectl.training.backend import LoadOptions


@dataclass(frozen=True, slots=True)
class TensorAxis:
    """An axis of a weight, and the role of the weight for the channels on that axis."""

    tensor: str
    axis: int
    role: AxisRole


@dataclass(frozen=True, slots=True, eq=False)
class ChannelSlices:
    """The indices of every channel of a group on one axis, in the order of the channels."""

    indices: LabelArray
    counts: LabelArray
    """The number of indices of each channel."""

    def of(self, channels: Mask) -> LabelArray:
        """The indices of some channels."""
        return self.indices[np.repeat(channels, self.counts)]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Channels that lie on the same axes; a channel is removed from all of these axes, or from none."""

    name: str
    """The first weight that produces the channels."""
    axes: tuple[TensorAxis, ...]
    labels: LabelArray
    """One label for each channel."""
    slices: tuple[ChannelSlices, ...]
    """For each axis, the indices of the channels."""
    locked_because: str = ""
    """Why the channels cannot be removed; empty if they can."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def producers(self) -> tuple[str, ...]:
        """The weights that produce these channels."""
        return tuple(dict.fromkeys(axis.tensor for axis in self.axes if axis.role is AxisRole.OUT))

    def channel(self, number: int) -> list[tuple[int, ...]]:
        """The indices of a channel on each axis."""
        channels = np.arange(len(self)) == number
        return [tuple(slices.of(channels).tolist()) for slices in self.slices]


@dataclass(frozen=True, slots=True)
class PrunedGroup:
    """The channels that are removed from a group."""

    group: ChannelGroup
    dropped: tuple[int, ...]
    """The positions of the removed channels in the group."""

    @property
    def labels(self) -> LabelArray:
        """The labels of the removed channels."""
        return self.group.labels[list(self.dropped)]


def find_groups(trace: LabelTrace) -> tuple[ChannelGroup, ...]:
    """Group the channels of a network by the axes that they lie on, in the order of its operations."""
    # One record for each axis is enough: `unify_shared` has united the labels of the others with those of the first.
    records = list({(record.tensor, record.axis): record for record in reversed(trace.axis_records)}.values())[::-1]
    labelled = [_by_channel(trace.labels.roots(record.labels)) for record in records]
    axes_of: dict[int, list[int]] = defaultdict(list)
    for number, (roots, _) in enumerate(labelled):
        for root in np.unique(roots).tolist():
            axes_of[root].append(number)
    alike: dict[tuple[tuple[int, ...], str], list[int]] = defaultdict(list)
    for root, numbers in axes_of.items():
        alike[tuple(numbers), trace.labels.reason(root)].append(root)
    groups = []
    for (lies_on, reason), members in alike.items():
        used = (records[number] for number in lies_on)
        axes = tuple(TensorAxis(record.tensor, record.axis, record.role) for record in used)
        labels = np.array(members, np.int64)
        slices = tuple(_slices(*labelled[number], labels) for number in lies_on)
        group = ChannelGroup(axes[0].tensor, axes, labels, slices, reason)
        producers = group.producers
        groups.append(
            replace(group, name=producers[0]) if producers else replace(group, locked_because=reason or _UNPRODUCED)
        )
    return tuple(groups)


_UNPRODUCED = "no weight produces it"
_SHOWN_OPS = 4


def _by_channel(roots: LabelArray) -> tuple[LabelArray, LabelArray]:
    """The labels and the indices of an axis, sorted by label, without indices that belong to no channel."""
    order = np.argsort(roots, kind="stable")
    order = order[roots[order] != FIXED]
    return roots[order], order


def _slices(roots: LabelArray, indices: LabelArray, labels: LabelArray) -> ChannelSlices:
    # searchsorted needs ascending labels: all channels of a group first appear on the same axis, sorted by np.unique.
    own = np.isin(roots, labels)
    bounds = np.searchsorted(roots[own], labels)
    return ChannelSlices(indices[own], np.diff(bounds, append=int(own.sum())))


ORIGIN = LoadOptions()


@dataclass(frozen=True, slots=True)
class ChannelGroups:
    """The dependency groups of a model."""

    path: str
    groups: tuple[ChannelGroup, ...]
    missing_because: str = ""
    """Why the model has no groups; empty if it has some."""

    @property
    def channels(self) -> int:
        """The number of channels."""
        return sum(map(len, self.groups))

    @property
    def prunable(self) -> int:
        """The number of channels that are not locked."""
        return sum(len(group) for group in self.groups if not group.locked_because)


def channel_groups(model: ModelFile, origin: LoadOptions = ORIGIN) -> ChannelGroups:
    """Find the dependency groups of a model."""
    adapter = open_adapter(model, origin)
    groups = find_groups(propagate(adapter.graph))
    reason = "" if groups else why_no_channels(adapter.graph)
    return ChannelGroups(str(model.path), tuple(_with_names_of_file(group, adapter) for group in groups), reason)


def why_no_channels(graph: ChannelGraph) -> str:
    """Why a graph has no channels: unknown operations, without those that read the output of another unknown one."""
    unknown = [node for node in graph.nodes if node.kind is OpKind.UNKNOWN]
    behind = {value for node in unknown for value in node.outputs}
    names = [*dict.fromkeys(node.op for node in unknown if behind.isdisjoint(node.inputs))]
    listed = ", ".join(names[:_SHOWN_OPS]) + (", …" if len(names) > _SHOWN_OPS else "")
    return f"its operations are unknown ({listed})" if names else "no weight produces channels"


def _with_names_of_file(group: ChannelGroup, adapter: GraphAdapter) -> ChannelGroup:
    copied_from = adapter.copied_from
    return replace(
        group, axes=tuple(replace(axis, tensor=copied_from.get(axis.tensor, axis.tensor)) for axis in group.axes)
    )
