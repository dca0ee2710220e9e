"""A network as operations on named values: framework-free, with weights named as in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from prunectl.formats.base import Array

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""By the names of values or weights."""


class OpKind(StrEnum):
    """What an operation does to channels."""

    CONVOLUTION = "convolution"
    """Inputs: data, kernel, bias. Attributes: groups, is_transposed."""
    LINEAR = "linear"
    """Inputs: data, matrix, bias. Attributes: in_axis of the matrix."""
    EMBEDDING = "embedding"
    """Inputs: table, indices."""
    MATMUL = "product"
    """Two values multiplied as matrices, over their last two axes."""
    RECURRENT = "recurrent"
    """LSTM, GRU or simple RNN. Inputs: data, kernel, recurrent kernel, biases, states. Attributes: units, gates.

    Kernels have gates * units on their second last axis, biases on the last. States and outputs have units on the last.
    An LSTM of images has `positions`, the number of its time steps and pixels, as well.
    """
    ATTENTION = "heads"
    """Multi-head attention, with its input projections and its output projection.

    Inputs: query, value, key; kernels of query, value and key, (in, heads, width), and of the output, (heads, width,
    out); biases of the same four, (heads, width) and (out); masks.
    """
    CHANNEL_NORM = "norm"
    """Inputs: data, scale, shift, mean, variance; channels are on axis 1 of the data."""
    ELEMENTWISE = "each"
    """Elementwise, with broadcasting."""
    CONCAT = "concat"
    """Attributes: axis."""
    SPLIT = "split"
    """Attributes: axis, sizes."""
    SLICE = "slice"
    """Attributes: slices, each with axis, start, stop and step."""
    TRANSPOSE = "transpose"
    """Attributes: order."""
    RESHAPE = "reshape"
    """The same elements in the same order, in another shape."""
    ALONG_AXES = "stretch"
    """Pooling, padding, reduction, softmax or resizing along axes; channels on these are locked. Attributes: axes."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class OpNode:
    """An operation."""

    name: str
    op: str
    """The name of its type in the file, such as Conv."""
    kind: OpKind
    inputs: tuple[str, ...]
    """The names of its data and weights; an empty name stands for an optional input that is left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WeightView:
    """A value that is a stored weight, possibly with its axes permuted, removed or added."""

    tensor: str
    """The name of the stored weight."""
    axes: tuple[int | None, ...]
    """For each axis of the view the axis of the stored weight; None for an added axis."""


@dataclass(frozen=True, slots=True)
class ChannelGraph:
    """A network as a graph."""

    nodes: tuple[OpNode, ...]
    """In topological order."""
    weights: Mapping[str, Array]
    views: Mapping[str, WeightView]
    """The values that are weights or views of weights, by name."""
    uses: Mapping[str, int]
    """How many times operations read each weight or a view of it; making a view does not count."""
    shapes: Mapping[str, tuple[int, ...]]
    """The known shapes of values; an open batch axis counts as 1."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
