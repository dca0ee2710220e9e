"""Nodes of torch.fx as the rules see them: arguments by name, shapes, weight views; and the interpreter."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.node import map_aggregate

from prunectl.channels.graph import OpKind, OpNode, Shape, WeightView
from prunectl.training.quiet import ignore_warnings, quiet_logging
from prunectl.training.torch.tensors import tensor_leaves


@dataclass(frozen=True, slots=True)
class OpContext:
    """A node with the shapes and weight views around it."""

    node: torch.fx.Node
    shapes: dict[str, Shape]
    """Of every value that is known; what a step in between makes is added."""
    views: dict[str, WeightView]

    @property
    def arguments(self) -> Mapping[str, Any]:
        """All arguments, those left out as they are by default."""
        return arguments(self.node)

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument; LookupError if its value is not known before it runs."""
        value = self.arguments.get(name, default)
        return static_value(default if value is None else value)

    def name(self, argument: str) -> str:
        """The name of a value that goes in; empty where it is left out."""
        value = self.arguments.get(argument)
        return value.name if isinstance(value, torch.fx.Node) else ""

    def shape(self, argument: str) -> Shape:
        """The shape of what goes in; LookupError if it is not known."""
        return self.shapes[self.name(argument)]

    @property
    def tensors(self) -> tuple[str, ...]:
        """All values with numbers that go in."""
        return tuple(node.name for node in self.node.all_input_nodes if node.name in self.shapes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what comes out: several are taken apart right behind."""
        if self.node.name in self.shapes:
            return (self.node.name,)
        items = {user.args[1]: user.name for user in self.node.users if is_item(user) and user.users}
        count = 1 + max([int(number) for number in items if isinstance(number, int)], default=-1)
        return tuple(items.get(number, f"{self.node.name}.{number}") for number in range(count))

    @property
    def result(self) -> Shape:
        """Shape of the first that comes out."""
        return self.shapes[self.outputs[0]]

    def emit(self, kind: OpKind, inputs: Iterable[str], outputs: Iterable[str] = (), **attributes: Any) -> OpNode:
        """An operation of the graph, one step of this node."""
        return OpNode(
            module_path(self.node), op_name(self.node), kind, tuple(inputs), tuple(outputs) or self.outputs, attributes
        )

    def temporary(self, step: str, shape: Shape) -> str:
        """The name of a value that only one step of it makes."""
        name = f"{self.node.name}.{step}"
        self.shapes[name] = shape
        return name


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of an operation by their names."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(position): value for position, value in enumerate(node.args)} | dict(node.kwargs)
    values: dict[str, Any] = {
        argument.name: argument.default_value if argument.has_default_value() else None for argument in schema.arguments
    }
    values |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return values | dict(node.kwargs)


def set_argument(node: torch.fx.Node, name: str, value: Any) -> None:
    """Give an operation another argument."""
    names = [argument.name for argument in getattr(node.target, "_schema").arguments]  # noqa: B009
    position = names.index(name)
    if name in node.kwargs or position >= len(node.args):
        node.update_kwarg(name, value)
    else:
        node.update_arg(position, value)


def static_value(value: Any) -> Any:
    """An argument of numbers; LookupError if a value is among them that is known only when it runs."""
    if isinstance(value, torch.fx.Node):
        raise LookupError(value.name)  # noqa: TRY004 - it is a value, but not here
    if isinstance(value, list | tuple):
        return tuple(static_value(item) for item in value)
    return value


def is_item(node: torch.fx.Node) -> bool:
    """Whether a node takes one of several that come out of another."""
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int)


def op_name(node: torch.fx.Node) -> str:
    """What an operation is called, without its variants and whether it works in place."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = str(getattr(packet if packet is not None else target, "__name__", target))
    return name if name.startswith("_") else name.rstrip("_")


def overload_name(node: torch.fx.Node) -> str:
    """The variant of an operation."""
    return str(getattr(node.target, "_overloadname", ""))


def module_path(node: torch.fx.Node) -> str:
    """Where an operation is, for people: the layer that it is in, or its own name."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inner = str(stack[-1][0]) if stack else ""
    return inner if inner and not inner.startswith("_") else node.name


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A weight or a buffer by its name."""
    owner, _, last = name.rpartition(".")
    weight = getattr(module.get_submodule(owner), last)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} is no tensor")
    return weight


_PASSED_ON = frozenset({"to", "_to_copy", "contiguous", "clone", "detach", "alias", "lift_fresh_copy"})
_SAME_ORDER = frozenset({"view", "reshape", "unsqueeze", "squeeze", "_unsafe_view"})


