"""Modules of PyTorch, as PyTorch runs them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from prunectl.errors import InputError, UsageError, first_line
from prunectl.exporting.inputs import InputSpec
from prunectl.exporting.quiet import quiet_conversion
from prunectl.formats.base import Array, ModelFile
from prunectl.training import user_code
from prunectl.training.backend import ModelOrigin
from prunectl.training.torch.build import Built, Pieces, build, inputs_of
from prunectl.training.torch.tensors import leaves, reason, to_numpy, to_torch


def frozen_script(model: ModelFile, origin: ModelOrigin) -> torch.nn.Module | None:
    """Return a script that has no parameters, ready to predict; None of what has some."""
    if origin.model or not user_code.is_script(model):
        return None
    user_code.check(model, origin)
    try:
        with quiet_conversion():
            found: Any = torch.jit.load(str(model.path), map_location="cpu")  # type: ignore[no-untyped-call]
            script: torch.nn.Module = found.eval()
    except Exception as error:
        raise InputError(f"{model.path} cannot be loaded by this PyTorch: {first_line(error)}") from error
    if any(True for _ in script.parameters()):
        return None
    if not hasattr(script, "forward"):
        raise InputError(f"{model.path} is a script without forward, and nothing says how it is called")
    return script


def frozen_inputs(module: Any) -> tuple[InputSpec, ...]:
    """Return what goes in: a script without layers says no more than names."""
    taken = module.forward.schema.arguments[1:]
    return tuple(InputSpec(one.name, None, "", is_sure=False) for one in taken if not one.has_default_value())


@dataclass(frozen=True, slots=True)
class TorchLive:
    """A module that predicts."""

    built: Built
    inputs: tuple[InputSpec, ...]
    is_channels_first: bool = True
    notes: tuple[str, ...] = ()

    @property
    def module(self) -> torch.nn.Module:
        """The module itself."""
        found = self.built.module
        return found.inner if isinstance(found, Pieces) else found

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """Return what comes out."""
        return answers(self.module, inputs)


def open_live(model: ModelFile, origin: ModelOrigin) -> TorchLive:
    """Return the module of a file, ready to predict."""
    script = frozen_script(model, origin)
    if script is not None:
        return TorchLive(Built(script, {}), frozen_inputs(script))
    with quiet_conversion():
        built = build(model, origin)
    if built.has_modes:
        built.module.eval()
    size = built.module.size if isinstance(built.module, Pieces) else None
    flows = tuple(
        InputSpec(
            port.name, None if port.shape is None else (size, *port.shape), port.dtype, is_sure=bool(built.shapes)
        )
        for port in inputs_of(built.module, built.shapes)
    )
    return TorchLive(built, flows)


def answers(module: Any, inputs: tuple[Array, ...]) -> dict[str, Array]:
    """Return what a module makes of arrays: its tensors one by one, whatever they are packed in."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # What its authors would do otherwise today is not for who only holds the file.
            warnings.simplefilter("ignore")
            found = leaves(module(*map(to_torch, inputs)))
    except Exception as error:
        shapes = ", ".join("x".join(map(str, one.shape)) for one in inputs)
        raise UsageError(
            f"the model does not take inputs of {shapes}: {reason(error)}",
            hint="--input x:1,3,224,224:f32 says what it takes, or --data SPEC shows it",
        ) from error
    return dict(zip(names_of(len(found)), [to_numpy(one) for one in found], strict=True))


def names_of(count: int) -> list[str]:
    """Return what outputs are called."""
    return ["output"] if count == 1 else [f"output{at}" for at in range(count)]
