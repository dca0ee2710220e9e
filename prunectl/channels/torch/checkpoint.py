"""What lies in a checkpoint beside the weights, and what of it is cut as they are."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunectl.channels.adapter import delete_indices
from prunectl.channels.labels import LabelArray
from prunectl.channels.torch.code import module
from prunectl.channels.torch.code.expressions import literal
from prunectl.channels.torch.code.module import MARK
from prunectl.channels.torch.export import TracedModel
from prunectl.channels.torch.fx import WeightedProgram
from prunectl.channels.torch.resize import delete_tensor_indices
from prunectl.errors import InputError, UntrustedError, UsageError, first_line
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safetensors import CODES, encode_header, read
from prunectl.pruning.destination import code_beside
from prunectl.training import user_code
from prunectl.training.torch.tensors import to_numpy, to_torch

Axes = Mapping[str, Mapping[int, LabelArray]]
"""The indices that go from each axis, by tensor of the file."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class KeptSlots:
    """What optimizers in a checkpoint keep of weights."""

    owners: Mapping[str, str] = field(default_factory=dict)
    """The weight of each tensor of their states, both by their names in the file."""
    unmatched: tuple[str, ...] = ()
    """Optimizers of which nobody can tell which weights their states belong to, by their place."""


def optimizer_slots(root: Any, order: Mapping[str, str], shapes: Shapes) -> KeptSlots:
    """Return what optimizers keep of each weight, by its name in the file; they know weights by numbers.

    The order is that of the parameters of the module, with their names in the file.
    """
    found: dict[str, str] = {}
    unmatched: list[str] = []
    for name, optimizer in _optimizers(root, ""):
        groups = optimizer["param_groups"]
        numbers = [number for group in groups for number in group.get("params", ())]
        said = [word for group in groups for word in group.get("param_names", ())]
        words = said if len(said) == len(numbers) and set(said) <= order.keys() else list(order)
        owners = {number: order[word] for number, word in zip(numbers, words, strict=False)}
        own = {
            _below(_below(_below(name, "state"), number), key): (owners.get(number, ""), tuple(value.shape))
            for number, state in optimizer["state"].items()
            for key, value in (state.items() if isinstance(state, dict) else ())
            # A count of steps is a tensor as well.
            if isinstance(value, torch.Tensor) and value.numel() > 1
        }
        if all(shape == shapes.get(owner) for owner, shape in own.values()):
            found |= {slot: owner for slot, (owner, _) in own.items()}
        else:
            unmatched.append(name)
    return KeptSlots(found, tuple(unmatched))


def leave_out(root: Any, optimizers: Collection[str]) -> None:
    """Empty the states of optimizers, as they are before the first step."""
    for name, optimizer in _optimizers(root, ""):
        if name in optimizers:
            optimizer["state"].clear()


@dataclass(frozen=True, slots=True)
class WeightChanges:
    """What becomes of the tensors of a file."""

    axes: Axes
    numbers: Mapping[str, Array]
    """What takes the place of some before they are cut."""
    left_out: tuple[str, ...] = ()
    """Optimizers whose states are not written, by their place."""


def prune_checkpoint(value: Any, change: WeightChanges, path: str, name: str = "") -> Any:
    """Return a value with the tensors in it cut; dictionaries and lists stay the same ones."""
    if isinstance(value, torch.nn.Module):
        raise InputError(
            f"{path} holds a whole module, {name}, beside other things",
            hint="save its state_dict() in its place, and say --model",
        )
    if isinstance(value, torch.Tensor):
        if name not in change.axes and name not in change.numbers:
            return value
        whole = to_torch(change.numbers[name]).to(value.dtype) if name in change.numbers else value
        made = delete_tensor_indices(whole, change.axes.get(name, {}))
        is_parameter = isinstance(value, torch.nn.Parameter)
        return torch.nn.Parameter(made, requires_grad=value.requires_grad) if is_parameter else made
    if isinstance(value, dict):
        for key, inner in list(value.items()):
            value[key] = prune_checkpoint(inner, change, path, _below(name, key))
    elif isinstance(value, list):
        value[:] = [prune_checkpoint(inner, change, path, _below(name, at)) for at, inner in enumerate(value)]
    return value


