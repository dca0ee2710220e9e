"""From a PyTorch file to a traced program, each weight with its name in the file."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

from prunectl.channels.torch.fx import WeightedProgram, arguments, op_name, run, set_argument, shapes_of
from prunectl.channels.torch.tracing import Examples, examples, quiet, random_like, trace, with_batch
from prunectl.channels.verify import relative_difference
from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Family, ModelFile
from prunectl.training.backend import LoadOptions
from prunectl.training.torch.build import build_module, load_program
from prunectl.training.torch.tensors import tensor_leaves, to_numpy

_CLOSE = 1e-4
_SIZES = ("size", "shape")


def open_batch_axis(
    module: torch.fx.GraphModule, original: torch.nn.Module, examples: Examples
) -> torch.fx.GraphModule | None:
    """A program that says for one at a time what the module says; None if it was traced for so many only.

    `len(x)` is a number like any other once it was traced: where a size is as long as the batch was, it may be that.
    Whether it is so is seen when it runs.
    """
    sizes = {len(value) for value in examples if value.ndim}
    if len(sizes) != 1 or sizes == {1} or not all(value.ndim for value in examples):
        return None
    generator = torch.Generator().manual_seed(0)
    single = [random_like(with_batch(value, 1), generator) for value in examples]
    try:
        with quiet():
            expected = tensor_leaves(original(*(value.clone() for value in single)))
    except Exception:  # noqa: BLE001 - it is the user's code
        return None
    (size,) = sizes
    return next((value for value in (module, _measure_batch(module, size)) if _gives(value, single, expected)), None)


def _gives(module: torch.fx.GraphModule, inputs: Iterable[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    try:
        outputs = run(WeightedProgram(module), inputs, lambda *_: None)
        return all(
            relative_difference(to_numpy(value), to_numpy(reference)) <= _CLOSE
            for value, reference in zip(outputs, expected, strict=True)
        )
    except Exception:  # noqa: BLE001 - PyTorch raises what it likes
        return False


def _measure_batch(module: torch.fx.GraphModule, size: int) -> torch.fx.GraphModule:
    """A program with the size of the batch measured wherever a shape begins with it."""
    with quiet():
        graph = copy.deepcopy(module.graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        measured = graph.call_function(torch.ops.aten.sym_size.int, (inputs[0], 0))
    for node in graph.nodes:
        for name in _SIZES if node.op == "call_function" else ():
            sizes = arguments(node).get(name)
            if isinstance(sizes, list | tuple) and sizes and sizes[0] == size and type(sizes[0]) is int:
                set_argument(node, name, [measured, *sizes[1:]])
    return torch.fx.GraphModule(module, graph)


_BEFORE_SELECT: tuple[tuple[str, Mapping[str, int]], ...] = (
    ("contiguous", {}),
    ("squeeze", {"dim": -2}),
    ("transpose", {"dim0": 0, "dim1": -2}),
    ("unsqueeze", {"dim": 0}),
)
"""What stands between what is taken and what was taken apart, from behind."""


def split_packed_qkv(graph: torch.fx.Graph) -> None:
    """Take parts of the last axis directly where they are moved to the front first."""
    for node in list(graph.nodes):
        origin = _origin(node) if node.op == "call_function" and op_name(node) == "select" else None
        if origin is not None:
            packed, width, number = origin
            with graph.inserting_before(node):
                cut = graph.call_function(
                    torch.ops.aten.slice.Tensor, (packed, -1, number * width, (number + 1) * width)
                )
                # As it lay in memory before: what follows may see it in another shape without a copy.
                part = graph.call_function(torch.ops.aten.contiguous.default, (cut,))
            cut.meta, part.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    graph.eliminate_dead_code(_has_effect)


def _origin(node: torch.fx.Node) -> tuple[torch.fx.Node, int, int] | None:
    """The source of a part, its width and its number."""
    inputs = arguments(node)
    if inputs["dim"] != 0 or type(inputs["index"]) is not int or inputs["index"] < 0:
        return None
    above = inputs["self"]
    for name, expected in _BEFORE_SELECT:
        arguments_of = arguments(above) if isinstance(above, torch.fx.Node) and above.op == "call_function" else {}
        if (
            not arguments_of
            or op_name(above) != name
            or any(arguments_of.get(key) != value for key, value in expected.items())
        ):
            return None
        above = arguments_of["self"]
    if above.op != "call_function" or op_name(above) != "unflatten":
        return None
    arguments_of = arguments(above)
    sizes = arguments_of["sizes"]
    if arguments_of["dim"] != -1 or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        return None
    return arguments_of["self"], sizes[1], inputs["index"]


def _has_effect(node: torch.fx.Node) -> bool:
    """Whether an operation may do more than give a value: only what took the parts apart goes."""
    names = {"unflatten", *(name for name, _ in _BEFORE_SELECT)}
    return node.op != "call_function" or op_name(node) not in names


@dataclass(frozen=True, slots=True, eq=False)
class TracedModel:
    """A network in memory, and where its numbers are in the file."""

    module: torch.fx.GraphModule
    """Its operations; weights are attributes."""
    names: Mapping[str, str]
    """From attributes to tensors of the file."""
    aliases: Mapping[str, str]
    """Tensors of the file that are another one under a second name."""
    examples: Examples
    """What it was traced on."""
    single_inputs: Examples
    """The same for one at a time, if it takes that."""
    program: ExportedProgram
    original: torch.nn.Module | None
    """What was traced; a program has none."""
    holds_module: bool = False
    """Whether the file holds a module, and not its weights alone."""
    is_trusted: bool = False


def trace_model(model: ModelFile, origin: LoadOptions) -> TracedModel:
    """Read a file, and trace what is in it."""
    if model.family is Family.TORCH_PROGRAM:
        return _load_exported(model, origin)
    built = build_module(model, origin)
    program, used = trace(built.module, examples(origin.inputs, built.module, str(model.path)), str(model.path))
    named = {name: tensor for tensor, name in built.names.items()}
    module = _graph_module(program)
    open_module = open_batch_axis(module, built.module, used)
    return TracedModel(
        module=open_module or module,
        names=named,
        aliases=_aliases(built.module, named),
        examples=used,
        single_inputs=used if open_module is None else tuple(with_batch(example, 1) for example in used),
        program=program,
        original=built.module,
        holds_module=not origin.model,
        is_trusted=origin.is_trusted,
    )


def _load_exported(model: ModelFile, origin: LoadOptions) -> TracedModel:
    for option, value in (("--model", origin.model), ("--input", origin.inputs)):
        if value:
            raise UsageError(f"{option} does not go with a .pt2, which says all by itself", hint=f"leave out {option}")
    with quiet():
        program = load_program(model, origin)
    example_inputs, names = program.example_inputs, {tensor.name: tensor.name for tensor in model.tensors}
    if (
        example_inputs is None
        or example_inputs[1]
        or not all(isinstance(value, torch.Tensor) for value in example_inputs[0])
    ):
        used = _placeholders(program)
    else:
        used = tuple(example_inputs[0])
    module = _graph_module(program)
    return TracedModel(module, names, {}, used, _single_inputs(program, module, used), program, None)


def _placeholders(program: ExportedProgram) -> Examples:
    """Examples of the shapes that a program says, those that are open with the lengths they were traced on."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return tuple(
        torch.zeros([_hint(length) for length in value.shape], dtype=value.dtype)
        for value in values
        if isinstance(value, torch.Tensor)
    )


