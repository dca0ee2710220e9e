"""Count the multiply-accumulates (MACs) of each operation of an ONNX model, for one example."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator

from prunectl.formats.base import ModelFile, Operation
from prunectl.formats.budgets import MAX_AXES, MAX_ELEMENTS, MAX_PASSED_OPERATORS
from prunectl.formats.onnx import messages
from prunectl.formats.onnx.messages import GraphProto, NodeProto, ProtoReader, TensorProto, parsing
from prunectl.formats.onnx.shape_rules import RULES, OnnxStep, Shape, UnknownOnnxShapeError, wrap_axis
from prunectl.formats.onnx.tensors import TensorLocator, TensorSource, decode_dense
from prunectl.formats.onnx.usage import CALCULATING, CELLS, PASSING, GraphScope, read_scopes


def _gather(step: OnnxStep) -> Shape:
    numbers = step.numbers(0)
    return tuple(numbers[wrap_axis(index, len(numbers))] for index in step.numbers(1))


def _concat(step: OnnxStep) -> Shape:
    if len(step.inputs) > MAX_AXES:
        raise UnknownOnnxShapeError
    return tuple(number for operand in range(len(step.inputs)) for number in step.numbers(operand))


def _slice(step: OnnxStep) -> Shape:
    numbers = step.numbers(0)
    starts, ends = step.setting("starts", 1), step.setting("ends", 2)
    (stride,) = step.setting("steps", 4, (1,))
    if len(starts) != 1 or len(ends) != 1 or stride == 0:
        raise UnknownOnnxShapeError
    return numbers[starts[0] : ends[0] : stride]


def _paired(calculate: Callable[[int, int], int]) -> Callable[[OnnxStep], Shape]:
    def rule(step: OnnxStep) -> Shape:
        left, right = step.numbers(0), step.numbers(1)
        length = max(len(left), len(right))
        if len(left) not in {1, length} or len(right) not in {1, length}:
            raise UnknownOnnxShapeError
        return tuple(calculate(left[index % len(left)], right[index % len(right)]) for index in range(length))

    return rule


def _quotient(left: int, right: int) -> int:
    if right == 0:
        raise UnknownOnnxShapeError
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


_RULES: dict[str, Callable[[OnnxStep], Shape]] = {
    "Shape": lambda step: step.shape(0),
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "ReduceProd": lambda step: (math.prod(step.numbers(0)),),
    "Add": _paired(operator.add),
    "Sub": _paired(operator.sub),
    "Mul": _paired(operator.mul),
    "Div": _paired(_quotient),
    **dict.fromkeys(("Cast", "Identity", "Squeeze", "Unsqueeze", "Floor", "Ceil"), lambda step: step.numbers(0)),
}
"""Rules that compute the output of an operation from the known values of its inputs (constant folding of shapes)."""


_NUMBERS = frozenset({1, 6, 7})
"""Element types of shapes (int32, int64) and of the scales of Resize (float32)."""
_DEFINED = frozenset({"", "ai.onnx", "com.microsoft"})
"""Domains of the operations that the rules are for."""


class Shapes:
    """Shape inference: the shape and, for short lists of whole numbers, the content of each value of a graph."""

    def __init__(self, reader: ProtoReader, locator: TensorLocator, graph: GraphProto) -> None:
        self._reader, self._locator = reader, locator
        self._declared = dict(messages.value(reader, span) for span in graph.values)
        self._shapes: dict[str, Shape] = {}
        self._values: dict[str, Shape] = {}
        for sparse in graph.sparse:
            self._shapes[sparse.values.name] = sparse.dims
        for tensor in graph.initializers:
            self._know(tensor, tensor.name)
        for node in graph.nodes:
            self._infer(node)

    def of(self, name: str) -> Shape | None:
        """The shape of a value; None if it is not known."""
        return self._shapes.get(name, self._declared.get(name))

    def step(self, node: NodeProto) -> OnnxStep:
        """An operation with the known shapes and values of its inputs."""
        return OnnxStep(
            node, [self.of(name) for name in node.inputs], [self._values.get(name) for name in node.inputs], self._list
        )

    def _list(self, node: NodeProto, name: str) -> Shape | None:
        attribute = node.attributes.get(name)
        return self._reader.numbers(attribute.ints) if attribute is not None and attribute.ints else None

    def _know(self, tensor: TensorProto, name: str) -> None:
        self._keep(name, tensor.dims)
        if (
            tensor.data_type in _NUMBERS
            and len(tensor.dims) <= 1
            and math.prod(tensor.dims) <= MAX_AXES
            and not tensor.external
        ):
            source = self._locator.dense(tensor, name).source
            if isinstance(source, TensorSource):
                numbers = decode_dense(source, self._locator.path).reshape(-1).tolist()
                if all(number == number // 1 for number in numbers):
                    self._values[name] = tuple(map(int, numbers))

    def _infer(self, node: NodeProto) -> None:
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
        except (UnknownOnnxShapeError, ValueError, IndexError, ZeroDivisionError):
            # The shape stays unknown if the inputs are invalid, or not covered by the rules.
            pass
        if node.op not in _RULES:
            return
        try:
            numbers = _RULES[node.op](step)
        except (UnknownOnnxShapeError, ValueError):
            return
        if len(numbers) <= MAX_AXES and all(abs(n) <= MAX_ELEMENTS for n in numbers):
            self._values[output] = numbers

    def _constant(self, node: NodeProto, output: str) -> None:
        for name, attribute in node.attributes.items():
            if name == "value" and attribute.tensor is not None:
                self._know(attribute.tensor, output)
            elif name == "value_ints":
                self._values[output] = self._reader.numbers(attribute.ints)
                self._keep(output, (len(self._values[output]),))

    def _split(self, step: OnnxStep) -> None:
        shape, outputs = step.shape(0), step.node.outputs
        axis = step.axis(len(shape))
        even = -(-shape[axis] // len(outputs))
        default = (*(even,) * (len(outputs) - 1), shape[axis] - even * (len(outputs) - 1))
        for output, length in zip(outputs, step.setting("split", 1, default), strict=True):
            self._keep(output, (*shape[:axis], length, *shape[axis + 1 :]))

    def _keep(self, name: str, shape: Shape) -> None:
        if len(shape) <= MAX_AXES and all(0 <= length <= MAX_ELEMENTS for length in shape):
            self._shapes[name] = shape


_WEIGHT_AT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
"""Index of the weight input, where it is not 1."""


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """The multiply-accumulate operations, for a batch size of 1 where the file leaves it open.

    Operations with unknown shapes, and those in branches, loops and functions, have no count.
    """
    with parsing(model.path) as reader:
        main, *inner = read_scopes(reader, messages.model(reader))
        shapes = Shapes(reader, TensorLocator(model.path), main.graph)
        counted = [
            operation for node in _calculating(main) for operation in _counted(node, main, shapes.step(node), shapes)
        ]
    uncounted = [
        Operation(scope.prefix + node.label, node.op, None, _weight(node, scope))
        for scope in inner
        if not scope.is_training
        for node in _calculating(scope)
    ]
    return (*counted, *uncounted)


def _calculating(scope: GraphScope) -> Iterator[NodeProto]:
    return (node for node in scope.graph.nodes if node.op in CALCULATING)


def _counted(node: NodeProto, scope: GraphScope, step: OnnxStep, shapes: Shapes) -> Iterator[Operation]:
    if node.op in CELLS:
        for operand in (1, 2):
            yield Operation(node.label, node.op, _cell(step, operand), _weight(node, scope, operand))
        return
    output = shapes.of(next(iter(node.outputs), ""))
    try:
        macs = _macs(step, output)
    except (UnknownOnnxShapeError, ValueError, IndexError):
        macs = None
    yield Operation(node.label, node.op, macs, _weight(node, scope))


def _macs(step: OnnxStep, output: tuple[int, ...] | None) -> int:
    op = step.node.op
    weight = step.shape(_WEIGHT_AT.get(op, 1))
    if op == "ConvTranspose":
        return math.prod(step.shape(0)) * math.prod(weight[1:])
    if output is None:
        raise UnknownOnnxShapeError
    if "Conv" in op:
        return math.prod(output) * math.prod(weight[1:])
    if "Gemm" in op:
        return math.prod(output) * weight[1 if step.node.number("transB", 0) else 0]
    if "MatMul" in op:
        return math.prod(output) * step.shape(0)[-1]
    raise UnknownOnnxShapeError


def _cell(step: OnnxStep, operand: int) -> int | None:
    try:
        length, batch, _ = step.shape(0)
        return length * batch * math.prod(step.shape(operand))
    except (UnknownOnnxShapeError, ValueError):
        return None


def _weight(node: NodeProto, scope: GraphScope, operand: int | None = None) -> str:
    """The name of the weight tensor of an operation, traced back through operations such as Transpose."""
    operands = (_WEIGHT_AT.get(node.op, 1), 0) if operand is None else (operand,)
    for index in operands:
        name = node.inputs[index] if index < len(node.inputs) else ""
        current: GraphScope = scope
        for _ in range(MAX_PASSED_OPERATORS + 1):
            owner = current.owner(name)
            if owner is None:
                break
            maker = owner.makers[name]
            if maker is None or maker.op == "Constant":
                return owner.prefix + name
            if maker.op not in PASSING or not maker.inputs:
                break
            current, name = owner, maker.inputs[0]
    return ""
