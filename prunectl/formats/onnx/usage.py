"""Graphs of an ONNX model with the scopes of their names, and the role of each tensor by the operations that use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from prunectl.formats import budgets
from prunectl.formats.base import Role
from prunectl.formats.onnx import messages
from prunectl.formats.onnx.messages import GraphProto, Model, NodeProto, ProtoReader
from prunectl.formats.protobuf import WireError

OutAxis = Callable[[NodeProto, int], int | None]
"""Returns the axis of the output channels, given a node and the rank of its weight."""


@dataclass(frozen=True, slots=True)
class OperandRole:
    """The role of one input of an operation."""

    role: Role
    out_axis: OutAxis = lambda _node, _rank: None
    in_axis: OutAxis = lambda _node, _rank: None
    """The input axis, where it is not the neighbour of the output axis."""


def _axis(number: int) -> OutAxis:
    return lambda _node, rank: number if number < rank else None


def _last(_node: NodeProto, rank: int) -> int | None:
    return rank - 1 if rank > 1 else None


def _second_last(_node: NodeProto, rank: int) -> int | None:
    return rank - 2 if rank > 1 else None


def _fused(node: NodeProto, rank: int) -> int | None:
    return _second_last(node, rank) if node.number("transB", 0) else _last(node, rank)


def _fused_inputs(node: NodeProto, rank: int) -> int | None:
    return _last(node, rank) if node.number("transB", 0) else _second_last(node, rank)


def _gemm(switch: str, plain: int) -> OutAxis:
    return lambda node, _rank: 1 - plain if node.number(switch, 0) else plain


_BIAS_INPUT, _NORM, _STATE = OperandRole(Role.BIAS), OperandRole(Role.NORM), OperandRole(Role.STATE)
_FIRST, _SECOND = OperandRole(Role.KERNEL, _axis(0)), OperandRole(Role.KERNEL, _axis(1))
_COLUMNS, _ROWS = OperandRole(Role.KERNEL, _last), OperandRole(Role.KERNEL, _second_last, _last)
_GEMM = {
    0: OperandRole(Role.KERNEL, _gemm("transA", 0)),
    1: OperandRole(Role.KERNEL, _gemm("transB", 1)),
    2: _BIAS_INPUT,
}
_CELL = {
    1: OperandRole(Role.KERNEL, _axis(1), _axis(2)),
    2: OperandRole(Role.RECURRENT, _axis(1), _axis(2)),
    3: _BIAS_INPUT,
    5: _STATE,
    6: _STATE,
}
_SCALE = {1: _NORM, 2: _NORM}

PARTS: dict[str, dict[int, OperandRole]] = {
    "Conv": {1: _FIRST, 2: _BIAS_INPUT},
    "FusedConv": {1: _FIRST, 2: _BIAS_INPUT},
    "ConvInteger": {1: _FIRST},
    "QLinearConv": {3: _FIRST, 8: _BIAS_INPUT},
    "DeformConv": {1: _FIRST, 3: _BIAS_INPUT},
    "ConvTranspose": {1: _SECOND, 2: _BIAS_INPUT},
    "Gemm": _GEMM,
    "FusedGemm": _GEMM,
    "QGemm": {3: OperandRole(Role.KERNEL, _gemm("transB", 1)), 6: _BIAS_INPUT},
    "MatMul": {0: _ROWS, 1: _COLUMNS},
    "FusedMatMul": {1: OperandRole(Role.KERNEL, _fused, _fused_inputs)},
    "MatMulInteger": {0: _ROWS, 1: _COLUMNS},
    "MatMulIntegerToFloat": {0: _ROWS, 1: _COLUMNS, 6: _BIAS_INPUT},
    "DynamicQuantizeMatMul": {1: _COLUMNS, 4: _BIAS_INPUT},
    "QLinearMatMul": {0: _ROWS, 3: _COLUMNS},
    "MatMulNBits": {1: _FIRST, 5: _BIAS_INPUT},
    "Attention": {1: _COLUMNS, 2: _BIAS_INPUT},
    "QAttention": {1: _COLUMNS, 2: _BIAS_INPUT},
    "Einsum": {0: OperandRole(Role.KERNEL), 1: OperandRole(Role.KERNEL)},
    "LSTM": _CELL,
    "GRU": _CELL,
    "RNN": _CELL,
    "BatchNormalization": {**_SCALE, 3: _STATE, 4: _STATE},
    "InstanceNormalization": _SCALE,
    "LayerNormalization": _SCALE,
    "GroupNormalization": _SCALE,
    "RMSNormalization": _SCALE,
    "SimplifiedLayerNormalization": _SCALE,
    "SkipLayerNormalization": {2: _NORM, 3: _NORM, 4: _BIAS_INPUT},
    "SkipSimplifiedLayerNormalization": {2: _NORM, 3: _BIAS_INPUT},
    "EmbedLayerNormalization": {**dict.fromkeys((2, 3, 4), OperandRole(Role.EMBEDDING)), 5: _NORM, 6: _NORM},
    "BiasGelu": {1: _BIAS_INPUT},
    "FastGelu": {1: _BIAS_INPUT},
    "MultiHeadAttention": {3: _BIAS_INPUT},
    "Gather": {0: OperandRole(Role.EMBEDDING)},
}
"""Roles of inputs, by operation and index of the input."""

PASSING = frozenset(
    {"DequantizeLinear", "QuantizeLinear", "Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze"}
    | {"Quant", "IntQuant", "BipolarQuant", "FloatQuant", "FakeQuant"}
)
"""Operations that preserve the role of their first input: their output is still a weight."""
SPLICING = frozenset({"Slice", "Concat"})
"""Operations that reorder the gates of a recurrent layer on the way to it."""
CELLS = frozenset({"LSTM", "GRU", "RNN"})
_RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze"})

CALCULATING = frozenset(
    operation for operation, parts in PARTS.items() if any(part.role is Role.KERNEL for part in parts.values())
)


def axis_before_transpose(node: NodeProto, axis: int | None, rank: int, order: tuple[int, ...]) -> int | None:
    """The axis of a passing operation's input that becomes ``axis`` of its output; None if unknown."""
    if axis is None or node.op in _RESHAPING:
        return None
    if node.op != "Transpose":
        return axis
    order = order or tuple(reversed(range(rank)))
    return order[axis] if axis < len(order) and 0 <= order[axis] < rank else None


