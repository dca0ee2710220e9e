"""A network as the text of a Python module with one class."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunectl.channels.proof import TOLERANCE, apart
from prunectl.channels.torch.code import forward
from prunectl.channels.torch.code.forward import Program
from prunectl.channels.torch.code.layers import Layer, State, layer_of
from prunectl.channels.torch.code.text import literal, numbers
from prunectl.channels.torch.code.tree import address, planted, statements
from prunectl.channels.torch.cut import attribute
from prunectl.channels.torch.inputs import random_like
from prunectl.channels.torch.opening import Opened
from prunectl.channels.torch.run import Network, outcome, shapes_of
from prunectl.channels.torch.tracing import quietly
from prunectl.errors import WorkError, first_line
from prunectl.training.torch.arrays import to_numpy
from prunectl.training.torch.outputs import leaves

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


def write(found: Opened, network: Network, name: str, loading: Sequence[str]) -> Written:
    """Return a class that does what a network does, held against it."""
    state, extras = _state(found, network), _constants(found, network)
    shapes = shapes_of(network, found.examples)
    layers, made = _layers(found, network, state, shapes)
    large = {key: value for key, value in extras.items() if value.numel() > _SMALL}
    owned = {key: _statement(found, key, value, layers) for key, value in state.items()}
    owned |= {key: _constant(key, value, is_large=key in large) for key, value in extras.items()}
    root = planted(made, {key: statement for key, statement in owned.items() if statement})
    program = Program(network.module.graph, layers, shapes, lambda path: address(root, path), _returned(found, network))
    lines = [*statements(root), *_shared(found, root), *_precision(state)]
    steps = forward.body(program)
    text = _text(_opening(name, loading, steps), f"{name}({root.holder})", forward.signature(program), lines, steps)
    done = Written(name, text, state | large, large)
    _hold(found, network, done)
    return done


def _state(found: Opened, network: Network) -> dict[str, torch.Tensor]:
    if found.original is None:
        raise WorkError("a program is written as a program")
    held = found.original.state_dict()
    return {name: network.values.get(name, value).detach() for name, value in held.items()}


def _constants(found: Opened, network: Network) -> dict[str, torch.Tensor]:
    """Return what the graph reads that is in no state."""
    held = _state(found, network)
    targets = [str(node.target) for node in network.module.graph.nodes if node.op == "get_attr" and node.users]
    return {name: attribute(found.module, name) for name in dict.fromkeys(targets) if name not in held}


def _layers(
    found: Opened, network: Network, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[torch.fx.Node, Layer], dict[str, str]]:
    """Return the layers of operations, and how each is made; what one is used for differently is written out."""
    known = State({name: tuple(value.shape) for name, value in state.items()}, _groups(found))
    layers: dict[torch.fx.Node, Layer] = {}
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


def _groups(found: Opened) -> dict[str, tuple[str, ...]]:
    """Return all names of each weight that has several."""
    groups: dict[int, list[str]] = {}
    if found.original is not None:
        for name, weight in found.original.named_parameters(remove_duplicate=False):
            groups.setdefault(id(weight), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}


def _statement(found: Opened, name: str, value: torch.Tensor, layers: Mapping[torch.fx.Node, Layer]) -> str:
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


def _shared(found: Opened, root: Any) -> list[str]:
    done: list[str] = []
    for names in dict.fromkeys(_groups(found).values()):
        first, *others = names
        done += [f"{address(root, other)} = {address(root, first)}" for other in others]
    return done


def _precision(state: Mapping[str, torch.Tensor]) -> list[str]:
    kinds = {value.dtype for value in state.values() if value.is_floating_point()}
    return ["self.double()"] if kinds == {torch.float64} else []


def _returned(found: Opened, network: Network) -> Any:
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


def _hold(found: Opened, network: Network, written: Written) -> None:
    """Run the class that was written beside the network that it was written from."""
    home = types.ModuleType("written")
    try:
        exec(compile(written.text, "<written>", "exec"), home.__dict__)  # noqa: S102 - it is our own text
        module = getattr(home, written.name)().eval()
        module.load_state_dict(dict(written.state), strict=True)
        generator = torch.Generator().manual_seed(0)
        inputs = [random_like(example, generator) for example in found.examples]
        with quietly():
            said = leaves(module(*[one.clone() for one in inputs]))
        expected = outcome(network, inputs, lambda *_: None)
        pairs = zip(said, expected, strict=True)
        worst = max((apart(to_numpy(one), to_numpy(other)) for one, other in pairs), default=0.0)
    except Exception as error:
        raise WorkError(f"the network cannot be written as code: {first_line(error)}") from error
    if not worst <= TOLERANCE:
        raise WorkError(f"the network, written as code, differs by {worst:.1e}; nothing was written")
