"""Nodes of torch.fx for the rules, with arguments by name, shapes and weight views; and the recording interpreter."""

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
    """A node with the shapes and weight views of its graph."""

    node: torch.fx.Node
    shapes: dict[str, Shape]
    """The known shapes of values; rules add those of intermediate values."""
    views: dict[str, WeightView]

    @property
    def arguments(self) -> Mapping[str, Any]:
        """All arguments by name, with defaults for those left out."""
        return arguments(self.node)

    def arg(self, name: str, default: Any = None) -> Any:
        """A constant argument; LookupError if its value is computed at run time."""
        value = self.arguments.get(name, default)
        return static_value(default if value is None else value)

    def name(self, argument: str) -> str:
        """The name of the value that is passed for an argument; empty if there is none."""
        value = self.arguments.get(argument)
        return value.name if isinstance(value, torch.fx.Node) else ""

    def shape(self, argument: str) -> Shape:
        """The shape of the value that is passed for an argument; LookupError if it is not known."""
        return self.shapes[self.name(argument)]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all input tensors."""
        return tuple(node.name for node in self.node.all_input_nodes if node.name in self.shapes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs; several are named after the getitem nodes that read them."""
        if self.node.name in self.shapes:
            return (self.node.name,)
        items = {user.args[1]: user.name for user in self.node.users if is_item(user) and user.users}
        count = 1 + max([int(number) for number in items if isinstance(number, int)], default=-1)
        return tuple(items.get(number, f"{self.node.name}.{number}") for number in range(count))

    @property
    def result(self) -> Shape:
        """The shape of the first output."""
        return self.shapes[self.outputs[0]]

    def emit(self, kind: OpKind, inputs: Iterable[str], outputs: Iterable[str] = (), **attributes: Any) -> OpNode:
        """An operation of the channel graph; a node may become several."""
        return OpNode(
            module_path(self.node), op_name(self.node), kind, tuple(inputs), tuple(outputs) or self.outputs, attributes
        )

    def temporary(self, step: str, shape: Shape) -> str:
        """The name of an intermediate value between the operations that a node becomes."""
        name = f"{self.node.name}.{step}"
        self.shapes[name] = shape
        return name


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of a node by name, with defaults for those left out."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(position): value for position, value in enumerate(node.args)} | dict(node.kwargs)
    values: dict[str, Any] = {
        argument.name: argument.default_value if argument.has_default_value() else None for argument in schema.arguments
    }
    values |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return values | dict(node.kwargs)


def set_argument(node: torch.fx.Node, name: str, value: Any) -> None:
    """Replace an argument of a node."""
    names = [argument.name for argument in getattr(node.target, "_schema").arguments]  # noqa: B009
    position = names.index(name)
    if name in node.kwargs or position >= len(node.args):
        node.update_kwarg(name, value)
    else:
        node.update_arg(position, value)


def static_value(value: Any) -> Any:
    """A constant argument, with lists as tuples; LookupError if it contains a value that is computed at run time."""
    if isinstance(value, torch.fx.Node):
        raise LookupError(value.name)  # noqa: TRY004 - the type is right, but the value is not known yet
    if isinstance(value, list | tuple):
        return tuple(static_value(item) for item in value)
    return value


def is_item(node: torch.fx.Node) -> bool:
    """Whether a node is a getitem that takes one of several outputs of another node."""
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int)


def op_name(node: torch.fx.Node) -> str:
    """The name of an operation without its overload and without the underscore of the in-place variant."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = str(getattr(packet if packet is not None else target, "__name__", target))
    return name if name.startswith("_") else name.rstrip("_")


def overload_name(node: torch.fx.Node) -> str:
    """The name of the overload of an operation."""
    return str(getattr(node.target, "_overloadname", ""))


def module_path(node: torch.fx.Node) -> str:
    """The path of the module that an operation belongs to, for messages; the name of the node if there is none."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inner = str(stack[-1][0]) if stack else ""
    return inner if inner and not inner.startswith("_") else node.name


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A weight or a buffer by its name."""
    owner, _, last = name.rpartition(".")
    weight = getattr(module.get_submodule(owner), last)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} is not a tensor")
    return weight


_PASSED_ON = frozenset({"to", "_to_copy", "contiguous", "clone", "detach", "alias", "lift_fresh_copy"})
_SAME_ORDER = frozenset({"view", "reshape", "unsqueeze", "squeeze", "_unsafe_view"})


def views(nodes: Iterable[torch.fx.Node], names: Mapping[str, str], shapes: dict[str, Shape]) -> dict[str, WeightView]:
    """The weights and the views of weights among the values, by the name of the value."""
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
    """How many times nodes read each weight, except to make a view of it; a network output counts too."""
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
        # Only axes of length 1 are added or removed: the others keep their order.
        remaining = iter([axis for axis, length in zip(axes, before, strict=True) if length != 1])
        return tuple(None if length == 1 else next(remaining) for length in after)
    return None


@dataclass(frozen=True, slots=True, eq=False)
class WeightedProgram:
    """A program, with new values for some of its weights."""

    module: torch.fx.GraphModule
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The new values, by the attribute of the module."""
    in_float64: bool = False
    """Whether all floats are converted to float64 when it runs."""


class RecordingInterpreter(torch.fx.Interpreter):
    """An interpreter that passes the value of each node to a callback."""

    def __init__(self, weighted: WeightedProgram, record: Callable[[str, Any], None]) -> None:
        super().__init__(weighted.module)
        # For a traceback with the place of a failure, PyTorch would import its compiler, which takes long.
        self.extra_traceback = False
        self._values, self._record, self._in_float64 = weighted.values, record, weighted.in_float64

    def run_node(self, n: torch.fx.Node) -> Any:
        """Compute and record the value of a node."""
        value = super().run_node(n)
        self._record(n.name, value)
        return value

    def fetch_attr(self, target: str) -> Any:
        """A weight, or the value that replaces it."""
        value = self._values.get(target)
        value = super().fetch_attr(target) if value is None else value
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if self._in_float64 and is_float else value

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node; in float64 every conversion to a float is one to float64."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if not self._in_float64:
            return args, kwargs
        in_float64: tuple[tuple[Any, ...], dict[str, Any]] = map_aggregate((args, kwargs), _to_float64)
        return in_float64


def _to_float64(argument: Any) -> Any:
    is_float = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if is_float else argument


def shapes_of(weighted: WeightedProgram, inputs: Iterable[torch.Tensor]) -> dict[str, Shape]:
    """The shape of every value in a run on an example; the outputs of a node with several are named `node.0`, `.1`."""
    return run_with_shapes(weighted, inputs)[1]


def run_with_shapes(
    weighted: WeightedProgram, inputs: Iterable[torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, Shape]]:
    """Run a program; the output tensors, and the shape of every value."""
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
    """Run a program, and pass the value of each node to `record`; the output tensors."""
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
