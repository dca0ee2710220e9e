"""Code generation: a network as a Python module with one class."""

from __future__ import annotations

import keyword
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from prunectl.channels.torch.code import forward
from prunectl.channels.torch.code.expressions import literal, numbers
from prunectl.channels.torch.code.forward import ForwardCode
from prunectl.channels.torch.code.layers import LayerCode, StateShapes, as_layer
from prunectl.channels.torch.export import TracedModel, random_like
from prunectl.channels.torch.fx import WeightedProgram, attribute, quiet, run_with_shapes
from prunectl.channels.verify import TOLERANCE, relative_difference
from prunectl.errors import WorkError, first_line
from prunectl.training.torch._compat import tree_unflatten
from prunectl.training.torch.tensors import tensor_leaves, to_numpy


class Container(StrEnum):
    """The class of a module that only holds other modules."""

    ATTRIBUTES = "nn.Module"
    LIST = "nn.ModuleList"
    DICT = "nn.ModuleDict"


@dataclass(slots=True)
class ModuleNode:
    """A node of the module tree: a layer of torch, or a container with submodules and weights of its own."""

    layer: str = ""
    """The constructor call of the layer; empty for a container."""
    weights: dict[str, str] = field(default_factory=dict)
    """The statements that make its weights, by name, as format strings with {0} for this module and {name}."""
    children: dict[str, ModuleNode] = field(default_factory=dict)
    is_root: bool = False
    """Whether it is the generated class itself, whose submodules are added one by one."""

    @property
    def container(self) -> Container:
        """The class of this container."""
        if not self.children or self.weights or not all(name.isdecimal() for name in self.children):
            return Container.ATTRIBUTES
        counted = [str(number) for number in range(len(self.children))]
        return Container.LIST if list(self.children) == counted and not self.is_root else Container.DICT


def build_tree(layers: Mapping[str, str], weights: Mapping[str, str]) -> ModuleNode:
    """The module tree, from the layers and from the weights outside of layers, both by path."""
    root = ModuleNode(is_root=True)
    for path, constructor in layers.items():
        _descend(root, path).layer = constructor
    for name, statement in weights.items():
        owner, _, last = name.rpartition(".")
        _descend(root, owner).weights[last] = statement
    return root


def access_path(root: ModuleNode, path: str) -> str:
    """The expression for a module or a weight."""
    node: ModuleNode | None = root
    expression = "self"
    for part in filter(None, path.split(".")):
        expression = _child_path(expression, node.container if node is not None else Container.ATTRIBUTES, part)
        node = node.children.get(part) if node is not None else None
    return expression


def statements(branch: ModuleNode, path: str = "self") -> Iterator[str]:
    """Yield the statements that make the weights and submodules of a module."""
    for name, statement in branch.weights.items():
        yield statement.format(path, name=literal(name))
    for name, child in branch.children.items():
        child_path = _child_path(path, branch.container, name)
        expression = _as_expression(child)
        constructor = expression or _constructor_of(child)
        if child_path.startswith("getattr("):
            yield f"{path}.add_module({literal(name)}, {constructor})"
        elif branch.container is not Container.LIST or constructor != "nn.Module()":
            # A ModuleList is made with empty modules: there is no need to assign these again.
            yield f"{child_path} = {constructor}"
        if expression is None:
            yield from statements(child, child_path)


def _as_expression(branch: ModuleNode) -> str | None:
    """A layer, or a ModuleList or ModuleDict of such, as one expression; None if other modules are inside."""
    if branch.layer or branch.weights or branch.container is Container.ATTRIBUTES:
        return branch.layer or None
    inside = {name: _as_expression(child) for name, child in branch.children.items()}
    if any(expression is None for expression in inside.values()):
        return None
    is_list = branch.container is Container.LIST
    lines = [f"{expression}," if is_list else f"{literal(name)}: {expression}," for name, expression in inside.items()]
    body = "\n".join(f"    {line}" for text in lines for line in text.split("\n"))
    start, end = "[]" if is_list else "{}"
    return f"{branch.container}({start}\n{body}\n{end})"


