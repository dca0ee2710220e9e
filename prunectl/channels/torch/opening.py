"""From a file of PyTorch to a graph of its operations, every weight known by the file's name for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

from prunectl.channels.torch.batches import any_batch
from prunectl.channels.torch.inputs import examples, with_batch
from prunectl.channels.torch.packed import unpack
from prunectl.channels.torch.run import Network, shapes_of
from prunectl.channels.torch.tracing import Examples, quietly, trace
from prunectl.errors import InputError, UsageError
from prunectl.formats.base import ModelFile
from prunectl.training.network import Origin
from prunectl.training.torch.build import build
from prunectl.training.torch.exported import load_program


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
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


def opened(model: ModelFile, origin: Origin) -> Opened:
    """Read a file, and trace what is in it."""
    if model.format == "torch-export":
        return _program(model, origin)
    built = build(model, origin)
    program, used = trace(built.module, examples(origin.inputs, built.module, str(model.path)), str(model.path))
    named = {name: of for of, name in built.names.items()}
    module = _graph(program)
    open_module = any_batch(module, built.module, used)
    return Opened(
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


def _program(model: ModelFile, origin: Origin) -> Opened:
    for word, said in (("--model", origin.model), ("--input", origin.inputs)):
        if said:
            raise UsageError(f"{word} does not go with a .pt2, which says all by itself", hint=f"leave out {word}")
    with quietly():
        program = load_program(model, origin)
    given, named = program.example_inputs, {tensor.name: tensor.name for tensor in model.tensors}
    if given is None or given[1] or not all(isinstance(one, torch.Tensor) for one in given[0]):
        used = _placeholders(program)
    else:
        used = tuple(given[0])
    module = _graph(program)
    return Opened(module, named, {}, used, _light(program, module, used), program, None)


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
    unpack(module.graph)
    module.recompile()
    return module


def _light(program: ExportedProgram, module: torch.fx.GraphModule, used: Examples) -> Examples:
    """Return examples of one at a time where a batch may have any size."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    if not shapes or not all(shape and isinstance(shape[0], torch.SymInt) for shape in shapes):
        return used
    single = tuple(with_batch(one, 1) for one in used)
    try:
        shapes_of(Network(module), single)
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
