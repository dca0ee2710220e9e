"""A network as the text of a Python module with one class."""

from __future__ import annotations

import keyword
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from prunectl.channels.torch.code import forward
from prunectl.channels.torch.code.expressions import literal, numbers
from prunectl.channels.torch.code.forward import ForwardCode
from prunectl.channels.torch.code.layers import LayerCode, StateShapes, layer_of
from prunectl.channels.torch.export import TracedModel
from prunectl.channels.torch.fx import WeightedProgram, run, shapes_of
from prunectl.channels.torch.resize import attribute
from prunectl.channels.torch.tracing import quiet, random_like
from prunectl.channels.verify import TOLERANCE, relative_difference
from prunectl.errors import WorkError, first_line
from prunectl.training.torch.tensors import leaves, to_numpy


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


MARK = "written by prunectl."
_SMALL = 64
"""Elements up to which a constant is written out in the code."""


@dataclass(frozen=True, slots=True)
class Written:
    """The text of a module, and what its class takes."""

    name: str
    text: str
    state: Mapping[str, torch.Tensor]
    """All that its state holds, by the names in it."""
    extras: Mapping[str, torch.Tensor]
    """What of it is no part of the state of the original: constants too long to be written out."""


def write(found: TracedModel, network: WeightedProgram, name: str, loading: Sequence[str]) -> Written:
    """Return a class that does what a network does, held against it."""
    state, extras = _state(found, network), _constants(found, network)
    shapes = shapes_of(network, found.examples)
    layers, made = _layers(found, network, state, shapes)
    large = {key: value for key, value in extras.items() if value.numel() > _SMALL}
    owned = {key: _statement(found, key, value, layers) for key, value in state.items()}
    owned |= {key: _constant(key, value, is_large=key in large) for key, value in extras.items()}
    root = planted(made, {key: statement for key, statement in owned.items() if statement})
    program = ForwardCode(
        network.module.graph, layers, shapes, lambda path: address(root, path), _returned(found, network)
    )
    lines = [*statements(root), *_shared(found, root), *_precision(state)]
    steps = forward.body(program)
    text = _text(_opening(name, loading, steps), f"{name}({root.holder})", forward.signature(program), lines, steps)
    done = Written(name, text, state | large, large)
    _hold(found, network, done)
    return done


def _state(found: TracedModel, network: WeightedProgram) -> dict[str, torch.Tensor]:
    if found.original is None:
        raise WorkError("a program is written as a program")
    held = found.original.state_dict()
    return {name: network.values.get(name, value).detach() for name, value in held.items()}


def _constants(found: TracedModel, network: WeightedProgram) -> dict[str, torch.Tensor]:
    """Return what the graph reads that is in no state."""
    held = _state(found, network)
    targets = [str(node.target) for node in network.module.graph.nodes if node.op == "get_attr" and node.users]
    return {name: attribute(found.module, name) for name in dict.fromkeys(targets) if name not in held}


def _layers(
    found: TracedModel,
    network: WeightedProgram,
    state: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[torch.fx.Node, LayerCode], dict[str, str]]:
    """Return the layers of operations, and how each is made; what one is used for differently is written out."""
    known = StateShapes({name: tuple(value.shape) for name, value in state.items()}, _groups(found))
    layers: dict[torch.fx.Node, LayerCode] = {}
    made: dict[str, str] = {}
    for node in network.module.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes:
            rank = len(shapes.get(node.all_input_nodes[0].name, ()))
            layer = layer_of(node, known, rank)
            if layer is not None and made.setdefault(layer.path, layer.made) == layer.made:
                layers[node] = layer
    return layers, {path: made[path] for path in _in_order(made, state)}