_BETWEEN = PASSING | {"Mul"}
"""Operations that may lie between a product and the addition of its bias."""
_BIAS, _OTHER = OperandRole(Role.BIAS), OperandRole(Role.OTHER)


class OnnxTensorUse(NamedTuple):
    """One input of one node."""

    node: NodeProto
    operand: int
    """Index of the input."""
    scope: GraphScope


@dataclass(frozen=True, slots=True)
class _Call:
    """The call of a function into which a tensor was followed."""

    use: OnnxTensorUse
    function: GraphScope
    node: NodeProto
    """The calling node, with its attributes resolved by the enclosing calls."""
    outer: _Call | None
    label: str
    """The labels of the enclosing calls and of this one, joined by slashes."""

    def behind(self, scope: GraphScope, name: str) -> str:
        """The caller's name of a value that the function returns; empty if it does not return this value."""
        number = self.function.results.get(name) if scope is self.function else None
        return self.node.outputs[number] if number is not None and number < len(self.node.outputs) else ""


@dataclass(frozen=True, slots=True)
class OnnxTensorPurpose:
    """The role of a tensor, with the layer and the operation that use it."""

    role: Role = Role.OTHER
    kind: str = ""
    layer: str = ""
    out_axis: int | None = None
    in_axis: int | None = None


