"""The messages of an ONNX file that matter here, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

FLOATS, INT32S, INT64S, RAW, DOUBLES, UINT64S = 4, 5, 7, 9, 10, 11
"""Fields of a tensor that hold its elements."""


class Span(NamedTuple):
    """Where a message lies."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorProto:
    """A tensor as the file words it."""

    name: str = ""
    dims: tuple[int, ...] = ()
    data_type: int = 0
    data: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    """The runs of each field of elements."""
    external: Mapping[str, str] | None = None
    is_segment: bool = False


@dataclass(frozen=True, slots=True)
class SparseProto:
    """The values that are not zero, and their places."""

    values: TensorProto
    indices: TensorProto
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """A setting of a node: whichever of these the file gives."""

    number: int = 0
    real: float = 0.0
    text: str = ""
    ints: tuple[Span, ...] = ()
    floats: tuple[Span, ...] = ()
    tensor: TensorProto | None = None
    sparse: SparseProto | None = None
    graphs: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a graph."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    @property
    def label(self) -> str:
        """What to call it: its name, else that of its first output."""
        return self.name or next(iter(self.outputs), "") or self.op

    def number(self, name: str, default: int) -> int:
        """An attribute that is a whole number."""
        attribute = self.attributes.get(name)
        return default if attribute is None else attribute.number


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes and what they are given."""

    nodes: tuple[Node, ...]
    initializers: tuple[TensorProto, ...] = ()
    sparse: tuple[SparseProto, ...] = ()
    values: tuple[Span, ...] = ()
    """What the file says of shapes: inputs, outputs and values between them."""


@dataclass(frozen=True, slots=True)
class Model:
    """What stands around the graph."""

    ir_version: int
    producer: str
    opsets: Mapping[str, int]
    graph: Span
    functions: tuple[Span, ...]
    training: tuple[Span, ...]