def _constructor_of(branch: ModuleNode) -> str:
    if branch.layer:
        return branch.layer
    if branch.container is Container.LIST:
        return f"nn.ModuleList(nn.Module() for _ in range({len(branch.children)}))"
    return f"{branch.container}()"


def _descend(root: ModuleNode, path: str) -> ModuleNode:
    node = root
    for part in filter(None, path.split(".")):
        node = node.children.setdefault(part, ModuleNode())
    return node


def _child_path(path: str, holder: Container, name: str) -> str:
    if holder is Container.LIST:
        return f"{path}[{name}]"
    if holder is Container.DICT:
        return f"{path}[{literal(name)}]"
    if name.isidentifier() and not keyword.iskeyword(name):
        return f"{path}.{name}"
    return f"getattr({path}, {literal(name)})"


HEADER = "written by prunectl."
_MAX_INLINE = 64
"""The most elements of a constant whose values are written in the code."""


@dataclass(frozen=True, slots=True)
class GeneratedModule:
    """The text of a Python module, and the state dict of its class."""

    name: str
    text: str
    state: Mapping[str, torch.Tensor]
    """The state dict of the class."""
    extras: Mapping[str, torch.Tensor]
    """The part of `state` that the original does not have: constants that are too long for the code."""


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer that alone uses its weight."""

    path: str
    weight: torch.Tensor
    has_bias: bool
    rows: int
    """The number of input vectors of the layer for one example."""


@dataclass(frozen=True, slots=True)
class ReplacedLayers:
    """Layers that replace linear layers."""

    constructors: Mapping[str, str]
    """The constructor call of each new layer, by path."""
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    """The tensors of each new layer that replace the weight, by path and name; the bias is kept."""
    code: str
    """The definition of the class of the new layers."""
    imports: tuple[str, ...] = ()
    """The imports that this class needs."""


Replace = Callable[[Sequence[LinearLayer]], ReplacedLayers]


def generate_module(
    traced: TracedModel, program: WeightedProgram, name: str, loading: Sequence[str], replace: Replace | None = None
) -> GeneratedModule:
    """Generate the class for a program, and verify that it computes the same; `loading` are lines of its docstring."""
    state, extras = _state(traced, program), _constants(traced, program)
    generator = torch.Generator().manual_seed(0)
    inputs = [random_like(example, generator) for example in traced.examples]
    expected, shapes = run_with_shapes(program, [value.clone() for value in inputs])
    layers, constructors = _layers(traced, program, state, shapes)
    replaced = None if replace is None else replace(_linear_layers(traced, program, layers, shapes))
    if replaced is not None:
        constructors |= replaced.constructors
        for path, weights in replaced.weights.items():
            del state[f"{path}.weight"]
            state |= {f"{path}.{key}": value for key, value in weights.items()}
    large = {key: value for key, value in extras.items() if value.numel() > _MAX_INLINE}
    statement_of = {key: _statement(traced, key, value, layers) for key, value in state.items()}
    statement_of |= {key: _constant(key, value, is_large=key in large) for key, value in extras.items()}
    root = build_tree(constructors, {key: statement for key, statement in statement_of.items() if statement})
    code = ForwardCode(
        program.module.graph, layers, shapes, lambda path: access_path(root, path), _returned(traced, program)
    )
    lines = [*statements(root), *_shared(traced, root), *_precision(state)]
    steps = forward.body(code)
    header = _header(name, loading, steps, () if replaced is None else replaced.imports)
    text = _text(header, f"{name}({root.container})", forward.signature(code), lines, steps)
    if replaced is not None:
        text += f"\n{replaced.code}"
    generated = GeneratedModule(name, text, state | large, large)
    _verify(generated, inputs, expected)
    return generated


def _state(traced: TracedModel, program: WeightedProgram) -> dict[str, torch.Tensor]:
    if traced.original is None:
        raise WorkError(
            "an exported program has no class that its weights would fit", hint="write it as a program: -o OUT.pt2"
        )
    state = traced.original.state_dict()
    return {name: program.values.get(name, value).detach() for name, value in state.items()}


def _constants(traced: TracedModel, program: WeightedProgram) -> dict[str, torch.Tensor]:
    """The constants that the graph reads and the state dict lacks."""
    state = _state(traced, program)
    targets = [str(node.target) for node in program.module.graph.nodes if node.op == "get_attr" and node.users]
    return {name: attribute(traced.module, name) for name in dict.fromkeys(targets) if name not in state}


def _layers(
    traced: TracedModel,
    program: WeightedProgram,
    state: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[torch.fx.Node, LayerCode], dict[str, str]]:
    """The layers of operations, and their constructor calls by path; different uses of a layer are left out."""
    state_shapes = StateShapes({name: tuple(value.shape) for name, value in state.items()}, _groups(traced))
    layers: dict[torch.fx.Node, LayerCode] = {}
    constructors: dict[str, str] = {}
    for node in program.module.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes:
            rank = len(shapes.get(node.all_input_nodes[0].name, ()))
            layer = as_layer(node, state_shapes, rank)
            if layer is not None and constructors.setdefault(layer.path, layer.emit) == layer.emit:
                layers[node] = layer
    return layers, {path: constructors[path] for path in _in_order(constructors, state)}


def _in_order(constructors: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> list[str]:
    owners = dict.fromkeys(name.rpartition(".")[0] for name in state)
    return [path for path in owners if path in constructors]


def _groups(traced: TracedModel) -> dict[str, tuple[str, ...]]:
    """All names of each weight that has several."""
    groups: dict[int, list[str]] = {}
    if traced.original is not None:
        for name, weight in traced.original.named_parameters(remove_duplicate=False):
            groups.setdefault(id(weight), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}


def _statement(traced: TracedModel, name: str, value: torch.Tensor, layers: Mapping[torch.fx.Node, LayerCode]) -> str:
    """The statement that registers a weight outside of layers."""
    owner, _, last = name.rpartition(".")
    if any(layer.path == owner for layer in layers.values()):
        return ""
    empty = f"torch.zeros({literal(tuple(value.shape))}" + (
        f", dtype={value.dtype})" if value.dtype is not torch.float32 else ")"
    )
    trained = dict(traced.original.named_parameters(remove_duplicate=False)) if traced.original is not None else {}
    if name not in trained:
        return f"{{0}}.register_buffer({{name}}, {empty})"
    suffix = "" if trained[name].requires_grad else ", requires_grad=False"
    if last.isidentifier():
        return f"{{0}}.{last} = nn.Parameter({empty}{suffix})"
    return f"{{0}}.register_parameter({{name}}, nn.Parameter({empty}{suffix}))"


def _constant(_: str, value: torch.Tensor, *, is_large: bool) -> str:
    if is_large:
        return f"{{0}}.register_buffer({{name}}, torch.zeros({literal(tuple(value.shape))}, dtype={value.dtype}))"
    return f"{{0}}.register_buffer({{name}}, {numbers(value)}, persistent=False)"


def _shared(traced: TracedModel, root: Any) -> list[str]:
    lines: list[str] = []
    for names in dict.fromkeys(_groups(traced).values()):
        first, *others = names
        lines += [f"{access_path(root, other)} = {access_path(root, first)}" for other in others]
    return lines


def _precision(state: Mapping[str, torch.Tensor]) -> list[str]:
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    return ["self.double()"] if dtypes == {torch.float64} else []


def _returned(traced: TracedModel, program: WeightedProgram) -> Any:
    """The output nodes, in the nested structure that the network returns."""
    output = next(node for node in program.module.graph.nodes if node.op == "output")
    flat = list(output.args[0]) if isinstance(output.args[0], list | tuple) else [output.args[0]]
    return flat[0] if traced.out_spec is None else _unwrapped(tree_unflatten(flat, traced.out_spec))


def _unwrapped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unwrapped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            [_unwrapped(item) for item in value]
            if isinstance(value, list)
            else tuple(_unwrapped(item) for item in value)
        )
    return value


def _linear_layers(
    traced: TracedModel,
    program: WeightedProgram,
    layers: Mapping[torch.fx.Node, LayerCode],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[LinearLayer]:
    """The linear layers whose weights no other operation uses, in the order of the network."""
    state, shared = _state(traced, program), _groups(traced)
    batch = max(len(traced.examples[0]), 1) if traced.examples[0].ndim else 1
    by_path: dict[str, LinearLayer] = {}
    others = {
        str(weight.target)
        for weight in program.module.graph.nodes
        if weight.op == "get_attr" and any(user not in layers for user in weight.users)
    }
    for layer in layers.values():
        key = f"{layer.path}.weight"
        if layer.emit.startswith("nn.Linear(") and key not in shared and key not in others:
            rows = math.prod(shapes.get(layer.inputs[0].name, (batch,))[:-1])
            known = by_path.get(layer.path)
            rows = max(1, rows // batch) + (known.rows if known else 0)
            by_path[layer.path] = LinearLayer(layer.path, state[key], f"{layer.path}.bias" in state, rows)
    return list(by_path.values())


def _header(name: str, loading: Sequence[str], steps: Sequence[str], imports: Sequence[str]) -> list[str]:
    return [
        f'"""{name}, the network for the weights in the file beside this one, {HEADER}',
        "",
        f"    model = {name}()",
        *(f"    {line}" for line in loading),
        '"""',
        "",
        *([*imports, ""] if imports else []),
        "import torch",
        *(["import torch.nn.functional as F"] if any("F." in step for step in steps) else []),
        "from torch import nn",
    ]


