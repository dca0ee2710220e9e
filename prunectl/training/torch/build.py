"""Build the PyTorch module of a file."""

from __future__ import annotations

import glob
import importlib
import inspect
import io
import shlex
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunectl.analysis.copies import averaged_copies
from prunectl.errors import InputError, UsageError, abbreviated, first_line
from prunectl.formats.base import Family, ModelFile, Role, Tensor
from prunectl.formats.torch.trust import check_program
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions, TensorSpec, TextInput
from prunectl.training.data.next_token import LABELS
from prunectl.training.host import before_seeding
from prunectl.training.task import format_shape, shape_matches
from prunectl.training.torch._compat import tree_flatten, tree_map
from prunectl.training.torch.tensors import InnerModule, final_activation, to_torch
from prunectl.training.user_code import call_builder, resolve_builder


def load_program(model: ModelFile, origin: LoadOptions) -> torch.export.ExportedProgram:
    """Load the exported program in a file; without trust, from a rewritten archive of only allow-listed entries."""
    safe = None if origin.is_trusted else check_program(model.path)
    try:
        if safe is None:
            program = torch.export.load(str(model.path))
        else:
            with tempfile.TemporaryFile(prefix="prunectl-") as file:
                safe.write(file, _example_inputs(safe.inputs))
                file.seek(0)
                program = torch.export.load(file)
        if not _accepts_its_examples(program):
            program.example_inputs = None
    except Exception as error:
        raise InputError(f"PyTorch cannot load {model.path}: {first_line(error)}") from error
    return program


def _accepts_its_examples(program: torch.export.ExportedProgram) -> bool:
    """Whether the example inputs in the file fit the program: PyTorch checks them, and fails if they do not."""
    values, spec = tree_flatten(program.example_inputs)
    return spec == program.call_spec.in_spec and all(
        not isinstance(value, torch.Tensor) or shape_matches(value.shape, shape)
        for value, shape in zip(values, input_shapes(program), strict=True)
    )


def _example_inputs(payload: bytes) -> bytes:
    """Example inputs, saved again so that torch.export.load need not fall back to unpickling arbitrary code."""
    try:
        inputs = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True) if payload else None
    except Exception:  # noqa: BLE001 - PyTorch may raise anything; the program has the input shapes too
        return b""
    if not isinstance(inputs, tuple):
        return b""
    buffer = io.BytesIO()
    torch.save(inputs, buffer)
    return buffer.getvalue()


class FixedBatchModule(InnerModule):
    """Runs batches of any size through a module that takes a fixed number of examples."""

    def __init__(self, inner: torch.nn.Module, size: int) -> None:
        super().__init__(inner)
        self.size = size
        self.kept = size
        """How many examples of the current piece are real, not padding."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The outputs of all pieces; the last piece is padded with its first example, and its output is cut."""
        count = len(inputs[0])
        outputs = []
        for begin in range(0, count, self.size):
            piece = [tensor[begin : begin + self.size] for tensor in inputs]
            missing = self.size - len(piece[0])
            if missing:
                piece = [torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) for tensor in piece]
            self.kept = self.size - missing
            out = self.inner(*piece)
            outputs.append(tree_map(lambda tensor, end=self.size - missing: tensor[:end], out))
        return outputs[0] if len(outputs) == 1 else _joined(outputs)


def _joined(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs)
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def input_shapes(program: Any) -> tuple[tuple[int | None, ...], ...]:
    """The input shapes of a program, batch axis first; None for an axis of variable length."""
    shapes = (getattr(example, "shape", ()) for example in _example_values(program))
    return tuple(tuple(axis if isinstance(axis, int) else None for axis in shape) for shape in shapes)


def _input_types(program: Any) -> tuple[str, ...]:
    """The data types of a program's inputs; empty for an input that is not a tensor."""
    examples = _example_values(program)
    return tuple(
        str(example.dtype).removeprefix("torch.") if isinstance(example, torch.Tensor) else "" for example in examples
    )


