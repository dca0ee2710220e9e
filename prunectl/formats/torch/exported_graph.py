"""The graph of an exported program: its operations, its shapes, and the use of each weight."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.formats import budgets
from prunectl.formats.base import Length, Shape, Tensor
from prunectl.formats.state_dict import StateUse
from prunectl.formats.torch.pickle.opcodes import describe_value
from prunectl.formats.torch.usage import (
    ARITHMETIC,
    FIRST,
    NOTHING,
    RECURRENT,
    WEIGHT_ARGUMENTS,
    Flow,
    Origins,
    ValueOrigin,
    join_origins,
    pass_through,
)

_KINDS = ("parameter", "buffer", "tensor_constant")


def producer(graph: dict[str, Any]) -> str:
    """The version of PyTorch that exported the graph; empty if it is not recorded."""
    version = graph.get("torch_version")
    return f"pytorch {describe_value(version)}" if isinstance(version, str) and version else ""


def tensor_kinds(graph: ExportedGraph) -> dict[str, str]:
    """The type of the first operation that uses each weight, such as `linear`."""
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        for name in map(node.tensor, node.arguments):
            if name in graph.weights:
                kinds.setdefault(graph.weights[name], node.op)
    return kinds


def operation(target: str) -> str:
    """Return `linear` for `torch.ops.aten.linear.default`."""
    parts = target.split(".")
    return describe_value(parts[3] if len(parts) > 3 and parts[1] == "ops" else parts[-1])


def argument_names(specs: Any) -> dict[str, str]:
    """The names of the model's tensors, by the names of the graph's inputs."""
    names: dict[str, str] = {}
    for spec in as_list(specs):
        for kind in _KINDS:
            name, argument = dig(spec, kind, f"{kind}_name"), dig(spec, kind, "arg", "name")
            if isinstance(name, str) and isinstance(argument, str):
                names[argument] = name
    return names


def parameters(graph: dict[str, Any]) -> frozenset[str]:
    """The names of the trained weights, without buffers and constants."""
    specs = as_list(dig(graph, "graph_module", "signature", "input_specs"))
    names = (dig(spec, "parameter", "parameter_name") for spec in specs)
    return frozenset(name for name in names if isinstance(name, str))


def as_dict(value: Any) -> dict[str, Any]:
    """A JSON object; any other value becomes an empty one."""
    return value if isinstance(value, dict) else {}


def dig(value: Any, *keys: str) -> Any:
    """The value under a path of keys in nested JSON objects; None if there is no such value."""
    for key in keys:
        value = as_dict(value).get(key)
    return value


def as_list(value: Any) -> list[Any]:
    """A list; any other value becomes an empty one."""
    return value if isinstance(value, list) else []


def shape(sizes: Any, batch_symbols: frozenset[str]) -> Shape | None:
    """The shape of a tensor; the symbols in ``batch_symbols`` count as 1."""
    if not isinstance(sizes, list) or len(sizes) > budgets.MAX_AXES:
        return None
    return tuple(_length(size, batch_symbols) for size in sizes)


def first_symbol(sizes: Any) -> str:
    """The symbol that is the first size of a tensor; empty if that is not a symbol."""
    if not isinstance(sizes, list) or len(sizes) < 2:
        return ""
    tree = _parsed(_expression(sizes[0]))
    return _symbol_name(tree) if tree is not None else ""


def _length(size: Any, batch_symbols: frozenset[str]) -> Length:
    value = size.get("as_int") if isinstance(size, dict) else None
    if type(value) is not int:
        tree = _parsed(_expression(size))
        value = _value(tree, batch_symbols) if tree is not None else None
    return value if value is not None and 0 <= value <= budgets.MAX_ELEMENTS else None


def _expression(size: Any) -> str:
    expression = size.get("as_expr") if isinstance(size, dict) else None
    text = expression.get("expr_str") if isinstance(expression, dict) else expression
    return text if isinstance(text, str) and len(text) <= budgets.MAX_SIZE_CHARACTERS else ""


def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _symbol_name(tree: ast.expr) -> str:
    """The name of an expression that is a single symbol; empty for any other expression."""
    if isinstance(tree, ast.Name):
        return tree.id
    if _function(tree) == "Symbol" and isinstance(tree, ast.Call) and tree.args:
        name = tree.args[0]
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""
    return ""


def _function(tree: ast.expr) -> str:
    return tree.func.id if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) else ""


def _value(tree: ast.expr, batch_symbols: frozenset[str]) -> int | None:
    """The value of an expression of integers; None if it is unknown or not understood."""
    if isinstance(tree, ast.Constant):
        return tree.value if type(tree.value) is int and abs(tree.value) <= budgets.MAX_ELEMENTS else None
    symbol = _symbol_name(tree)
    if symbol:
        return 1 if symbol in batch_symbols else None
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return _fold([ast.Constant(-1), tree.operand], batch_symbols, math.prod)
    if isinstance(tree, ast.BinOp):
        return _fold([tree.left, tree.right], batch_symbols, _OPERATORS.get(type(tree.op)))
    if isinstance(tree, ast.Call):
        return _fold(tree.args, batch_symbols, _FUNCTIONS.get(_function(tree)))
    return None


def _fold(
    parts: Sequence[ast.expr], batch_symbols: frozenset[str], combine: Callable[[list[int]], int | None] | None
) -> int | None:
    values = [_value(part, batch_symbols) for part in parts]
    known = [value for value in values if value is not None]
    if combine is None or not known or len(known) != len(values):
        return None
    result = combine(known)
    return result if result is not None and abs(result) <= budgets.MAX_ELEMENTS else None


def _floor_div(values: list[int]) -> int | None:
    return values[0] // values[1] if len(values) == 2 and values[1] else None


_FUNCTIONS: dict[str, Callable[[list[int]], int | None]] = {
    "Integer": sum,
    "Add": sum,
    "Mul": math.prod,
    "FloorDiv": _floor_div,
    "Max": max,
    "Min": min,
}
_OPERATORS: dict[type[ast.operator], Callable[[list[int]], int | None]] = {
    ast.Add: sum,
    ast.Sub: lambda values: values[0] - values[1],
    ast.Mult: math.prod,
    ast.FloorDiv: _floor_div,
}


_PASSTHROUGH = frozenset(
    {
        *("t", "transpose", "permute", "view", "reshape", "contiguous", "detach", "alias", "to", "_to_copy", "clone"),
        *("unsqueeze", "squeeze", "expand", "numpy_T", "lift_fresh_copy", "_unsafe_view"),
    }
)


@dataclass(frozen=True, slots=True)
class ExportedNode:
    """One operation, with its arguments by name."""

    op: str
    """Such as `conv2d` for `torch.ops.aten.conv2d.default`."""
    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]
    module: str
    """The path of the module that it belongs to."""

    def tensor(self, argument: str) -> str:
        """The name of an argument that is a tensor; empty for any other."""
        return _text(dig(self.arguments.get(argument), "as_tensor", "name"))

    def tensors(self, argument: str) -> tuple[str, ...]:
        """The names in an argument that is a list of tensors."""
        return tuple(_text(dig(tensor, "name")) for tensor in as_list(dig(self.arguments.get(argument), "as_tensors")))

    def flag(self, argument: str) -> bool:
        """Whether a Boolean argument is there and true."""
        return dig(self.arguments.get(argument), "as_bool") is True

    def string_arg(self, argument: str) -> str:
        """An argument that is a string; empty for any other."""
        return _text(dig(self.arguments.get(argument), "as_string"))

    @property
    def graphs(self) -> tuple[Mapping[str, Any], ...]:
        """The graphs among its arguments, which it may run once, in a loop or not at all."""
        graphs = (as_dict(dig(value, "as_graph", "graph")) for value in self.arguments.values())
        return tuple(graph for graph in graphs if graph)

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the tensors that its graphs take: all arguments after the last graph."""
        keys = list(self.arguments)
        first = max(
            (index + 1 for index, key in enumerate(keys) if "as_graph" in as_dict(self.arguments[key])),
            default=len(keys),
        )
        return tuple(name for key in keys[first:] for name in (self.tensor(key), *self.tensors(key)) if name)