def _text(opening: Sequence[str], base: str, inputs: Sequence[str], setup: Sequence[str], steps: Sequence[str]) -> str:
    takes = ", ".join(["self", *(f"{name}: torch.Tensor" for name in inputs)])
    lines = [
        *opening,
        "",
        "",
        f"class {base}:",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        *(f"        {line}" for text in setup for line in text.split("\n")),
        "",
        f"    def forward({takes}):",
        *(f"        {step}" for step in steps),
    ]
    return "\n".join(lines) + "\n"


def _verify(generated: GeneratedModule, inputs: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Run the generated class, and compare its outputs with those of the network."""
    namespace = types.ModuleType("written")
    try:
        exec(compile(generated.text, "<written>", "exec"), namespace.__dict__)  # noqa: S102 - it is our own text
        with _Uninitialized():
            module = getattr(namespace, generated.name)().eval()
        module.load_state_dict(dict(generated.state), strict=True)
        with quiet():
            actual = tensor_leaves(module(*inputs))
        pairs = zip(actual, expected, strict=True)
        worst = max(
            (relative_difference(to_numpy(value), to_numpy(reference)) for value, reference in pairs), default=0.0
        )
    except Exception as error:
        raise WorkError(f"the network cannot be written as code: {first_line(error)}") from error
    if not worst <= TOLERANCE:
        raise WorkError(f"the generated code gives outputs that differ by {worst:.1e}; nothing was written")


class _Uninitialized(TorchFunctionMode):
    """Skips the random initialization of parameters, to save time: all of them are loaded next."""

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, unless it fills a parameter with random numbers."""
        filled = args[0] if args else (kwargs or {}).get("tensor")
        is_filling = getattr(func, "__name__", "") in _FILLS and isinstance(filled, torch.nn.Parameter)
        return filled if is_filling else func(*args, **(kwargs or {}))


_FILLS = frozenset({"uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "xavier_normal_"})
