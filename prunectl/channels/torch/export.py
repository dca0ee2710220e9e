"""Tracing: from a PyTorch file to a torch.fx graph, recorded or from torch.export, with the weights' file names."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from prunectl.channels.graph import Shape
from prunectl.channels.lengths import no_shape, parse_input
from prunectl.channels.torch.attention import split_packed_qkv
from prunectl.channels.torch.fx import (
    WeightedProgram,
    arguments,
    quiet,
    run_with_shapes,
    set_argument,
    shapes_of,
)
from prunectl.channels.verify import relative_difference
from prunectl.errors import InputError, UsageError, first_line
from prunectl.formats.base import Family, ModelFile
from prunectl.training.backend import LoadOptions
from prunectl.training.torch._compat import convert_script
from prunectl.training.torch.build import build_module, input_specs, load_program
from prunectl.training.torch.tensors import tensor_leaves, to_numpy

Examples = tuple[torch.Tensor, ...]
_MISFITS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""The exceptions that PyTorch raises if a program does not accept its inputs."""


@dataclass(frozen=True, slots=True, eq=False)
class TracedModel:
    """A traced network in memory, and the names of its weights in the file."""

    module: torch.fx.GraphModule
    """The graph; weights are attributes of this module."""
    names: Mapping[str, str]
    """From attributes of the graph module to tensors of the file."""
    aliases: Mapping[str, str]
    """Second names of shared weights in the file, each with the first name."""
    examples: Examples
    """The inputs that the network was traced on."""
    single_inputs: Examples
    """The same inputs with a batch of 1, if the graph accepts it."""
    out_spec: Any
    """The pytree structure of the outputs; None for a single tensor."""
    original: torch.nn.Module | None
    """The module that was traced; None if the file holds an exported program."""
    program: ExportedProgram | None = None
    """The exported program that the file holds."""
    shapes: Mapping[str, Shape] | None = None
    """The shape of every value for `single_inputs`; None if the graph was not run on them."""
    holds_module: bool = False
    """Whether the file holds a whole module, not only weights."""
    is_trusted: bool = False


