"""An operation of a program, with its arguments by name and the shapes around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prunectl.channels.graph import Kind, Node, View

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """A node of a program, and what is known around it."""

    node: torch.fx.Node
    shapes: dict[str, Shape]
    """Of every value that is known; what a step in between makes is added."""
    views: dict[str, View]

    @property
    def arguments(self) -> Mapping[str, Any]:
        """All arguments, those left out as they are by default."""
        return arguments(self.node)

    def arg(self, name: str, default: Any = None) -> Any:
        """Return an argument; LookupError if its value is not known before it runs."""
        found = self.arguments.get(name, default)
        return plain(default if found is None else found)

    def name(self, argument: str) -> str:
        """Return the name of a value that goes in; empty where it is left out."""
        found = self.arguments.get(argument)
        return found.name if isinstance(found, torch.fx.Node) else ""

    def shape(self, argument: str) -> Shape:
        """Return the shape of what goes in; LookupError if it is not known."""
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
        found = {user.args[1]: user.name for user in self.node.users if is_item(user) and user.users}
        count = 1 + max([int(number) for number in found if isinstance(number, int)], default=-1)
        return tuple(found.get(number, f"{self.node.name}.{number}") for number in range(count))

    @property
    def result(self) -> Shape:
        """Shape of the first that comes out."""
        return self.shapes[self.outputs[0]]

    def made(self, kind: Kind, inputs: Iterable[str], outputs: Iterable[str] = (), **attributes: Any) -> Node:
        """Return what it does, or one step of it."""
        return Node(title(self.node), op(self.node), kind, tuple(inputs), tuple(outputs) or self.outputs, attributes)

    def between(self, step: str, shape: Shape) -> str:
        """Return the name of a value that only one step of it makes."""
        name = f"{self.node.name}.{step}"
        self.shapes[name] = shape
        return name


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """Return the arguments of an operation by their names."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(place): value for place, value in enumerate(node.args)} | dict(node.kwargs)
    found: dict[str, Any] = {
        argument.name: argument.default_value if argument.has_default_value() else None for argument in schema.arguments
    }
    found |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return found | dict(node.kwargs)


def set_argument(node: torch.fx.Node, name: str, value: Any) -> None:
    """Give an operation another argument."""
    places = [argument.name for argument in getattr(node.target, "_schema").arguments]  # noqa: B009
    place = places.index(name)
    if name in node.kwargs or place >= len(node.args):
        node.update_kwarg(name, value)
    else:
        node.update_arg(place, value)


def plain(value: Any) -> Any:
    """Return an argument of numbers; LookupError if a value is among them that is known only when it runs."""
    if isinstance(value, torch.fx.Node):
        raise LookupError(value.name)  # noqa: TRY004 - it is a value, but not here
    if isinstance(value, list | tuple):
        return tuple(plain(one) for one in value)
    return value


def is_item(node: torch.fx.Node) -> bool:
    """Whether a node takes one of several that come out of another."""
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int)


def op(node: torch.fx.Node) -> str:
    """Return what an operation is called, without its variants and whether it works in place."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = str(getattr(packet if packet is not None else target, "__name__", target))
    return name if name.startswith("_") else name.rstrip("_")


def variant(node: torch.fx.Node) -> str:
    """Return the variant of an operation."""
    return str(getattr(node.target, "_overloadname", ""))


def title(node: torch.fx.Node) -> str:
    """Return where an operation is, for people: the layer that it is in, or its own name."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inner = str(stack[-1][0]) if stack else ""
    return inner if inner and not inner.startswith("_") else node.name
