"""Where weights live in a class: the modules that their names speak of."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from prunectl.channels.torch.code.text import literal


class Holder(StrEnum):
    """How a module holds those inside it."""

    ATTRIBUTES = "nn.Module"
    LIST = "nn.ModuleList"
    WORDS = "nn.ModuleDict"


@dataclass(slots=True)
class Branch:
    """A module: a layer of torch, or one that only holds others and weights of its own."""

    layer: str = ""
    """The call that makes it, if torch has such a layer."""
    weights: dict[str, str] = field(default_factory=dict)
    """The statements that make its weights, with `{}` for where it is, by their names."""
    inside: dict[str, Branch] = field(default_factory=dict)
    is_root: bool = False
    """Whether it is the class itself, which has nothing in it yet when it is made."""

    @property
    def holder(self) -> Holder:
        """How it holds those inside it."""
        if not self.inside or self.weights or not all(name.isdecimal() for name in self.inside):
            return Holder.ATTRIBUTES
        counted = [str(number) for number in range(len(self.inside))]
        return Holder.LIST if list(self.inside) == counted and not self.is_root else Holder.WORDS


def planted(layers: Mapping[str, str], weights: Mapping[str, str]) -> Branch:
    """Return the modules, of layers and of weights that are in none."""
    root = Branch(is_root=True)
    for path, made in layers.items():
        _at(root, path).layer = made
    for name, statement in weights.items():
        owner, _, last = name.rpartition(".")
        _at(root, owner).weights[last] = statement
    return root


def address(root: Branch, path: str, start: str = "self") -> str:
    """Return the expression for a module or a weight."""
    branch: Branch | None = root
    found = start
    for part in filter(None, path.split(".")):
        found = _child(found, branch.holder if branch is not None else Holder.ATTRIBUTES, part)
        branch = branch.inside.get(part) if branch is not None else None
    return found


def statements(branch: Branch, place: str = "self") -> Iterator[str]:
    """Yield what makes all modules inside one."""
    for name, statement in branch.weights.items():
        yield statement.format(place, name=literal(name))
    for name, child in branch.inside.items():
        where = _child(place, branch.holder, name)
        written = _written(child)
        made = written or _made(child)
        if where.startswith("getattr("):
            yield f"{place}.add_module({literal(name)}, {made})"
        elif branch.holder is not Holder.LIST or made != "nn.Module()":
            # The modules of a list are there already, empty.
            yield f"{where} = {made}"
        if written is None:
            yield from statements(child, where)


def _written(branch: Branch) -> str | None:
    """Return a list of layers, or one by words, as one expression; None if something else is in it."""
    if branch.layer or branch.weights or branch.holder is Holder.ATTRIBUTES:
        return branch.layer or None
    inside = {name: _written(child) for name, child in branch.inside.items()}
    if any(written is None for written in inside.values()):
        return None
    is_list = branch.holder is Holder.LIST
    lines = [f"{written}," if is_list else f"{literal(name)}: {written}," for name, written in inside.items()]
    body = "\n".join(f"    {line}" for text in lines for line in text.split("\n"))
    start, end = "[]" if is_list else "{}"
    return f"{branch.holder}({start}\n{body}\n{end})"


def _made(branch: Branch) -> str:
    if branch.layer:
        return branch.layer
    if branch.holder is Holder.LIST:
        return f"nn.ModuleList(nn.Module() for _ in range({len(branch.inside)}))"
    return f"{branch.holder}()"


def _at(root: Branch, path: str) -> Branch:
    branch = root
    for part in filter(None, path.split(".")):
        branch = branch.inside.setdefault(part, Branch())
    return branch


def _child(place: str, holder: Holder, name: str) -> str:
    if holder is Holder.LIST:
        return f"{place}[{name}]"
    if holder is Holder.WORDS:
        return f"{place}[{literal(name)}]"
    if name.isidentifier() and not keyword.iskeyword(name):
        return f"{place}.{name}"
    return f"getattr({place}, {literal(name)})"
