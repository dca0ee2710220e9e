"""The body of the generated `forward`: one statement for each operation."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from prunectl.channels.torch.code.expressions import expression, in_place, literal, sequence
from prunectl.channels.torch.code.layers import LayerCode
from prunectl.channels.torch.fx import is_item, op_name

_RESERVED = frozenset({"self", "torch", "nn", "F"})
_REUSED_NAMES = ("x", "y", "value", "passing")
"""The names, of which one is used again and again for values that only the next statement reads."""
_SHARING = """view reshape flatten unflatten squeeze unsqueeze permute transpose t slice select narrow expand chunk
split split_with_sizes unbind alias detach getitem to"""
_VIEWS = frozenset(_SHARING.split())


@dataclass(frozen=True, slots=True)
class ForwardCode:
    """A graph, and the layers, shapes and expressions that its code needs."""

    graph: torch.fx.Graph
    layers: Mapping[torch.fx.Node, LayerCode]
    shapes: Mapping[str, tuple[int, ...]]
    path_of: Callable[[str], str]
    """From the path of a module or a weight to the expression for it."""
    returned: Any
    """The output nodes, in the nested structure that the network returns."""


_IN_PARTS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "tensor_split"})


def signature(program: ForwardCode) -> list[str]:
    """The parameter names of `forward`."""
    return [_identifier(str(node.target)) for node in program.graph.nodes if node.op == "placeholder"]


def body(program: ForwardCode) -> list[str]:
    """The statements of `forward`, the last of which is the return statement."""
    return _Writer(program).lines()


@dataclass(slots=True)
class _Writer:
    program: ForwardCode
    names: dict[torch.fx.Node, str] = field(default_factory=dict)
    used_names: set[str] = field(default_factory=lambda: set(_RESERVED))

    def lines(self) -> list[str]:
        inputs = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for node in inputs:
            self.names[node] = _identifier(str(node.target))
            self.used_names.add(self.names[node])
        steps = _needed_nodes(self.program.graph)
        reads = [_reads(step, inputs) for step in steps]
        last: dict[torch.fx.Node, set[int]] = {}
        for number, values in enumerate(reads):
            for node in values:
                last.setdefault(node, set()).add(number)
        for node in _values(self.program.returned):
            last.setdefault(node, set()).add(len(steps))
        passing = self._reused_name(inputs, steps, last)
        self.used_names.add(passing)
        statements = [self._statement(step, number, last, passing) for number, step in enumerate(steps)]
        returned = self._returned(self.program.returned)
        if statements and statements[-1].startswith(f"{passing} = ") and returned == passing:
            return [*statements[:-1], f"return {statements[-1].removeprefix(f'{passing} = ')}"]
        return [*statements, f"return {returned}"]

    def _reused_name(
        self, inputs: list[torch.fx.Node], steps: list[torch.fx.Node], last: Mapping[torch.fx.Node, set[int]]
    ) -> str:
        """The name for values that only the next statement reads; an input of this name must not be read afterwards."""
        first = next((number for number, step in enumerate(steps) if last.get(step) == {number + 1}), len(steps))
        still_read = {self.names[node] for node in inputs if max(last.get(node, {-1})) > first}
        return next(name for name in (*_REUSED_NAMES, "_passing") if name not in still_read)

    def _statement(self, step: torch.fx.Node, number: int, last: Mapping[torch.fx.Node, set[int]], passing: str) -> str:
        code = self._expression(step)
        items = [user for user in step.users if is_item(user)]
        if items and len(items) == len(step.users):
            return f"{self._items(step, items, number, last, passing)} = {code}"
        readers = last.get(step, set())
        self.names[step] = passing if readers == {number + 1} else self._new_name(step)
        return f"{self.names[step]} = {code}"

    def _items(
        self,
        step: torch.fx.Node,
        items: list[torch.fx.Node],
        step_number: int,
        last: Mapping[torch.fx.Node, set[int]],
        passing: str,
    ) -> str:
        """The assignment targets for an operation with several outputs."""
        used = [item for item in items if last.get(item)]
        for item in used:
            is_passing = len(used) == 1 and last[item] == {step_number + 1}
            self.names[item] = passing if is_passing else self._new_name(step)
        names = {int(str(item.args[1])): self.names[item] for item in used}
        count = max([*names, *(number for number in range(64) if f"{step.name}.{number}" in self.program.shapes)]) + 1
        targets = [names.get(number, "_") for number in range(count)]
        if op_name(step) == "lstm" and step in self.program.layers:
            targets = [targets[0], sequence(targets[1:]) if set(targets[1:]) != {"_"} else "_"]
        return ", ".join(targets) + "," * (len(targets) == 1)

    def _expression(self, step: torch.fx.Node) -> str:
        layer = self.program.layers.get(step)
        if layer is not None:
            return f"{self.program.path_of(layer.path)}({', '.join(map(self.write, layer.inputs))})"
        if _is_in_place(step) and not _has_one_reader(step):
            return in_place(step, self.write)
        return expression(step, self.write, self.program.shapes)

    def write(self, value: Any) -> str:
        if isinstance(value, torch.fx.Node):
            return self.program.path_of(str(value.target)) if value.op == "get_attr" else self.names[value]
        if isinstance(value, list | tuple):
            return sequence(map(self.write, value))
        if isinstance(value, torch.device):
            # The device of the inputs, not the one that the network was traced on.
            first = next(node for node in self.program.graph.nodes if node.op == "placeholder")
            return f"{self.names[first]}.device"
        return literal(value)

    def _returned(self, value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{literal(key)}: {self._returned(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return f"[{', '.join(map(self._returned, value))}]"
        if isinstance(value, tuple):
            return ", ".join(map(self._returned, value)) if len(value) > 1 else sequence(map(self._returned, value))
        return self.write(value)

    def _new_name(self, step: torch.fx.Node) -> str:
        layer = self.program.layers.get(step)
        if op_name(step) == "sym_size":
            base = "batch" if step.args[1:] == (0,) else "length"
        else:
            stem = layer.path.replace(".", "_") if layer is not None else op_name(step).strip("_")
            base = _identifier("part" if op_name(step) in _IN_PARTS else stem)
        name, number = base, 2
        while name in self.used_names:
            name, number = f"{base}_{number}", number + 1
        self.used_names.add(name)
        return name


def _needed_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The operations that the outputs depend on, and in-place ones; without getitems that become tuple unpacking."""
    output = next(node for node in graph.nodes if node.op == "output")
    needed = set(output.all_input_nodes)
    for node in reversed(graph.nodes):
        is_changed = node.op == "call_function" and _is_in_place(node) and bool(node.all_input_nodes)
        if node in needed or is_changed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed and node.op == "call_function" and not _is_unpacked(node)]


