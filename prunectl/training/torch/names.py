"""Which tensor of a file is which parameter of a module: the same name behind a common prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile, Role, Tensor

_IDLE = frozenset({Role.OPTIMIZER, Role.MASK, Role.SCHEDULE})


def matched(model: ModelFile, module: torch.nn.Module, said: str) -> dict[str, str]:
    """Return the name in the module of each tensor of the file that has one; every parameter must have a tensor."""
    wanted = module.state_dict()
    held = {tensor.name: tensor for tensor in model.tensors if tensor.role not in _IDLE}
    prefix = _prefix(held, wanted)
    found = {prefix + name: name for name in wanted if prefix + name in held}
    for name, value in wanted.items():
        tensor = held.get(prefix + name)
        if tensor is None and name in dict(module.named_parameters()):
            raise UsageError(
                f"{model.path} has no {prefix + name}, which the model of {said} needs",
                hint=f"see what it has: prunectl inspect {model.path}",
            )
        if tensor is not None and tensor.shape != tuple(value.shape):
            raise UsageError(
                f"{tensor.name} is {_text(tensor.shape)} in {model.path}, and {_text(tuple(value.shape))} in the "
                f"model of {said}",
                hint="does it build the model with other widths?",
            )
    return found


def _prefix(held: Mapping[str, Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """Return what stands before most names; of several the first in the file."""
    votes: Counter[str] = Counter()
    for name in held:
        parts = name.split(".")
        votes.update(
            ".".join(parts[:at]) + "." * bool(at) for at in range(len(parts)) if ".".join(parts[at:]) in wanted
        )
    return max(votes, key=lambda prefix: votes[prefix]) if votes else ""


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