def owning_dict(root: Any, name: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary that a tensor lies in, and its key there."""
    while name not in root:
        key = next(key for key in root if name.startswith(f"{key}."))
        root, name = root[key], name[len(str(key)) + 1 :]
    return root, name


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _optimizers(value: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the states of optimizers in a checkpoint, and where they are."""
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _optimizers(inner, _below(name, key))


def write(model: ModelFile, change: WeightChanges, extras: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a copy without what goes, and with what is new."""
    header = read(model.path)
    held = {tensor.name: tensor for tensor in model.tensors}
    parts: list[bytes] = []
    end = 0
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    for name in (*names, *extras):
        if name in extras:
            array = to_numpy(extras[name])
        else:
            whole = model.read(held[name])
            array = delete_indices(change.numbers.get(name, whole).astype(whole.dtype), change.axes.get(name, {}))
        data = np.ascontiguousarray(array).tobytes()
        kind = CODES[array.dtype] if name in extras else header[name]["dtype"]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)
    path.write_bytes(b"".join([encode_header(header), *parts]))


def companion_files(target: Path) -> Path:
    """Return where the class goes whose weights go to a target; never where somebody's own code is."""
    code = code_beside(target)
    if code.is_file() and MARK not in code.read_text(encoding="utf-8", errors="replace").partition("\n")[0]:
        raise UsageError(
            f"{code} exists, and the class for the weights would take its place", hint="choose another --output"
        )
    return code


def write_weights(
    model: ModelFile, found: TracedModel, network: WeightedProgram, change: WeightChanges, folder: Path, *, target: Path
) -> Path:
    """Write weights and class into a scratch folder, and return the path of the weights."""
    code, path = companion_files(target), folder / target.name
    if found.holds_module:
        written = module.write(found, network, class_of(found), _loading(target.name))
        torch.save({name: value.contiguous() for name, value in written.state.items()}, path)
    elif model.format == "safetensors":
        first, of = next(iter(found.names.items()))
        prefix = of.removesuffix(first)
        written = module.write(found, network, class_of(found), _loading(target.name, "", prefix))
        extras = {prefix + name: value for name, value in written.extras.items()}
        write(model, change, extras, path)
    else:
        root = load(model, found)
        leave_out(root, change.left_out)
        root = prune_checkpoint(root, change, str(model.path))
        first, of = next(iter(found.names.items()))
        home, key = owning_dict(root, of)
        prefix = key.removesuffix(first)
        keys = "".join(f"[{literal(word)}]" for word in of.removesuffix(key).split(".") if word)
        written = module.write(found, network, class_of(found), _loading(target.name, keys, prefix))
        home.update({prefix + name: value for name, value in written.extras.items()})
        torch.save(root, path)
    (folder / code.name).write_text(written.text, encoding="utf-8")
    return path


def class_of(found: TracedModel) -> str:
    """Return the name of the class that is written: that of the module, unless torch has one of this name."""
    kind = type(found.original)
    name = str(getattr(found.original, "original_name", kind.__name__))
    is_own = not kind.__module__.startswith("torch.") or isinstance(found.original, torch.jit.ScriptModule)
    return name if is_own and name.isidentifier() and not hasattr(torch.nn, name) and name != "F" else "Net"


def load(model: ModelFile, found: TracedModel) -> Any:
    """Return what is in a checkpoint."""
    if not found.is_trusted:
        user_code.check_checkpoint(model)
    try:
        return torch.load(model.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found.is_trusted:
            return torch.load(model.path, map_location="cpu", weights_only=False)
        found_code = f": {model.about.code[0]}" if model.about.code else ""
        raise UntrustedError(
            f"{model.path} holds more than numbers and words{found_code}",
            hint=f"if you trust it: --trust; or leave it out first: prunectl strip {model.path} -o weights.pt",
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{model.path} cannot be loaded by this PyTorch: {first_line(error)}") from error


def parameters(found: TracedModel) -> Mapping[str, str]:
    """Return the tensors of the file by the names of the parameters, in the order that an optimizer gets them in."""
    names = [] if found.original is None else [name for name, _ in found.original.named_parameters()]
    return {name: found.names[name] for name in names if name in found.names}


def _loading(name: str, keys: str = "", prefix: str = "") -> tuple[str, ...]:
    """Return how the weights of a file get into the class: by other names than the file's where these are longer."""
    # Names are quoted as literals: a file may call its tensors whatever it likes.
    state = f"torch.load({literal(name)}, weights_only=True){keys}"
    if name.endswith(".safetensors"):
        state = f"safetensors.torch.load_file({literal(name)})"
    if not prefix:
        return (f"model.load_state_dict({state})",)
    renamed = f"{{name.removeprefix({literal(prefix)}): value for name, value in state.items()}}"
    return (f"state = {state}", f"model.load_state_dict({renamed})")
