"""From a file of PyTorch to a graph of its operations, every weight known by the file's name for it."""

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
from prunectl.formats.base import ModelFile
from prunectl.training.backend import ModelOrigin
from prunectl.training.torch.build import build, load_program
from prunectl.training.torch.tensors import leaves, to_numpy

_CLOSE = 1e-4
_SIZES = ("size", "shape")


def open_batch_axis(
    module: torch.fx.GraphModule, original: torch.nn.Module, examples: Examples
) -> torch.fx.GraphModule | None:
    """Return a program that says for one at a time what the module says; None if it was traced for so many only.

    `len(x)` is a number like any other once it was traced: where a size is as long as the batch was, it may be that.
    Whether it is so is seen when it runs.
    """
    sizes = {len(one) for one in examples if one.ndim}
    if len(sizes) != 1 or sizes == {1} or not all(one.ndim for one in examples):
        return None
    generator = torch.Generator().manual_seed(0)
    single = [random_like(with_batch(one, 1), generator) for one in examples]
    try:
        with quiet():
            expected = leaves(original(*(one.clone() for one in single)))
    except Exception:  # noqa: BLE001 - it is the user's code
        return None
    (size,) = sizes
    return next((one for one in (module, _measure_batch(module, size)) if _says(one, single, expected)), None)


def _says(module: torch.fx.GraphModule, inputs: Iterable[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    try:
        found = run(WeightedProgram(module), inputs, lambda *_: None)
        return all(
            relative_difference(to_numpy(one), to_numpy(other)) <= _CLOSE
            for one, other in zip(found, expected, strict=True)
        )
    except Exception:  # noqa: BLE001 - PyTorch raises what it likes
        return False


def _measure_batch(module: torch.fx.GraphModule, size: int) -> torch.fx.GraphModule:
    """Return a program with the size of the batch measured wherever a shape begins with it."""
    with quiet():
        graph = copy.deepcopy(module.graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        measured = graph.call_function(torch.ops.aten.sym_size.int, (inputs[0], 0))
    for node in graph.nodes:
        for name in _SIZES if node.op == "call_function" else ():
            said = arguments(node).get(name)
            if isinstance(said, list | tuple) and said and said[0] == size and type(said[0]) is int:
                set_argument(node, name, [measured, *said[1:]])
    return torch.fx.GraphModule(module, graph)


_BETWEEN: tuple[tuple[str, Mapping[str, int]], ...] = (
    ("contiguous", {}),
    ("squeeze", {"dim": -2}),
    ("transpose", {"dim0": 0, "dim1": -2}),
    ("unsqueeze", {"dim": 0}),
)
"""What stands between what is taken and what was taken apart, from behind."""


def split_packed_qkv(graph: torch.fx.Graph) -> None:
    """Take parts of the last axis directly where they are moved to the front first."""
    for node in list(graph.nodes):
        found = _origin(node) if node.op == "call_function" and op_name(node) == "select" else None
        if found is not None:
            whole, width, number = found
            with graph.inserting_before(node):
                cut = graph.call_function(
                    torch.ops.aten.slice.Tensor, (whole, -1, number * width, (number + 1) * width)
                )
                # As it lay in memory before: what follows may see it in another shape without a copy.
                part = graph.call_function(torch.ops.aten.contiguous.default, (cut,))
            cut.meta, part.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    graph.eliminate_dead_code(_is_needed)


def _origin(node: torch.fx.Node) -> tuple[torch.fx.Node, int, int] | None:
    """Return what a part is taken from, how wide it is, and which it is."""
    said = arguments(node)
    if said["dim"] != 0 or type(said["index"]) is not int or said["index"] < 0:
        return None
    above = said["self"]
    for name, wanted in _BETWEEN:
        held = arguments(above) if isinstance(above, torch.fx.Node) and above.op == "call_function" else {}
        if not held or op_name(above) != name or any(held.get(key) != value for key, value in wanted.items()):
            return None
        above = held["self"]
    if above.op != "call_function" or op_name(above) != "unflatten":
        return None
    held = arguments(above)
    sizes = held["sizes"]
    if held["dim"] != -1 or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        return None
    return held["self"], sizes[1], said["index"]


def _is_needed(node: torch.fx.Node) -> bool:
    """Whether an operation may do more than give a value: only what took the parts apart goes."""
    names = {"unflatten", *(name for name, _ in _BETWEEN)}
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
    light: Examples
    """The same for one at a time, if it takes that."""
    program: ExportedProgram
    original: torch.nn.Module | None
    """What was traced; a program has none."""
    holds_module: bool = False
    """Whether the file holds a module, and not its weights alone."""
    is_trusted: bool = False


def trace_model(model: ModelFile, origin: ModelOrigin) -> TracedModel:
    """Read a file, and trace what is in it."""
    if model.format == "torch-export":
        return _program(model, origin)
    built = build(model, origin)
    program, used = trace(built.module, examples(origin.inputs, built.module, str(model.path)), str(model.path))
    named = {name: of for of, name in built.names.items()}
    module = _graph(program)
    open_module = open_batch_axis(module, built.module, used)
    return TracedModel(
        module=open_module or module,
        names=named,
        aliases=_aliases(built.module, named),
        examples=used,
        light=used if open_module is None else tuple(with_batch(one, 1) for one in used),
        program=program,
        original=built.module,
        holds_module=not origin.model,
        is_trusted=origin.is_trusted,
    )


def _program(model: ModelFile, origin: ModelOrigin) -> TracedModel:
    for word, said in (("--model", origin.model), ("--input", origin.inputs)):
        if said:
            raise UsageError(f"{word} does not go with a .pt2, which says all by itself", hint=f"leave out {word}")
    with quiet():
        program = load_program(model, origin)
    given, named = program.example_inputs, {tensor.name: tensor.name for tensor in model.tensors}
    if given is None or given[1] or not all(isinstance(one, torch.Tensor) for one in given[0]):
        used = _placeholders(program)
    else:
        used = tuple(given[0])
    module = _graph(program)
    return TracedModel(module, named, {}, used, _without_weights(program, module, used), program, None)


def _placeholders(program: ExportedProgram) -> Examples:
    """Return examples of the shapes that a program says, those that are open with the lengths they were traced on."""
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


def _graph(program: ExportedProgram) -> torch.fx.GraphModule:
    module = program.module()
    if not isinstance(module, torch.fx.GraphModule):
        raise InputError("this PyTorch gives no graph for a program")
    for node in list(module.graph.nodes):
        if node.op == "call_module" and not node.users:
            module.graph.erase_node(node)  # it only holds inputs against what they were traced on
    split_packed_qkv(module.graph)
    module.recompile()
    return module


def _without_weights(program: ExportedProgram, module: torch.fx.GraphModule, used: Examples) -> Examples:
    """Return examples of one at a time where a batch may have any size."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    if not shapes or not all(shape and isinstance(shape[0], torch.SymInt) for shape in shapes):
        return used
    single = tuple(with_batch(one, 1) for one in used)
    try:
        shapes_of(WeightedProgram(module), single)
    except Exception:  # noqa: BLE001 - PyTorch raises what it likes
        return used
    return single


def _aliases(module: torch.nn.Module, named: Mapping[str, str]) -> dict[str, str]:
    """Return the second names of weights that several layers share."""
    shared: dict[int, list[str]] = defaultdict(list)
    for name, weight in module.named_parameters(remove_duplicate=False):
        if name in named:
            shared[id(weight)].append(named[name])
    return {second: first for first, *others in shared.values() for second in others}
