"""Pruned PyTorch checkpoints: weights and their optimizer slots are sliced alike, everything else is kept."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunectl.channels.adapter import Axes, delete_indices
from prunectl.channels.graph import Shapes
from prunectl.channels.torch.code import module
from prunectl.channels.torch.code.expressions import literal
from prunectl.channels.torch.code.module import HEADER
from prunectl.channels.torch.export import TracedModel
from prunectl.channels.torch.fx import WeightedProgram
from prunectl.errors import InputError, UntrustedError, UsageError, first_line
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.formats.safetensors import array_entry, read, write_entries
from prunectl.pruning.destination import code_beside
from prunectl.training import user_code
from prunectl.training.torch.tensors import to_numpy, to_torch, view_as_torch


@dataclass(frozen=True, slots=True)
class OptimizerSlots:
    """The optimizer slots in a checkpoint, matched to weights."""

    owners: Mapping[str, str] = field(default_factory=dict)
    """The weight that each slot belongs to; both are names of tensors in the file."""
    unmatched: tuple[str, ...] = ()
    """The optimizers whose states cannot be matched to weights, by their path in the checkpoint."""


def optimizer_slots(root: Any, order: Mapping[str, str], shapes: Shapes) -> OptimizerSlots:
    """Match the slots of optimizers, which number the parameters, to the tensors of the file.

    `order` is the result of `parameter_order`.
    """
    owners: dict[str, str] = {}
    unmatched: list[str] = []
    for name, optimizer in _optimizers(root, ""):
        groups = optimizer["param_groups"]
        param_ids = [number for group in groups for number in group.get("params", ())]
        param_names = [param_name for group in groups for param_name in group.get("param_names", ())]
        names = param_names if len(param_names) == len(param_ids) and set(param_names) <= order.keys() else list(order)
        by_number = {number: order[param_name] for number, param_name in zip(param_ids, names, strict=False)}
        slots = {
            _joined(_joined(_joined(name, "state"), number), key): (by_number.get(number, ""), tuple(value.shape))
            for number, state in optimizer["state"].items()
            for key, value in (state.items() if isinstance(state, dict) else ())
            # The step count may be a tensor too, with one element.
            if isinstance(value, torch.Tensor) and value.numel() > 1
        }
        if all(shape == shapes.get(owner) for owner, shape in slots.values()):
            owners |= {slot: owner for slot, (owner, _) in slots.items()}
        else:
            unmatched.append(name)
    return OptimizerSlots(owners, tuple(unmatched))


def clear_optimizers(root: Any, optimizers: Collection[str]) -> None:
    """Empty the states of the given optimizers, as they are before the first step."""
    for name, optimizer in _optimizers(root, ""):
        if name in optimizers:
            optimizer["state"].clear()


@dataclass(frozen=True, slots=True)
class WeightChanges:
    """The changes to the tensors of a file."""

    axes: Mapping[str, Axes]
    """The removed indices, by tensor of the file."""
    new_values: Mapping[str, Array]
    """The new values that some tensors get before they are cut."""
    cleared_optimizers: tuple[str, ...] = ()
    """The optimizers whose states are not written, by their path in the checkpoint."""


@dataclass(frozen=True, slots=True, eq=False)
class PrunedProgram(WeightedProgram):
    """A pruned program, and the changes to the file that it was read from."""

    changes: WeightChanges = field(default_factory=lambda: WeightChanges({}, {}))


def prune_checkpoint(value: Any, changes: WeightChanges, path: str, name: str = "") -> Any:
    """A value of a checkpoint with its tensors cut; dictionaries and lists are changed in place."""
    if isinstance(value, torch.nn.Module):
        raise InputError(
            f"{path} holds a whole module, {name}, beside other values",
            hint="save its state_dict() instead, and add --builder",
        )
    if isinstance(value, torch.Tensor):
        if name not in changes.axes and name not in changes.new_values:
            return value
        replaced = to_torch(changes.new_values[name]).to(value.dtype) if name in changes.new_values else value
        pruned = delete_tensor_indices(replaced, changes.axes.get(name, {}))
        is_parameter = isinstance(value, torch.nn.Parameter)
        return torch.nn.Parameter(pruned, requires_grad=value.requires_grad) if is_parameter else pruned
    if isinstance(value, dict):
        for key, inner in list(value.items()):
            value[key] = prune_checkpoint(inner, changes, path, _joined(name, key))
    elif isinstance(value, list):
        value[:] = [prune_checkpoint(inner, changes, path, _joined(name, number)) for number, inner in enumerate(value)]
    return value


def delete_tensor_indices(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    """A tensor without the given indices, detached from autograd."""
    for axis, indices in axes.items():
        kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
        kept[torch.from_numpy(indices)] = False
        tensor = tensor.index_select(axis, kept.nonzero()[:, 0].to(tensor.device))
    return tensor.detach()


def owning_dict(root: Any, name: str) -> tuple[dict[str, Any], str]:
    """The inner dictionary of a checkpoint that holds a tensor, and the key of the tensor there."""
    while name not in root:
        key = next(key for key in root if name.startswith(f"{key}."))
        root, name = root[key], name[len(str(key)) + 1 :]
    return root, name


def _joined(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _optimizers(value: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and the state dict of each optimizer in a checkpoint."""
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _optimizers(inner, _joined(name, key))


