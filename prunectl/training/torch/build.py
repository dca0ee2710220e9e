"""From a file of PyTorch to a module, and the names that its tensors have in the file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from prunectl.errors import InputError, UsageError, first_line
from prunectl.formats.base import ModelFile
from prunectl.training import trusted
from prunectl.training.builders import builder, built
from prunectl.training.network import Origin
from prunectl.training.torch.arrays import to_torch
from prunectl.training.torch.exported import Pieces, load_program, shapes_of
from prunectl.training.torch.names import matched


@dataclass(frozen=True, slots=True)
class Built:
    """A module with its numbers in it."""

    module: torch.nn.Module
    names: Mapping[str, str]
    """From tensors of the file to parameters and buffers."""
    has_modes: bool = True
    """Whether training differs from evaluation: an exported program has one way for both."""
    notes: tuple[str, ...] = ()
    shapes: tuple[tuple[int | None, ...], ...] = ()
    """What goes in, without the batch, where the file says so."""


def build(model: ModelFile, origin: Origin) -> Built:
    """Return the module in a file, or that of a function with the file's weights."""
    trusted.check(model, origin)
    torch.manual_seed(origin.seed)
    if origin.model:
        return _of_function(model, origin)
    if model.format == "torch-export":
        return _exported(model, origin)
    if trusted.is_script(model):
        return _scripted(model)
    if model.about.code:
        return _trusted(model)
    raise UsageError(
        f"{model.path} holds weights alone, and nothing says how they are connected",
        hint="name a function that builds the model: --model package.module:function, or ./file.py:function",
    )


def _of_function(model: ModelFile, origin: Origin) -> Built:
    make = builder(origin.model)
    made = make if isinstance(make, torch.nn.Module) else built(make, origin.model)
    if not isinstance(made, torch.nn.Module):
        raise UsageError(f"{origin.model} gives a {type(made).__name__}, and no torch.nn.Module")
    names = matched(model, made, origin.model)
    held = {tensor.name: tensor for tensor in model.tensors}
    made.load_state_dict({name: to_torch(model.read(held[of])) for of, name in names.items()}, strict=False)
    return Built(made, names)


def _scripted(model: ModelFile) -> Built:
    try:
        with warnings.catch_warnings():
            # That PyTorch would rather have it exported is not for who only holds the file.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(model.path), map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:
        raise InputError(f"{model.path} cannot be loaded by this PyTorch: {first_line(error)}") from error
    return _whole(model, module)


def _exported(model: ModelFile, origin: Origin) -> Built:
    program = load_program(model, origin)
    module: torch.nn.Module = program.module()
    shapes = shapes_of(program)
    size = shapes[0][0] if shapes and shapes[0] else None
    notes: tuple[str, ...] = (
        "An exported program is trained as it runs: its dropout and batch normalisation do not learn.",
    )
    if size is not None:
        module = Pieces(module, size)
        notes += (f"It was exported for {size} at a time: every batch goes through it in such pieces.",)
    built = _whole(model, module)
    return replace(built, has_modes=False, notes=notes, shapes=tuple(shape[1:] for shape in shapes))


def _trusted(model: ModelFile) -> Built:
    try:
        module = torch.load(str(model.path), map_location="cpu", weights_only=False)
    except (AttributeError, ModuleNotFoundError) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        hint = f"{trusted.way_to(model, missing)} loads it first" if missing else "say what builds the model: --model"
        raise InputError(f"{model.path} names code that is not here: {first_line(error)}", hint=hint) from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{model.path} holds a {type(module).__name__}", hint="say what builds the model: --model")
    return _whole(model, module)


def _whole(model: ModelFile, module: torch.nn.Module) -> Built:
    if not any(True for _ in module.parameters()):
        raise InputError(f"{model.path} has no parameters that can be trained: they were frozen into constants")
    return Built(module, matched(model, module, str(model.path)))