def _in_order(made: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> list[str]:
    owners = dict.fromkeys(name.rpartition(".")[0] for name in state)
    return [path for path in owners if path in made]


def _groups(found: TracedModel) -> dict[str, tuple[str, ...]]:
    """Return all names of each weight that has several."""
    groups: dict[int, list[str]] = {}
    if found.original is not None:
        for name, weight in found.original.named_parameters(remove_duplicate=False):
            groups.setdefault(id(weight), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}


def _statement(found: TracedModel, name: str, value: torch.Tensor, layers: Mapping[torch.fx.Node, LayerCode]) -> str:
    """Return what makes a weight that no layer makes."""
    owner, _, last = name.rpartition(".")
    if any(layer.path == owner for layer in layers.values()):
        return ""
    empty = f"torch.zeros({literal(tuple(value.shape))}" + (f", dtype={value.dtype})" if _is_odd(value) else ")")
    trained = dict(found.original.named_parameters(remove_duplicate=False)) if found.original is not None else {}
    if name not in trained:
        return f"{{0}}.register_buffer({{name}}, {empty})"
    more = "" if trained[name].requires_grad else ", requires_grad=False"
    if last.isidentifier():
        return f"{{0}}.{last} = nn.Parameter({empty}{more})"
    return f"{{0}}.register_parameter({{name}}, nn.Parameter({empty}{more}))"


def _is_odd(value: torch.Tensor) -> bool:
    return value.dtype is not torch.float32


def _constant(_: str, value: torch.Tensor, *, is_large: bool) -> str:
    if is_large:
        return f"{{0}}.register_buffer({{name}}, torch.zeros({literal(tuple(value.shape))}, dtype={value.dtype}))"
    return f"{{0}}.register_buffer({{name}}, {numbers(value)}, persistent=False)"


def _shared(found: TracedModel, root: Any) -> list[str]:
    done: list[str] = []
    for names in dict.fromkeys(_groups(found).values()):
        first, *others = names
        done += [f"{address(root, other)} = {address(root, first)}" for other in others]
    return done


def _precision(state: Mapping[str, torch.Tensor]) -> list[str]:
    kinds = {value.dtype for value in state.values() if value.is_floating_point()}
    return ["self.double()"] if kinds == {torch.float64} else []


def _returned(found: TracedModel, network: WeightedProgram) -> Any:
    """Return the values that come out, in the structure that the network gives them in."""
    output = next(node for node in network.module.graph.nodes if node.op == "output")
    flat = list(output.args[0]) if isinstance(output.args[0], list | tuple) else [output.args[0]]
    spec = found.program.call_spec.out_spec
    return flat[0] if spec is None else _plain(torch.utils._pytree.tree_unflatten(flat, spec))  # noqa: SLF001


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value] if isinstance(value, list) else tuple(_plain(one) for one in value)
    return value


def _opening(name: str, loading: Sequence[str], steps: Sequence[str]) -> list[str]:
    return [
        f'"""{name}, which takes the weights beside it, {MARK}',
        "",
        f"    model = {name}()",
        *(f"    {line}" for line in loading),
        '"""',
        "",
        "import torch",
        *(["import torch.nn.functional as F"] if any("F." in step for step in steps) else []),
        "from torch import nn",
    ]


def _text(opening: Sequence[str], word: str, inputs: Sequence[str], made: Sequence[str], steps: Sequence[str]) -> str:
    takes = ", ".join(["self", *(f"{one}: torch.Tensor" for one in inputs)])
    lines = [
        *opening,
        "",
        "",
        f"class {word}:",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        *(f"        {line}" for text in made for line in text.split("\n")),
        "",
        f"    def forward({takes}):",
        *(f"        {step}" for step in steps),
    ]
    return "\n".join(lines) + "\n"


def _hold(found: TracedModel, network: WeightedProgram, written: Written) -> None:
    """Run the class that was written beside the network that it was written from."""
    home = types.ModuleType("written")
    try:
        exec(compile(written.text, "<written>", "exec"), home.__dict__)  # noqa: S102 - it is our own text
        module = getattr(home, written.name)().eval()
        module.load_state_dict(dict(written.state), strict=True)
        generator = torch.Generator().manual_seed(0)
        inputs = [random_like(example, generator) for example in found.examples]
        with quiet():
            said = leaves(module(*[one.clone() for one in inputs]))
        expected = run(network, inputs, lambda *_: None)
        pairs = zip(said, expected, strict=True)
        worst = max((relative_difference(to_numpy(one), to_numpy(other)) for one, other in pairs), default=0.0)
    except Exception as error:
        raise WorkError(f"the network cannot be written as code: {first_line(error)}") from error
    if not worst <= TOLERANCE:
        raise WorkError(f"the network, written as code, differs by {worst:.1e}; nothing was written")