def write_safetensors(model: ModelFile, changes: WeightChanges, extras: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with sliced weights, and with the extras of the class."""
    header = read(model.path)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    arrays: dict[str, Array] = {}
    for name in sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"]):
        original = model.read(tensors[name])
        array = changes.new_values.get(name, original).astype(original.dtype)
        arrays[name] = delete_indices(array, changes.axes.get(name, {}))
    arrays |= {name: to_numpy(extra) for name, extra in extras.items()}
    write_entries(path, header, [array_entry(name, array) for name, array in arrays.items()])


def companion_file(target: Path) -> Path:
    """The file of the generated class for the weights in `target`; UsageError if it holds code of the user."""
    code = code_beside(target)
    if code.is_file() and HEADER not in code.read_text(encoding="utf-8", errors="replace").partition("\n")[0]:
        raise UsageError(
            f"{code} exists, and the class for the weights would overwrite it", hint="choose another --output"
        )
    return code


def write_weights(
    model: ModelFile,
    traced: TracedModel,
    program: WeightedProgram,
    changes: WeightChanges,
    folder: Path,
    *,
    target: Path,
) -> Path:
    """Write weights and class into a scratch folder, and return the path of the weights."""
    code, path = companion_file(target), folder / target.name
    if traced.holds_module:
        written = module.generate_module(traced, program, class_of(traced), _loading(target.name))
        # The module was traced in float32, even if its weights have half precision in the file.
        dtypes = {tensor.name: view_as_torch(np.empty(0, tensor.dtype)).dtype for tensor in model.tensors}
        types_of = {name: dtypes[tensor] for name, tensor in traced.names.items()}
        state = {name: value.to(types_of.get(name, value.dtype)) for name, value in written.state.items()}
        torch.save({name: value.contiguous() for name, value in state.items()}, path)
    elif model.family is Family.SAFETENSORS:
        attribute, tensor = next(iter(traced.names.items()))
        prefix = tensor.removesuffix(attribute)
        written = module.generate_module(traced, program, class_of(traced), _loading(target.name, "", prefix))
        extras = {prefix + name: value for name, value in written.extras.items()}
        write_safetensors(model, changes, extras, path)
    else:
        root = load_checkpoint(model, traced)
        clear_optimizers(root, changes.cleared_optimizers)
        root = prune_checkpoint(root, changes, str(model.path))
        attribute, tensor = next(iter(traced.names.items()))
        owner, key = owning_dict(root, tensor)
        prefix = key.removesuffix(attribute)
        keys = "".join(f"[{literal(part)}]" for part in tensor.removesuffix(key).split(".") if part)
        written = module.generate_module(traced, program, class_of(traced), _loading(target.name, keys, prefix))
        owner.update({prefix + name: value for name, value in written.extras.items()})
        torch.save(root, path)
    (folder / code.name).write_text(written.text, encoding="utf-8")
    return path


def class_of(traced: TracedModel) -> str:
    """The class name of the module, or Net if torch has a class of that name or it is not an identifier."""
    module_class = type(traced.original)
    name = str(getattr(traced.original, "original_name", module_class.__name__))
    is_own = not module_class.__module__.startswith("torch.") or isinstance(traced.original, torch.jit.ScriptModule)
    return name if is_own and name.isidentifier() and not hasattr(torch.nn, name) and name != "F" else "Net"


def load_checkpoint(model: ModelFile, traced: TracedModel) -> Any:
    """Load a checkpoint, restricted to weights unless it is trusted."""
    if not traced.is_trusted:
        user_code.check_checkpoint(model)
    try:
        return torch.load(model.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if traced.is_trusted:
            user_code.search_current_folder()
            return torch.load(model.path, map_location="cpu", weights_only=False)
        code = f": {model.about.code[0]}" if model.about.code else ""
        raise UntrustedError(
            f"{model.path} holds more than tensors and plain values{code}",
            hint="if you trust it: --trust; "
            f"or take its weights alone: prunectl export {model.path} -o weights.safetensors",
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"PyTorch cannot load {model.path}: {first_line(error)}") from error


def parameter_order(traced: TracedModel) -> Mapping[str, str]:
    """The tensors of the file by parameter name, in the order in which an optimizer numbers the parameters."""
    names = [] if traced.original is None else [name for name, _ in traced.original.named_parameters()]
    return {name: traced.names[name] for name in names if name in traced.names}


def _loading(name: str, keys: str = "", prefix: str = "") -> tuple[str, ...]:
    """The statements that load the file into the class, without the prefix that its names may have."""
    # Names are quoted as literals, as those in a file may contain any character.
    state = f"torch.load({literal(name)}, weights_only=True){keys}"
    if name.endswith(".safetensors"):
        state = f"safetensors.torch.load_file({literal(name)})"
    if not prefix:
        return (f"model.load_state_dict({state})",)
    renamed = f"{{name.removeprefix({literal(prefix)}): value for name, value in state.items()}}"
    return (f"state = {state}", f"model.load_state_dict({renamed})")
