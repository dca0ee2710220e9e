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
    """Inputs: data, kernel, recurrent kernel, bias, whatever else has units on its last axis. Attributes: units, gates.

    Kernels have gates times units before their last axis, biases on it. Whatever comes out has units on its last axis.
    """
    ATTENTION = "heads"
    """An attention with several heads, from projections to projection.

    Inputs: query, value, key; kernels of query, value and key, (in, heads, width), and of the output, (heads, width,
    out); biases of the same four, (heads, width) and (out); masks.
    """
    CHANNEL_NORM = "norm"
    """Inputs: data, scale, shift, mean, variance; by channel, on axis 1."""
    ELEMENTWISE = "each"
    """Element by element, with broadcasting."""
    CONCAT = "concat"
    """Attributes: axis."""
    SPLIT = "split"
    """Attributes: axis, sizes."""
    SLICE = "slice"
    """Attributes: slices: axis, start, stop, step of each."""
    TRANSPOSE = "transpose"
    """Attributes: order."""
    RESHAPE = "reshape"
    """The same numbers in the same order."""
    ALONG_AXES = "stretch"
    """Windows, pads, means, slices and sizes, along axes that have no channels. Attributes: axes."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class OpNode:
    """An operation."""

    name: str
    op: str
    """As the file calls it."""
    kind: OpKind
    inputs: tuple[str, ...]
    """Those that carry numbers; an empty name is left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WeightView:
    """A weight as an operation sees it."""

    tensor: str
    axes: tuple[int | None, ...]
    """Which axis of the weight each axis is; None for one that was put in."""


@dataclass(frozen=True, slots=True)
class ChannelGraph:
    """A network as a graph."""

    nodes: tuple[OpNode, ...]
    """In an order in which they can run."""
    weights: Mapping[str, Array]
    views: Mapping[str, WeightView]
    """By the name of the value."""
    uses: Mapping[str, int]
    """How often each weight meets an operation."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every value that is known, an open batch counted as 1."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