def views(nodes: Iterable[torch.fx.Node], names: Mapping[str, str], shapes: dict[str, Shape]) -> dict[str, WeightView]:
    """The views of weights by the names of values."""
    weight_views: dict[str, WeightView] = {}
    for node in nodes:
        if node.op == "get_attr" and str(node.target) in names and node.name in shapes:
            weight_views[node.name] = WeightView(names[str(node.target)], tuple(range(len(shapes[node.name]))))
        elif node.op == "call_function" and node.all_input_nodes and node.all_input_nodes[0].name in weight_views:
            axes = _axes(OpContext(node, shapes, weight_views), weight_views[node.all_input_nodes[0].name].axes)
            if axes is not None:
                weight_views[node.name] = WeightView(weight_views[node.all_input_nodes[0].name].tensor, axes)
    return weight_views


def uses(nodes: Iterable[torch.fx.Node], weight_views: Mapping[str, WeightView]) -> Counter[str]:
    """How often each weight meets an operation that does not only hand it on, or leaves the network."""
    counts: Counter[str] = Counter()
    for node in nodes:
        if node.name not in weight_views:
            nodes_read = [*_flat(node.args), *_flat(tuple(node.kwargs.values()))]
            counts.update(weight_views[value.name].tensor for value in nodes_read if value.name in weight_views)
    return counts


def _flat(value: object) -> list[torch.fx.Node]:
    if isinstance(value, torch.fx.Node):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [node for item in value for node in _flat(item)] if isinstance(value, list | tuple) else []


def _axes(op: OpContext, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    name = op_name(op.node)
    if op.node.name not in op.shapes:
        return None
    before, after = op.shapes[op.tensors[0]], op.shapes[op.node.name]
    if name in _PASSED_ON:
        return axes
    if name in {"t", "numpy_T"}:
        return tuple(reversed(axes))
    if name == "permute":
        return tuple(axes[axis] for axis in op.arg("dims"))
    if name == "transpose":
        order = list(axes)
        first, second = op.arg("dim0"), op.arg("dim1")
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    kept = [length for length in before if length != 1]
    if name in _SAME_ORDER and kept == [length for length in after if length != 1]:
        # Only axes of length 1 come and go: the others keep their order.
        remaining = iter([axis for axis, length in zip(axes, before, strict=True) if length != 1])
        return tuple(None if length == 1 else next(remaining) for length in after)
    return None


@dataclass(frozen=True, slots=True, eq=False)
class WeightedProgram:
    """A program, some of its numbers replaced."""

    module: torch.fx.GraphModule
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By the attributes that they are there."""
    in_float64: bool = False
    """Whether every number of it is a float64."""


class RecordingInterpreter(torch.fx.Interpreter):
    """An interpreter that hands each value to a callback."""

    def __init__(self, weighted: WeightedProgram, record: Callable[[str, Any], None]) -> None:
        super().__init__(weighted.module)
        # To say where a run failed, PyTorch imports its compiler; whether it fails is all that is asked here.
        self.extra_traceback = False
        self._values, self._record, self._in_float64 = weighted.values, record, weighted.in_float64

    def run_node(self, n: torch.fx.Node) -> Any:
        """The value of a node, which is recorded."""
        value = super().run_node(n)
        self._record(n.name, value)
        return value

    def fetch_attr(self, target: str) -> Any:
        """A weight."""
        value = self._values.get(target)
        value = super().fetch_attr(target) if value is None else value
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if self._in_float64 and is_float else value

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node; in float64 every conversion to a float is one to float64."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if not self._in_float64:
            return args, kwargs
        widened: tuple[tuple[Any, ...], dict[str, Any]] = map_aggregate((args, kwargs), _widened)
        return widened


def _widened(argument: Any) -> Any:
    is_float = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if is_float else argument


def shapes_of(weighted: WeightedProgram, inputs: Iterable[torch.Tensor]) -> dict[str, Shape]:
    """The shape of every value, as seen on an example; of several that come out, each by its number."""
    return run_with_shapes(weighted, inputs)[1]


def run_with_shapes(
    weighted: WeightedProgram, inputs: Iterable[torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, Shape]]:
    """The tensors that come out, and the shape of every value."""
    shapes: dict[str, Shape] = {}

    def record(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            shapes[name] = tuple(value.shape)
        elif isinstance(value, list | tuple):
            shapes.update(
                {f"{name}.{number}": tuple(item.shape) for number, item in enumerate(value) if hasattr(item, "shape")}
            )

    return run(weighted, inputs, record), shapes


def run(
    weighted: WeightedProgram, inputs: Iterable[torch.Tensor], record: Callable[[str, Any], None]
) -> list[torch.Tensor]:
    """The tensors that come out."""
    with quiet():
        result = RecordingInterpreter(weighted, record).run(*inputs, enable_io_processing=False)
    return tensor_leaves(result)


@contextmanager
def quiet() -> Generator[None]:
    """Silence warnings, loggers and output of PyTorch, and record no gradients."""
    output = io.StringIO()
    with (
        quiet_logging(logging.CRITICAL),
        ignore_warnings(),
        redirect_stdout(output),
        redirect_stderr(output),
        torch.no_grad(),
    ):
        yield