def trace_model(model: ModelFile, origin: LoadOptions) -> TracedModel:
    """Load the network of a file, and trace it."""
    if model.family is Family.TORCH_PROGRAM:
        return _load_exported(model, origin)
    folders = importlib.import_module("prunectl.training.torch.folder")
    if not origin.model and folders.names_network(model):
        export = f", or channels from an export: prunectl export {model.folder} -o model.onnx"
        raise UsageError(
            f"channels cannot be removed from the folder {model.folder}: transformers builds all blocks alike, "
            "of the widths in its config.json",
            hint=f"remove whole blocks, with --pattern layers{export if folders.can_build(model, origin) else ''}",
        )
    built = build_module(model, origin)
    named = {name: tensor for tensor, name in built.names.items()}
    graph = _traced(built.module, examples(origin.inputs, built.module, str(model.path)), str(model.path))
    return TracedModel(
        module=graph.module,
        names=named,
        aliases=_aliases(built.module, named),
        examples=graph.examples,
        single_inputs=(
            graph.examples if graph.shapes is None else tuple(with_batch(example, 1) for example in graph.examples)
        ),
        out_spec=graph.out_spec,
        original=built.module,
        holds_module=not origin.model,
        is_trusted=origin.is_trusted,
        shapes=graph.shapes,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _TracedGraph:
    """The graph of a module, and the inputs that it was traced on."""

    module: torch.fx.GraphModule
    out_spec: Any
    examples: Examples
    shapes: Mapping[str, Shape] | None
    """The shape of every value for a batch of 1; None if the graph accepts only the traced batch size."""


def _traced(module: torch.nn.Module, examples: Examples, path: str) -> _TracedGraph:
    """Record the graph; if the recording does not compute the same for a batch of 1, trace it with torch.export."""
    module.eval()
    if any(weight.dtype in _HALF for weight in module.parameters()):
        # The equivalence check runs in float32; the written weights keep the precision that they have in the file.
        module.float()
    used = _batched(examples)
    try:
        with quiet():
            # Imported here, as a version of PyTorch may lack a private API that it needs.
            recorder = importlib.import_module("prunectl.channels.torch.recorder")
            recording = recorder.record(module, tuple(value.clone() for value in used))
    except Exception:  # noqa: BLE001 - the user's code may raise anything, and torch.export runs it again below
        recording = None
    if recording is not None:
        split_packed_qkv(recording.module.graph)
        recording.module.recompile()
        if (opened := open_batch_axis(recording.module, module, used)) is not None:
            return _TracedGraph(opened[0], recording.out_spec, used, opened[1])
    program, used = trace(module, examples, path)
    graph = _graph_module(program)
    opened = open_batch_axis(graph, module, used)
    if opened is None and (any_batch := _trace_any_batch(module, used)) is not None:
        opened = open_batch_axis(_graph_module(any_batch), module, used)
        program = program if opened is None else any_batch
    opened_graph, shapes = opened or (graph, None)
    return _TracedGraph(opened_graph, program.call_spec.out_spec, used, shapes)


def _load_exported(model: ModelFile, origin: LoadOptions) -> TracedModel:
    for option, value in (("--builder", origin.model), ("--input", origin.inputs)):
        if value:
            raise UsageError(
                f"{option} cannot be used with a .pt2 file, which holds its own graph", hint=f"leave out {option}"
            )
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
    return TracedModel(
        module=module,
        names=names,
        aliases={},
        examples=used,
        single_inputs=_single_inputs(program, module, used),
        out_spec=program.call_spec.out_spec,
        original=None,
        program=program,
    )


def _placeholders(program: ExportedProgram) -> Examples:
    """Zeros of the input shapes of a program; dynamic axes get the lengths that they were traced with."""
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
        raise InputError("this version of PyTorch returns no graph for exported programs")
    for node in list(module.graph.nodes):
        if node.op == "call_module" and not node.users:
            module.graph.erase_node(node)  # it only checks the inputs against the traced ones
    split_packed_qkv(module.graph)
    module.recompile()
    return module


def _single_inputs(program: ExportedProgram, module: torch.fx.GraphModule, used: Examples) -> Examples:
    """The inputs with a batch of 1 if the batch axis is dynamic and the program runs on them; else the given inputs."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    if not shapes or not all(shape and isinstance(shape[0], torch.SymInt) for shape in shapes):
        return used
    single = tuple(with_batch(example, 1) for example in used)
    try:
        shapes_of(WeightedProgram(module), single)
    except _MISFITS:
        return used
    return single


def _aliases(module: torch.nn.Module, named: Mapping[str, str]) -> dict[str, str]:
    """The second names of weights that several layers share, each with the first name."""
    shared: dict[int, list[str]] = defaultdict(list)
    for name, weight in module.named_parameters(remove_duplicate=False):
        if name in named:
            shared[id(weight)].append(named[name])
    return {second: first for first, *others in shared.values() for second in others}


_HALF = (torch.float16, torch.bfloat16)
_TRACED_BATCH = 2
"""Not 1: torch.export takes a length of 1 for one that never changes."""


def _batched(examples: Examples) -> Examples:
    """The inputs with a batch of 2 where it was 1; others unchanged."""
    return tuple(with_batch(value, _TRACED_BATCH) if value.ndim and len(value) == 1 else value for value in examples)


def trace(module: torch.nn.Module, examples: Examples, path: str) -> tuple[ExportedProgram, Examples]:
    """Export a module for a fixed batch size; the program, and the inputs that it was traced on.

    The batch size is fixed as torch.export takes two to three times as long with a dynamic one.
    """
    accepted = _accepted_inputs(module, examples, path)
    if isinstance(module, torch.jit.ScriptModule):
        return _convert_script(module, accepted, path), accepted
    with quiet():
        try:
            return torch.export.export(module, accepted, strict=False), accepted
        except Exception as error:
            raise InputError(
                f"torch.export cannot trace the model of {path}: {first_line(error)}",
                hint="its control flow must not depend on input values; or export it to ONNX, and prune that file",
            ) from error


def _trace_any_batch(module: torch.nn.Module, examples: Examples) -> ExportedProgram | None:
    """Export a module with a dynamic batch size; None if that fails."""
    if isinstance(module, torch.jit.ScriptModule) or not _has_batch_axis(examples):
        return None
    axes: Any = tuple({0: Dim.AUTO} if value.ndim else None for value in examples)
    takes_varargs = getattr(getattr(module.forward, "__code__", None), "co_flags", 0) & inspect.CO_VARARGS
    try:
        with quiet():
            # The shapes of a variadic parameter, `*inputs`, are given as one nested tuple.
            return torch.export.export(
                module, examples, dynamic_shapes=(axes,) if takes_varargs else axes, strict=False
            )
    except Exception:  # noqa: BLE001 - torch.export may raise anything
        return None


def _accepted_inputs(module: torch.nn.Module, examples: Examples, path: str) -> Examples:
    """The first inputs that the module accepts: those with a batch of 2, or those of `--input`."""
    failure = None
    for inputs in (_batched(examples), examples):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module(*inputs)
        except Exception as error:  # noqa: BLE001 - it is the user's code
            failure = error
        else:
            return inputs
    shapes = " and ".join("x".join(map(str, value.shape)) for value in examples)
    raise UsageError(
        f"the model of {path} cannot run on inputs of {shapes}: {first_line(failure) if failure else ''}",
        hint="give other shapes with --input, one for each input; for whole numbers write 1,128:i64",
    ) from failure


def _convert_script(module: torch.jit.ScriptModule, examples: Examples, path: str) -> ExportedProgram:
    with quiet():
        try:
            return convert_script(module, examples)
        except Exception as error:
            raise InputError(
                f"PyTorch cannot convert the TorchScript of {path} to a graph: {first_line(error)}",
                hint="use a state dict, and name the function that builds the model: --builder package.module:function",
            ) from error


_LENGTH, _EXAMPLE = 224, "1,3,224,224 or 1,128:i64"


def examples(specs: tuple[str, ...], module: torch.nn.Module, path: str) -> tuple[torch.Tensor, ...]:
    """A tensor of zeros for each shape, such as `1,3,224,224` or `1,128:i64`."""
    if not specs:
        raise UsageError(
            f"{path} does not give the shapes of its inputs, which are needed to trace it",
            hint=f"add a shape with a batch of 1: --input {_suggestion(module)}",
        )
    ports = input_specs(module) if len(specs) == 1 else ()
    default = torch.int64 if ports and ports[0].dtype == "int64" else _default_float(module)
    return tuple(_example(spec, default) for spec in specs)


def random_like(example: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random numbers in the shape of an example: normal floats, or integers 0 and 1, valid in any embedding table."""
    if example.is_floating_point():
        return torch.randn(example.shape, generator=random, dtype=torch.float32).to(example.dtype)
    return torch.randint(0, 2, example.shape, generator=random).to(example.dtype)


def with_batch(example: torch.Tensor, size: int) -> torch.Tensor:
    """Zeros in the shape of an example, with another batch size."""
    return torch.zeros((size, *example.shape[1:]), dtype=example.dtype) if example.ndim else example


_CLOSE = 1e-4
_SIZES = ("size", "shape")


def open_batch_axis(
    module: torch.fx.GraphModule, original: torch.nn.Module, examples: Examples
) -> tuple[torch.fx.GraphModule, Mapping[str, Shape]] | None:
    """A program that computes for a batch of 1 what the module computes, and the shapes of its values.

    None if the program works only for the traced batch size. Tracing turns `len(x)` into a constant, so that any size
    equal to the traced batch size may be the batch size: a second program takes them for it, and is checked by a run.
    """
    if not _has_batch_axis(examples):
        return None
    generator = torch.Generator().manual_seed(0)
    single = [random_like(with_batch(value, 1), generator) for value in examples]
    try:
        with quiet():
            expected = tensor_leaves(original(*(value.clone() for value in single)))
    except Exception:  # noqa: BLE001 - it is the user's code
        return None
    if (shapes := _shapes_if_equal(module, single, expected)) is not None:
        return module, shapes
    measured = _measure_batch(module, len(examples[0]))
    shapes = _shapes_if_equal(measured, single, expected)
    return None if shapes is None else (measured, shapes)


def _has_batch_axis(examples: Examples) -> bool:
    """Whether the first axis of all inputs has the same length, and not 1: it may be a batch axis."""
    return (
        bool(examples)
        and all(value.ndim for value in examples)
        and {len(value) for value in examples} == {len(examples[0])} != {1}
    )


def _shapes_if_equal(
    module: torch.fx.GraphModule, inputs: Iterable[torch.Tensor], expected: list[torch.Tensor]
) -> Mapping[str, Shape] | None:
    """The shape of every value if the outputs are equal to the expected ones; else None."""
    try:
        outputs, shapes = run_with_shapes(WeightedProgram(module), (value.clone() for value in inputs))
    except _MISFITS:
        return None
    is_equal = len(outputs) == len(expected) and all(
        relative_difference(to_numpy(value), to_numpy(reference)) <= _CLOSE
        for value, reference in zip(outputs, expected, strict=True)
    )
    return shapes if is_equal else None


def _measure_batch(module: torch.fx.GraphModule, size: int) -> torch.fx.GraphModule:
    """A program in which shapes that begin with the traced batch size get the size of the actual batch instead."""
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


def _example(spec: str, default: torch.dtype) -> torch.Tensor:
    option = parse_input(spec, _EXAMPLE)
    if option.name or option.lengths != option.shape:
        raise no_shape(spec, _EXAMPLE)
    return torch.zeros(option.lengths, dtype=getattr(torch, option.dtype) if option.dtype else default)


def _default_float(module: torch.nn.Module) -> torch.dtype:
    first = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    return torch.float64 if first is not None and first.dtype is torch.float64 else torch.float32


def _suggestion(module: torch.nn.Module) -> str:
    ports = input_specs(module)
    shape = ports[0].shape if len(ports) == 1 else None
    if shape is None and ports[0].dtype == "int64":
        return "1,128:i64"
    if shape is None:
        first = next((layer for layer in module.modules() if [*layer.parameters(recurse=False)]), None)
        if isinstance(first, torch.nn.Linear) and len(ports) == 1:
            return f"1,{first.in_features}"
        return f"1,3,{_LENGTH},{_LENGTH}"
    return ",".join(map(str, (1, *(length or _LENGTH for length in shape))))