def _hint(length: int | torch.SymInt) -> int:
    if isinstance(length, int):
        return length
    hint = length.node.hint
    return 2 if hint is None else int(hint)


def _graph_module(program: ExportedProgram) -> torch.fx.GraphModule:
    module = program.module()
    if not isinstance(module, torch.fx.GraphModule):
        raise InputError("this PyTorch gives no graph for a program")
    for node in list(module.graph.nodes):
        if node.op == "call_module" and not node.users:
            module.graph.erase_node(node)  # it only holds inputs against what they were traced on
    split_packed_qkv(module.graph)
    module.recompile()
    return module


def _single_inputs(program: ExportedProgram, module: torch.fx.GraphModule, used: Examples) -> Examples:
    """Examples of one at a time where a batch may have any size."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    if not shapes or not all(shape and isinstance(shape[0], torch.SymInt) for shape in shapes):
        return used
    single = tuple(with_batch(example, 1) for example in used)
    try:
        shapes_of(WeightedProgram(module), single)
    except Exception:  # noqa: BLE001 - PyTorch raises what it likes
        return used
    return single


def _aliases(module: torch.nn.Module, named: Mapping[str, str]) -> dict[str, str]:
    """The second names of weights that several layers share."""
    shared: dict[int, list[str]] = defaultdict(list)
    for name, weight in module.named_parameters(remove_duplicate=False):
        if name in named:
            shared[id(weight)].append(named[name])
    return {second: first for first, *others in shared.values() for second in others}