@dataclass(frozen=True, slots=True)
class ExportedGraph:
    """A graph with the sizes of its tensors and the names of its weights."""

    nodes: tuple[ExportedNode, ...]
    sizes: Mapping[str, Any]
    batch_symbols: frozenset[str]
    """Symbols that stand for the batch size."""
    weights: Mapping[str, str]
    """The names of the model's tensors, by their names in the graph."""
    producers: Mapping[str, ExportedNode]

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor, as far as it is known."""
        return shape(dig(self.sizes, name, "sizes"), self.batch_symbols)

    def weight(self, name: str) -> str:
        """The model's tensor behind a name in the graph, through pass-through operations; empty if there is none."""
        for _ in range(budgets.MAX_PASSED_NODES):
            producer_node = self.producers.get(name)
            if name in self.weights or producer_node is None or producer_node.op not in _PASSTHROUGH:
                break
            name = next(filter(None, map(producer_node.tensor, ("self", "input"))), "")
        return self.weights.get(name, "")


def main_graph(program: Mapping[str, Any]) -> ExportedGraph:
    """The top-level graph of a program."""
    graph = as_dict(dig(program, "graph_module", "graph"))
    specs = as_list(dig(program, "graph_module", "signature", "input_specs"))
    inputs = [_text(dig(spec, "user_input", "arg", "as_tensor", "name")) for spec in specs]
    symbols = (first_symbol(dig(graph, "tensor_values", name, "sizes")) for name in inputs)
    return _graph(graph, frozenset(filter(None, symbols)), argument_names(specs))


