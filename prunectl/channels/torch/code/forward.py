"""The steps of a network, one statement each."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from prunectl.channels.torch.code.expressions import expression, in_place, literal, sequence
from prunectl.channels.torch.code.layers import LayerCode
from prunectl.channels.torch.fx import is_item, op_name

_TAKEN = frozenset({"self", "torch", "nn", "F"})
_PASSING = ("x", "y", "value", "passing")
"""What a value is called that only the next statement reads."""
_SHARING = """view reshape flatten unflatten squeeze unsqueeze permute transpose t slice select narrow expand chunk
split split_with_sizes unbind alias detach getitem to"""
_VIEWS = frozenset(_SHARING.split())


@dataclass(frozen=True, slots=True)
class ForwardCode:
    """A graph, and what is known of it."""

    graph: torch.fx.Graph
    layers: Mapping[torch.fx.Node, LayerCode]
    shapes: Mapping[str, tuple[int, ...]]
    place_of: Callable[[str], str]
    """From a module or a weight to the expression for it."""
    returned: Any
    """What comes out, in the structure that it had."""


_IN_PARTS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "tensor_split"})


def signature(program: ForwardCode) -> list[str]:
    """Return the names of what goes in."""
    return [_word(str(node.target)) for node in program.graph.nodes if node.op == "placeholder"]


def body(program: ForwardCode) -> list[str]:
    """Return the statements, the last of which gives what comes out."""
    return _Writer(program).lines()


@dataclass(slots=True)
class _Writer:
    program: ForwardCode
    names: dict[torch.fx.Node, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=lambda: set(_TAKEN))

    def lines(self) -> list[str]:
        """Return all statements."""
        inputs = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for node in inputs:
            self.names[node] = _word(str(node.target))
            self.taken.add(self.names[node])
        steps = _live(self.program.graph)
        reads = [_reads(step, inputs) for step in steps]
        last: dict[torch.fx.Node, set[int]] = {}
        for at, read in enumerate(reads):
            for node in read:
                last.setdefault(node, set()).add(at)
        for node in _values(self.program.returned):
            last.setdefault(node, set()).add(len(steps))
        passing = self._passing(inputs, steps, last)
        self.taken.add(passing)
        found = [self._statement(step, at, last, passing) for at, step in enumerate(steps)]
        returned = self._returned(self.program.returned)
        if found and found[-1].startswith(f"{passing} = ") and returned == passing:
            return [*found[:-1], f"return {found[-1].removeprefix(f'{passing} = ')}"]
        return [*found, f"return {returned}"]

    def _passing(
        self, inputs: list[torch.fx.Node], steps: list[torch.fx.Node], last: Mapping[torch.fx.Node, set[int]]
    ) -> str:
        """Return a name that no input has which is still read once a value took it."""
        first = next((at for at, step in enumerate(steps) if last.get(step) == {at + 1}), len(steps))
        late = {self.names[node] for node in inputs if max(last.get(node, {-1})) > first}
        return next(name for name in (*_PASSING, "_passing") if name not in late)

    def _statement(self, step: torch.fx.Node, at: int, last: Mapping[torch.fx.Node, set[int]], passing: str) -> str:
        right = self._right(step)
        items = [user for user in step.users if is_item(user)]
        if items and len(items) == len(step.users):
            return f"{self._items(step, items, at, last, passing)} = {right}"
        read = last.get(step, set())
        self.names[step] = passing if read == {at + 1} else self._fresh(step)
        return f"{self.names[step]} = {right}"

    def _items(
        self,
        step: torch.fx.Node,
        items: list[torch.fx.Node],
        at: int,
        last: Mapping[torch.fx.Node, set[int]],
        passing: str,
    ) -> str:
        """Return names for the several values that come out."""
        read = [item for item in items if last.get(item)]
        for item in read:
            is_alone = len(read) == 1 and last[item] == {at + 1}
            self.names[item] = passing if is_alone else self._fresh(step)
        names = {int(str(item.args[1])): self.names[item] for item in read}
        count = max([*names, *(number for number in range(64) if f"{step.name}.{number}" in self.program.shapes)]) + 1
        words = [names.get(number, "_") for number in range(count)]
        if op_name(step) == "lstm" and step in self.program.layers:
            words = [words[0], sequence(words[1:]) if set(words[1:]) != {"_"} else "_"]
        return ", ".join(words) + "," * (len(words) == 1)

    def _right(self, step: torch.fx.Node) -> str:
        layer = self.program.layers.get(step)
        if layer is not None:
            return f"{self.program.place_of(layer.path)}({', '.join(map(self.write, layer.inputs))})"
        if _is_in_place(step) and not _is_alone(step):
            return in_place(step, self.write)
        return expression(step, self.write, self.program.shapes)

    def write(self, value: Any) -> str:
        """Return an argument as code."""
        if isinstance(value, torch.fx.Node):
            return self.program.place_of(str(value.target)) if value.op == "get_attr" else self.names[value]
        if isinstance(value, list | tuple):
            return sequence(map(self.write, value))
        if isinstance(value, torch.device):
            # Where the inputs are, and not where it was traced.
            first = next(node for node in self.program.graph.nodes if node.op == "placeholder")
            return f"{self.names[first]}.device"
        return literal(value)

    def _returned(self, value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{literal(key)}: {self._returned(one)}" for key, one in value.items()) + "}"
        if isinstance(value, list):
            return f"[{', '.join(map(self._returned, value))}]"
        if isinstance(value, tuple):
            return ", ".join(map(self._returned, value)) if len(value) > 1 else sequence(map(self._returned, value))
        return self.write(value)

    def _fresh(self, step: torch.fx.Node) -> str:
        layer = self.program.layers.get(step)
        if op_name(step) == "sym_size":
            base = "batch" if step.args[1:] == (0,) else "length"
        else:
            called = layer.path.replace(".", "_") if layer is not None else op_name(step).strip("_")
            base = _word("part" if op_name(step) in _IN_PARTS else called)
        name, number = base, 2
        while name in self.taken:
            name, number = f"{base}_{number}", number + 1
        self.taken.add(name)
        return name


def _live(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Return the operations that matter for what comes out, without those that only take one of several."""
    output = next(node for node in graph.nodes if node.op == "output")
    wanted = set(output.all_input_nodes)
    for node in reversed(graph.nodes):
        is_changed = node.op == "call_function" and _is_in_place(node) and bool(node.all_input_nodes)
        if node in wanted or is_changed:
            wanted.add(node)
            wanted.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in wanted and node.op == "call_function" and not _is_taken_apart(node)]


