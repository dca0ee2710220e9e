"""Shapes of the values in the main graph of an ONNX model."""

from __future__ import annotations

import math

from prunectl.formats.onnx import decode, messages
from prunectl.formats.onnx.decode import Source
from prunectl.formats.onnx.proto import Graph, Node, TensorProto
from prunectl.formats.onnx.roles import PASSING
from prunectl.formats.onnx.shapes import RULES
from prunectl.formats.onnx.step import MAX_AXES, MAX_LENGTH, Shape, Step, UnknownShapeError
from prunectl.formats.onnx.tensors import Locator
from prunectl.formats.onnx.values import MAX_NUMBERS, value
from prunectl.formats.onnx.wire import Reader

_NUMBERS = frozenset({1, 6, 7})
"""Types of elements that shapes are made of, and the scales of Resize."""
_DEFINED = frozenset({"", "ai.onnx", "com.microsoft"})
"""Domains whose operations are what the rules take them for."""


class Shapes:
    """What is known of each value, node by node in the order of the graph."""

    def __init__(self, reader: Reader, locator: Locator, graph: Graph) -> None:
        self._reader, self._locator = reader, locator
        self._told = dict(messages.value(reader, span) for span in graph.values)
        self._shapes: dict[str, Shape] = {}
        self._values: dict[str, Shape] = {}
        for sparse in graph.sparse:
            self._shapes[sparse.values.name] = sparse.dims
        for tensor in graph.initializers:
            self._know(tensor, tensor.name)
        for node in graph.nodes:
            self._infer(node)

    def of(self, name: str) -> Shape | None:
        """Return the shape of a value; none when it cannot be known."""
        found = self._shapes.get(name)
        return self._told.get(name) if found is None else found

    def step(self, node: Node) -> Step:
        """Return an operation with what is known of its inputs."""
        return Step(
            node, [self.of(name) for name in node.inputs], [self._values.get(name) for name in node.inputs], self._list
        )

    def _list(self, node: Node, name: str) -> Shape | None:
        attribute = node.attributes.get(name)
        return self._reader.numbers(attribute.ints) if attribute is not None and attribute.ints else None

    def _know(self, tensor: TensorProto, name: str) -> None:
        self._keep(name, tensor.dims)
        if (
            tensor.data_type in _NUMBERS
            and len(tensor.dims) <= 1
            and math.prod(tensor.dims) <= MAX_NUMBERS
            and not tensor.external
        ):
            source = self._locator.dense(tensor, name).source
            if isinstance(source, Source):
                numbers = decode.dense(source, self._locator.path).reshape(-1).tolist()
                if all(number == number // 1 for number in numbers):
                    self._values[name] = tuple(map(int, numbers))

    def _infer(self, node: Node) -> None:
        if not node.outputs:
            return
        output = node.outputs[0]
        if node.op == "Constant":
            self._constant(node, output)
            return
        step = self.step(node)
        try:
            if node.op == "Split":
                self._split(step)
            elif node.op in RULES and (node.domain in _DEFINED or node.op in PASSING):
                self._keep(output, RULES[node.op](step))
        except (UnknownShapeError, ValueError, IndexError, ZeroDivisionError):
            # What the rules make of nonsense is as unknown as what they do not cover.
            pass
        try:
            numbers = value(step)
        except (UnknownShapeError, ValueError):
            return
        if numbers is not None and len(numbers) <= MAX_NUMBERS and all(abs(n) <= MAX_LENGTH for n in numbers):
            self._values[output] = numbers

    def _constant(self, node: Node, output: str) -> None:
        for name, attribute in node.attributes.items():
            if name == "value" and attribute.tensor is not None:
                self._know(attribute.tensor, output)
            elif name == "value_ints":
                self._values[output] = self._reader.numbers(attribute.ints)
                self._keep(output, (len(self._values[output]),))

    def _split(self, step: Step) -> None:
        shape, outputs = step.shape(0), step.node.outputs
        axis = step.axis(len(shape))
        even = -(-shape[axis] // len(outputs))
        default = (*(even,) * (len(outputs) - 1), shape[axis] - even * (len(outputs) - 1))
        for output, length in zip(outputs, step.setting("split", 1, default), strict=True):
            self._keep(output, (*shape[:axis], length, *shape[axis + 1 :]))

    def _keep(self, name: str, shape: Shape) -> None:
        if len(shape) <= MAX_AXES and all(0 <= length <= MAX_LENGTH for length in shape):
            self._shapes[name] = shape