class UsageIndex:
    """The users of every value of a model."""

    def __init__(self, reader: ProtoReader, scopes: tuple[GraphScope, ...]) -> None:
        self._reader = reader
        self._left = budgets.MAX_ONNX_VISITS
        self._functions = {scope.definition.operator: scope for scope in scopes if scope.definition}
        self._users: dict[tuple[int, str], list[OnnxTensorUse]] = {}
        for scope in scopes:
            for node in scope.graph.nodes:
                for index, name in enumerate(node.inputs):
                    owner = scope.owner(name) if name else None
                    if owner is not None:
                        self._users.setdefault((id(owner), name), []).append(OnnxTensorUse(node, index, scope))

    def of(self, scope: GraphScope, name: str) -> list[OnnxTensorUse]:
        """The first MAX_ONNX_USES uses of a value of this graph."""
        return self._users.get((id(scope), name), [])[: budgets.MAX_ONNX_USES]

    def purpose(self, scope: GraphScope, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> OnnxTensorPurpose:
        """The purpose of a tensor: that of its first use with a known role, else of its first use."""
        purposes = list(self._purposes(scope, name, shape, dtype, budgets.MAX_PASSED_OPERATORS))
        known = (purpose for purpose in purposes if purpose.role is not Role.OTHER)
        return next(known, purposes[0] if purposes else OnnxTensorPurpose())

    def _purposes(
        self,
        scope: GraphScope,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        steps: int,
        *,
        call: _Call | None = None,
    ) -> Iterator[OnnxTensorPurpose]:
        for use in self.of(scope, name):
            # Through Concat, the number of paths through a crafted graph may grow exponentially.
            self._left -= 1 if use.node.is_resolved else len(use.node.attributes)
            steps = steps if self._left > 0 else 0
            node = _in_call(use.node, call)
            label = _label(node, call)
            called = self._functions.get(node.operator)
            if steps and called is not None and called.definition is not None:
                # The function uses the tensor as it uses its parameter.
                for parameter in called.definition.inputs[use.operand : use.operand + 1]:
                    inner = _Call(use, called, node, call, label)
                    yield from self._purposes(called, parameter, shape, dtype, steps - 1, call=inner)
                yield OnnxTensorPurpose(kind=node.op, layer=label)
            elif steps and node.outputs and use.operand == 0 and node.op in PASSING:
                for purpose in self._purposes(use.scope, node.outputs[0], shape, dtype, steps - 1, call=call):
                    order = self._order(node)
                    axes = purpose.out_axis, purpose.in_axis
                    if node.is_resolved:
                        out_axis, in_axis = (axis_before_transpose(node, axis, len(shape), order) for axis in axes)
                        yield replace(purpose, out_axis=out_axis, in_axis=in_axis)
                    else:
                        yield replace(purpose, out_axis=None, in_axis=None)
            elif steps and node.outputs and node.op in SPLICING:
                behind = self._purposes(use.scope, node.outputs[0], shape, dtype, steps - 1, call=call)
                yield from (
                    replace(purpose, out_axis=None, in_axis=None) for purpose in behind if purpose.kind in CELLS
                )
                yield OnnxTensorPurpose(kind=node.op, layer=label)
            else:
                part = _part(use, shape, dtype) or (_BIAS if self._is_bias(use, shape) else _OTHER)
                purpose = OnnxTensorPurpose(part.role, node.op, label)
                if node.is_resolved:
                    axes = part.out_axis(node, len(shape)), part.in_axis(node, len(shape))
                    purpose = replace(purpose, out_axis=axes[0], in_axis=axes[1])
                yield purpose
        if steps and call is not None and (result := call.behind(scope, name)):
            yield from self._purposes(call.use.scope, result, shape, dtype, steps - 1, call=call.outer)

    def _order(self, node: NodeProto) -> tuple[int, ...]:
        order = node.attributes.get("perm")
        return self._reader.numbers(order.ints) if order is not None else ()

    def _is_bias(self, use: OnnxTensorUse, shape: tuple[int, ...]) -> bool:
        """Whether a vector is added to the output of an operation with a kernel."""
        if use.node.op != "Add" or len(use.node.inputs) != 2 or not shape or math.prod(shape) != max(shape):
            return False
        value, scope = use.node.inputs[1 - use.operand], use.scope
        for _ in range(budgets.MAX_PASSED_OPERATORS):
            owner = scope.owner(value)
            maker = owner.makers[value] if owner is not None else None
            if owner is None or maker is None:
                return False
            if maker.op in CALCULATING:
                return True
            if maker.op not in _BETWEEN or not maker.inputs:
                return False
            scope, value = owner, maker.inputs[0]
        return False


def _in_call(node: NodeProto, call: _Call | None) -> NodeProto:
    """A node with its attributes in a call of the function; those without a value or a default are left out."""
    if call is None or node.is_resolved:
        return node
    given = call.node.attributes
    defaults = call.function.definition.attributes if call.function.definition is not None else {}
    resolved = {
        name: given.get(attribute.reference, defaults.get(attribute.reference)) if attribute.reference else attribute
        for name, attribute in node.attributes.items()
    }
    attributes = {name: attribute for name, attribute in resolved.items() if attribute is not None}
    is_resolved = not any(attribute.reference for attribute in attributes.values())
    return replace(node, attributes=attributes, is_resolved=is_resolved)


def _label(node: NodeProto, call: _Call | None) -> str:
    label = f"{call.label}/{node.label}" if call is not None else node.label
    if len(label) > budgets.MAX_ONNX_PREFIX and call is not None:
        raise WireError("the names of its calls of functions are too long")
    return label


def _part(use: OnnxTensorUse, shape: tuple[int, ...], dtype: np.dtype[Any]) -> OperandRole | None:
    part = PARTS.get(use.node.op, {}).get(use.operand)
    if part is None:
        return None
    if part.role in {Role.KERNEL, Role.RECURRENT, Role.EMBEDDING}:
        # The same operations are used on shapes and indices, which are integers of 32 or 64 bits, or Booleans.
        is_number = dtype.kind != "b" and not (dtype.kind in "iu" and dtype.itemsize > 2)
        is_deep = len(shape) >= 2 if part.role is not Role.KERNEL else len(shape) >= 1
        return part if is_number and is_deep else None
    return part


@dataclass(frozen=True, slots=True, eq=False)
class GraphScope:
    """A graph, and the enclosing graph whose values it can use."""

    graph: GraphProto
    prefix: str = ""
    """Prefix of the names of its tensors, such as `If_0/then_branch/`; empty for the main graph."""
    parent: GraphScope | None = None
    depth: int = 0
    is_training: bool = False
    definition: NodeProto | None = None
    """If the graph is the body of a function, its signature as a node with the default attributes."""
    results: Mapping[str, int] = field(default_factory=dict)
    """The values that a function returns, each with the index of its output."""
    makers: dict[str, NodeProto | None] = field(default_factory=dict)
    """The node that produces each value; None for a stored tensor or a parameter of a function."""

    def owner(self, name: str) -> GraphScope | None:
        """The graph that defines a name: this one, or the nearest enclosing one."""
        scope: GraphScope | None = self
        while scope is not None and name not in scope.makers:
            scope = scope.parent
        return scope


def read_scopes(reader: ProtoReader, model: Model) -> tuple[GraphScope, ...]:
    """All graphs: first the main graph, then those of functions, of training, and in attributes of nodes."""
    scopes = [_scope(messages.graph(reader, model.graph))]
    for span in model.functions:
        definition, graph = messages.function(reader, span)
        scopes.append(_scope(graph, prefix=f"{definition.op}/", definition=definition))
    for number, span in enumerate(span for training in model.training for span in messages.training(reader, training)):
        graph = messages.graph(reader, span)
        scopes.append(_scope(graph, prefix=f"training_{number}/", is_training=True))
    for scope in scopes:
        scopes.extend(_subgraphs(reader, scope))
    return tuple(scopes)


def _subgraphs(reader: ProtoReader, scope: GraphScope) -> Iterator[GraphScope]:
    for node in scope.graph.nodes:
        for name, attribute in node.attributes.items():
            for number, span in enumerate(attribute.graphs):
                if scope.depth == budgets.MAX_ONNX_DEPTH:
                    raise WireError(f"its graphs are nested more than {budgets.MAX_ONNX_DEPTH} deep")
                branch = name if len(attribute.graphs) == 1 else f"{name}_{number}"
                prefix = f"{scope.prefix}{node.label}/{branch}/"
                if len(prefix) > budgets.MAX_ONNX_PREFIX:
                    raise WireError("the names of its nested graphs are too long")
                yield _scope(
                    messages.graph(reader, span), prefix, scope, scope.depth + 1, is_training=scope.is_training
                )


def _scope(
    graph: GraphProto,
    prefix: str = "",
    parent: GraphScope | None = None,
    depth: int = 0,
    *,
    is_training: bool = False,
    definition: NodeProto | None = None,
) -> GraphScope:
    makers: dict[str, NodeProto | None] = {output: node for node in graph.nodes for output in node.outputs}
    makers.update(dict.fromkeys((tensor.name for tensor in graph.initializers), None))
    makers.update(dict.fromkeys((tensor.values.name for tensor in graph.sparse), None))
    makers.update(dict.fromkeys(definition.inputs if definition else (), None))
    results = {name: number for number, name in enumerate(definition.outputs if definition else ())}
    return GraphScope(graph, prefix, parent, depth, is_training, definition, results, makers)