def inner_graph(graph: Mapping[str, Any], operands: tuple[str, ...], outer: ExportedGraph) -> ExportedGraph:
    """A graph that a node of the outer graph runs on some operands."""
    inputs = input_names(graph)
    weights = {inner: outer.weight(name) for inner, name in zip(inputs, operands, strict=False) if outer.weight(name)}
    return _graph(graph, outer.batch_symbols, weights)


def input_names(graph: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the inputs of a graph that a node runs."""
    return tuple(_text(dig(item, "as_tensor", "name")) for item in as_list(graph.get("inputs")))


def _graph(graph: Mapping[str, Any], batch_symbols: frozenset[str], weights: Mapping[str, str]) -> ExportedGraph:
    nodes = tuple(_node(as_dict(node_json)) for node_json in as_list(graph.get("nodes"))[: budgets.MAX_EXPORTED_NODES])
    producers = {name: node for node in nodes for name in node.outputs}
    return ExportedGraph(nodes, as_dict(graph.get("tensor_values")), batch_symbols, weights, producers)


def _node(data: Mapping[str, Any]) -> ExportedNode:
    named = [(_text(dig(item, "name")), dig(item, "arg")) for item in as_list(data.get("inputs"))]
    # The arguments of higher-order operations have no names.
    arguments = {name or str(index): value for index, (name, value) in enumerate(named)}
    outputs = tuple(
        _text(dig(item, "name")) for value in as_list(data.get("outputs")) for item in _output_tensors(value)
    )
    stack = _text(dig(data, "metadata", "nn_module_stack"))
    module = stack.rpartition(";")[2].split(",")
    return ExportedNode(
        operation(_text(data.get("target"))), arguments, outputs, describe_value(module[1]) if len(module) > 1 else ""
    )


def _output_tensors(output: Any) -> list[Any]:
    """The tensor that an output is, or those that it lists."""
    return as_list(dig(output, "as_tensors")) or [dig(output, "as_tensor")]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


_OPERANDS = ("self", "other")


def uses(graph: ExportedGraph, tensors: list[Tensor]) -> dict[str, StateUse | None]:
    """The use of each tensor in a program; None if it has none that is known."""
    flow = Flow()
    _follow(graph, {name: frozenset((ValueOrigin(weight),)) for name, weight in graph.weights.items()}, flow, 0)
    resolved = flow.resolve()
    return {tensor.name: resolved.get(tensor.name) for tensor in tensors}


def _follow(graph: ExportedGraph, values: dict[str, Origins], flow: Flow, depth: int) -> None:
    for node in graph.nodes:
        operands = {
            key: join_origins(values.get(tensor, NOTHING) for tensor in _tensors(node, key)) for key in node.arguments
        }
        if node.op in RECURRENT:
            flow.recur(node.op, [values.get(tensor, NOTHING) for tensor in node.tensors("params")])
        elif node.op in WEIGHT_ARGUMENTS:
            flow.use(node.op, operands, is_transposed=node.flag("transposed"))
        else:
            first = _OPERANDS if node.op in ARITHMETIC else FIRST
            origins = pass_through(node.op, join_origins(operands.get(key, NOTHING) for key in first))
            values.update(dict.fromkeys(node.outputs, origins) if origins else {})
        for inner in node.graphs if depth < budgets.MAX_EXPORTED_GRAPH_DEPTH else ():
            inner_operands = [values.get(key, NOTHING) for key in node.operands]
            below = inner_graph(inner, node.operands, graph)
            _follow(below, dict(zip(input_names(inner), inner_operands, strict=False)), flow, depth + 1)


def _tensors(node: ExportedNode, argument: str) -> tuple[str, ...]:
    return tuple(filter(None, (node.tensor(argument), *node.tensors(argument))))
