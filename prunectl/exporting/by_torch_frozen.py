"""TorchScript whose weights were frozen into constants: nothing to train, and something to run all the same."""

from __future__ import annotations

from typing import Any

import torch

from prunectl.errors import InputError, first_line
from prunectl.exporting.by_torch_quiet import converting
from prunectl.exporting.live import Flow
from prunectl.formats.base import ModelFile
from prunectl.training import trusted
from prunectl.training.network import Origin


def frozen(model: ModelFile, origin: Origin) -> torch.nn.Module | None:
    """Return a script that has no parameters, ready to predict; None of what has some."""
    if origin.model or not trusted.is_script(model):
        return None
    trusted.check(model, origin)
    try:
        with converting():
            found: Any = torch.jit.load(str(model.path), map_location="cpu")  # type: ignore[no-untyped-call]
            script: torch.nn.Module = found.eval()
    except Exception as error:
        raise InputError(f"{model.path} cannot be loaded by this PyTorch: {first_line(error)}") from error
    if any(True for _ in script.parameters()):
        return None
    if not hasattr(script, "forward"):
        raise InputError(f"{model.path} is a script without forward, and nothing says how it is called")
    return script


def flows(module: Any) -> tuple[Flow, ...]:
    """Return what goes in: a script without layers says no more than names."""
    taken = module.forward.schema.arguments[1:]
    return tuple(Flow(one.name, None, "", is_sure=False) for one in taken if not one.has_default_value())