def _example_values(program: Any) -> list[Any]:
    """The fake tensors (or other values) that a program was exported with as its inputs."""
    names = set(program.graph_signature.user_inputs)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [node.meta.get("val") for node in placeholders]


_NO_PARAMETER = frozenset({Role.OPTIMIZER, Role.MASK, Role.SCHEDULE})


def match_parameters(model: ModelFile, module: torch.nn.Module, source: str, part: str = "") -> dict[str, str]:
    """From tensors of the file to names in the module; each parameter must have a tensor, or be tied to one that has.

    The file may hold only the submodule `part`, and then without its prefix.
    """
    state, tied = module.state_dict(), dict(module.named_parameters(remove_duplicate=False))
    tensors = {tensor.name: tensor for tensor in model.tensors if tensor.role not in _NO_PARAMETER}
    is_part = bool(part) and not any(name.startswith(f"{part}.") for name in tensors)
    inner = {name.removeprefix(f"{part}.") if is_part else name: name for name in state}
    state = {name: state[full_name] for name, full_name in inner.items()}
    prefix = _prefix(tensors, state)
    names = {prefix + name: inner[name] for name in state if prefix + name in tensors}
    matched = {id(tied[name]) for name in names.values() if name in tied}
    for name, value in state.items():
        tensor = tensors.get(prefix + name)
        if tensor is None and inner[name] in tied and id(tied[inner[name]]) not in matched:
            raise UsageError(
                f"{model.path} has no tensor {prefix + name}, which the model of {source} needs",
                hint=f"list its tensors: prunectl inspect {model.path}",
            )
        if tensor is not None and tensor.shape != tuple(value.shape):
            raise UsageError(
                f"{tensor.name} is {format_shape(tensor.shape, 'a scalar')} in {model.path}, "
                f"and {format_shape(value.shape, 'a scalar')} in the "
                f"model of {source}",
                hint="check that --builder builds the network with the same layer sizes",
            )
    return names


def _prefix(tensors: Mapping[str, Tensor], state: Mapping[str, torch.Tensor]) -> str:
    """The prefix of most names in the file, such as `model.`; of equally common ones the first."""
    votes: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        votes.update(
            ".".join(parts[:cut]) + "." * bool(cut) for cut in range(len(parts)) if ".".join(parts[cut:]) in state
        )
    return max(votes, key=lambda prefix: votes[prefix]) if votes else ""


@dataclass(frozen=True, slots=True)
class BuiltModule:
    """A module with its weights loaded."""

    module: torch.nn.Module
    names: Mapping[str, str]
    """From tensors of the file to parameters and buffers of the module."""
    has_modes: bool = True
    """Whether training and evaluation mode differ; they do not in an exported program."""
    notes: tuple[str, ...] = ()
    inputs: tuple[TensorSpec, ...] = ()
    """The inputs that the file declares; empty if it declares none."""
    text: TextInput | None = None
    """How text is tokenised for the model; None if it takes no text."""
    command: str = ""
    """The command that keeps only this copy of the weights, for a file that holds two."""
    copies: tuple[str, ...] = ()
    """The prefixes of other copies of the same weights in the file, such as averages."""

    def inside(self, name: str) -> str:
        """The name of a tensor in the module; refuse one that is not part of it, such as an average."""
        if name not in self.names:
            raise UsageError(
                f"{abbreviated(name)} is not part of the network that the data goes through",
                hint=f"leave it out: --exclude {shlex.quote(self._selector(name))}"
                + (f"\nor keep one copy of the weights: {self.command}" if self.command else ""),
            )
        return self.names[name]

    def contains(self, name: str) -> bool:
        """Whether a tensor is part of the module and not of another network; refuse another copy of the weights."""
        if name not in self.names and name.startswith(self.copies):
            self.inside(name)
        return name in self.names

    def _selector(self, name: str) -> str:
        """A glob for a tensor outside the module: for the outermost group of names without one from inside."""
        for dot in (index for index, character in enumerate(name) if character == "."):
            prefix = name[: dot + 1]
            if not any(inner.startswith(prefix) for inner in self.names):
                return f"{glob.escape(prefix)}*"
        return glob.escape(name)