def _is_unpacked(node: torch.fx.Node) -> bool:
    """Whether a node is a getitem of an operation that only getitems read."""
    return is_item(node) and all(is_item(user) for user in node.all_input_nodes[0].users)


def _reads(step: torch.fx.Node, inputs: list[torch.fx.Node]) -> list[torch.fx.Node]:
    read = [node for node in step.all_input_nodes if node.op != "get_attr"]
    arguments = [*step.args, *step.kwargs.values()]
    return [*read, *(inputs[:1] if any(isinstance(value, torch.device) for value in arguments) else ())]


def _values(value: Any) -> Iterable[torch.fx.Node]:
    if isinstance(value, torch.fx.Node):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _values(item)


def _is_in_place(step: torch.fx.Node) -> bool:
    name = str(getattr(step.target, "overloadpacket", "")).rpartition(".")[2]
    return name.endswith("_") and not name.endswith("__")


def _has_one_reader(step: torch.fx.Node) -> bool:
    """Whether only this in-place operation reads the value that it changes, and the value is not a view of another."""
    changed = step.all_input_nodes[0]
    return changed.op == "call_function" and len(changed.users) == 1 and op_name(changed) not in _VIEWS


def _identifier(text: str) -> str:
    identifier = "".join(letter if letter.isalnum() else "_" for letter in text)
    return (
        f"{identifier}_"
        if keyword.iskeyword(identifier) or identifier in _RESERVED
        else identifier
        if identifier[:1].isalpha()
        else f"_{identifier}"
    )