def _is_taken_apart(node: torch.fx.Node) -> bool:
    """Whether a node takes one of several, as all others do that read them."""
    return is_item(node) and all(is_item(user) for user in node.all_input_nodes[0].users)


def _reads(step: torch.fx.Node, inputs: list[torch.fx.Node]) -> list[torch.fx.Node]:
    read = [node for node in step.all_input_nodes if node.op != "get_attr"]
    said = [*step.args, *step.kwargs.values()]
    return [*read, *(inputs[:1] if any(isinstance(one, torch.device) for one in said) else ())]


def _values(value: Any) -> Iterable[torch.fx.Node]:
    if isinstance(value, torch.fx.Node):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _values(one)


def _is_in_place(step: torch.fx.Node) -> bool:
    name = str(getattr(step.target, "overloadpacket", "")).rpartition(".")[2]
    return name.endswith("_") and not name.endswith("__")


def _is_alone(step: torch.fx.Node) -> bool:
    """Whether nobody else sees what an operation changes."""
    changed = step.all_input_nodes[0]
    return changed.op == "call_function" and len(changed.users) == 1 and op_name(changed) not in _VIEWS


def _word(text: str) -> str:
    found = "".join(letter if letter.isalnum() else "_" for letter in text)
    return f"{found}_" if keyword.iskeyword(found) or found in _TAKEN else found if found[:1].isalpha() else f"_{found}"