def build_module(model: ModelFile, origin: LoadOptions) -> BuiltModule:
    """Build the module in a file, or that of a builder function with the file's weights."""
    user_code.check(model, origin)
    before_seeding("torch")
    torch.manual_seed(origin.seed)
    if origin.model:
        return _from_builder(model, origin)
    if model.family is Family.TORCH_PROGRAM:
        return _from_program(model, origin)
    if user_code.is_script(model):
        try:
            with warnings.catch_warnings():
                # A deprecation of TorchScript does not help users who only have the file.
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(str(model.path), map_location="cpu")  # type: ignore[no-untyped-call]
        except Exception as error:
            raise InputError(f"PyTorch cannot load {model.path}: {first_line(error)}") from error
        return _from_module(model, module)
    if model.about.code:
        return _unpickle(model)
    folder = importlib.import_module("prunectl.training.torch.folder")
    if folder.names_network(model):
        network = folder.open_network(model, origin)
        network.fill()
        text = network.text if network.text.vocabulary else None
        if text is not None and LABELS in origin.arrays:
            text = replace(text, shifts_labels=network.shifts_labels())
        return BuiltModule(network.module, network.names, inputs=network.inputs, text=text)
    raise user_code.no_network(model)


def _from_builder(model: ModelFile, origin: LoadOptions) -> BuiltModule:
    make = resolve_builder(origin.model)
    module = make if isinstance(make, torch.nn.Module) else call_builder(make, origin.model)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"--builder {origin.model} returned a value of type {type(module).__name__}, not a torch.nn.Module"
        )
    names = match_parameters(model, module, origin.model)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    module.load_state_dict({inner: to_torch(model.read(tensors[name])) for name, inner in names.items()}, strict=False)
    notes, command, copies = _used_copy(model, names)
    return BuiltModule(module, names, notes=notes, command=command, copies=copies)


def _used_copy(model: ModelFile, names: Iterable[str]) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """A note if the file holds the weights as trained and averaged, how to keep the used copy, and the other copies."""
    notes: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    command = ""
    for trained, average, _ in averaged_copies(model.tensors):
        is_average = any(name.startswith(f"{average}.") for name in names)
        used, other = (average, trained) if is_average else (trained, average)
        if used and not any(name.startswith(f"{used}.") for name in names):
            continue  # The average of another network.
        copies += (f"{other}." if other else "",)
        if notes:
            continue
        used, other = (abbreviated(prefix) or "the top level" for prefix in (used, other))
        rest, command = (
            _strip_command(model.path, keep) for keep in (("raw", "ema") if is_average else ("ema", "raw"))
        )
        note = (
            f"{model.path} holds the weights twice, as trained and averaged: those in {used} are used, not those in "
            f"{other}. For the others: {rest}"
        )
        notes = (note,)
    return notes, command, copies


def _strip_command(path: Path, keep: str) -> str:
    output = f"{keep}{path.suffix}" if path.stem != keep else f"{keep}-only{path.suffix}"
    return shlex.join(["prunectl", "strip", str(path), "--keep", keep, "-o", output])


def _from_program(model: ModelFile, origin: LoadOptions) -> BuiltModule:
    program = load_program(model, origin)
    module: torch.nn.Module = program.module()
    shapes = input_shapes(program)
    size = shapes[0][0] if shapes and shapes[0] else None
    notes: tuple[str, ...] = (
        "An exported program is trained in the mode of its export: dropout and batch normalisation are fixed.",
    )
    if size is not None:
        module = FixedBatchModule(module, size)
        notes += (f"The program was exported for {size} examples at a time: batches are split accordingly.",)
    built = _from_module(model, module)
    declared = enumerate(zip(shapes, _input_types(program), strict=True))
    inputs = tuple(TensorSpec(f"input{index}", shape[1:], dtype) for index, (shape, dtype) in declared)
    return replace(built, has_modes=False, notes=notes, inputs=inputs)


