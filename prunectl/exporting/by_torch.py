"""Modules of PyTorch, as PyTorch runs them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from prunectl.errors import UsageError
from prunectl.exporting import by_torch_frozen
from prunectl.exporting.by_torch_quiet import converting
from prunectl.exporting.live import Flow
from prunectl.formats.base import Array, ModelFile
from prunectl.training.network import Origin
from prunectl.training.torch.arrays import to_numpy, to_torch
from prunectl.training.torch.build import Built, build
from prunectl.training.torch.exported import Pieces
from prunectl.training.torch.outputs import leaves, reason
from prunectl.training.torch.signature import inputs_of


@dataclass(frozen=True, slots=True)
class TorchLive:
    """A module that predicts."""

    built: Built
    inputs: tuple[Flow, ...]
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


def open_live(model: ModelFile, origin: Origin) -> TorchLive:
    """Return the module of a file, ready to predict."""
    script = by_torch_frozen.frozen(model, origin)
    if script is not None:
        return TorchLive(Built(script, {}), by_torch_frozen.flows(script))
    with converting():
        built = build(model, origin)
    if built.has_modes:
        built.module.eval()
    size = built.module.size if isinstance(built.module, Pieces) else None
    flows = tuple(
        Flow(port.name, None if port.shape is None else (size, *port.shape), port.dtype, is_sure=bool(built.shapes))
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