def _unpickle(model: ModelFile) -> BuiltModule:
    user_code.search_current_folder()
    try:
        module = torch.load(str(model.path), map_location="cpu", weights_only=False)
    except (AttributeError, ModuleNotFoundError) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        hint = (
            f"import it first: {user_code.import_option(model, missing)}"
            if missing
            else "name the function that builds the model: --builder module:function"
        )
        raise InputError(f"{model.path} needs code that cannot be found: {first_line(error)}", hint=hint) from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"{model.path} holds a {type(module).__name__}, not a model",
            hint="name the function that builds the model: --builder module:function",
        )
    return _from_module(model, module)


def _from_module(model: ModelFile, module: torch.nn.Module) -> BuiltModule:
    if not any(True for _ in module.parameters()):
        raise InputError(f"{model.path} cannot be trained: its weights are constants of the graph")
    return BuiltModule(module, match_parameters(model, module, str(model.path)))


_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def declared_inputs(built: BuiltModule) -> tuple[TensorSpec, ...]:
    """The inputs of a built module: those that the file declares, or else those inferred from the module."""
    return built.inputs or input_specs(built.module)


def input_specs(module: torch.nn.Module) -> tuple[TensorSpec, ...]:
    """The inputs of a module: names from the signature of `forward`, shape and data type from the first layer."""
    names = _argument_names(module)
    if len(names) > 1:
        return tuple(TensorSpec(name, None, "") for name in names)
    shape, dtype = _first_layer(module)
    return (TensorSpec(names[0] if names else "x", shape, dtype),)


def output_specs(outputs: tuple[torch.Tensor, ...]) -> tuple[TensorSpec, ...]:
    """The names, shapes, data types and final activations of outputs for an example."""
    return tuple(
        TensorSpec(
            f"output{index}" if len(outputs) > 1 else "output",
            tuple(output.shape[1:]),
            str(output.dtype).rpartition(".")[2],
            final_activation(output),
        )
        for index, output in enumerate(outputs)
    )


def _argument_names(module: torch.nn.Module) -> list[str]:
    if isinstance(module, torch.jit.ScriptModule):
        method: Any = module.forward
        return [arg.name for arg in method.schema.arguments[1:] if not arg.has_default_value()]
    inner = getattr(module, "inner", module)
    parameters = inspect.signature(inner.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        parameter.name for parameter in parameters if parameter.default is parameter.empty and parameter.kind in plain
    ]


def _first_layer(module: torch.nn.Module) -> tuple[tuple[int | None, ...] | None, str]:
    """The input shape and data type of the first layer with weights."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Embedding) or getattr(layer, "original_name", "") == "Embedding":
            return None, "int64"
        if isinstance(layer, _CONVOLUTIONS):
            return (layer.in_channels, *([None] * len(layer.kernel_size))), _dtype(layer.weight)
        own = next(iter(layer.parameters(recurse=False)), None)
        if own is not None and not isinstance(layer, torch.jit.ScriptModule):
            return None, _dtype(own)
    # TorchScript does not keep the classes of layers: a convolution is recognised by the rank of its kernel.
    first = next((weight for weight in module.parameters() if weight.ndim > 1), next(module.parameters()))
    is_convolution = first.ndim in {3, 4, 5}
    return (first.shape[1], *([None] * (first.ndim - 2))) if is_convolution else None, _dtype(first)


def _dtype(tensor: torch.Tensor) -> str:
    # Data is read in single precision; autocast or the module converts it to half precision.
    return "float64" if tensor.dtype is torch.float64 else "float32"
