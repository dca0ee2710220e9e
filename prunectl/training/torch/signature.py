"""What goes into a module and comes out of it, as far as it tells."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from prunectl.training.signature import Port
from prunectl.training.torch.outputs import ending

_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def inputs_of(module: torch.nn.Module, shapes: tuple[tuple[int | None, ...], ...] = ()) -> tuple[Port, ...]:
    """Return the inputs: their names by what `forward` takes, their shapes by the file or the first layer."""
    if shapes:
        dtype = _first_layer(module)[1] if len(shapes) == 1 else ""
        return tuple(Port(f"input{at}", shape, dtype) for at, shape in enumerate(shapes))
    names = _names(module)
    if len(names) > 1:
        return tuple(Port(name, None, "") for name in names)
    shape, dtype = _first_layer(module)
    return (Port(names[0] if names else "x", shape, dtype),)


def outputs_of(outputs: tuple[torch.Tensor, ...]) -> tuple[Port, ...]:
    """Return the outputs, seen on an example."""
    return tuple(
        Port(
            f"output{at}" if len(outputs) > 1 else "output",
            tuple(one.shape[1:]),
            str(one.dtype).rpartition(".")[2],
            ending(one),
        )
        for at, one in enumerate(outputs)
    )


def _names(module: torch.nn.Module) -> list[str]:
    if isinstance(module, torch.jit.ScriptModule):
        method: Any = module.forward
        return [arg.name for arg in method.schema.arguments[1:] if not arg.has_default_value()]
    inner = getattr(module, "inner", module)
    taken = inspect.signature(inner.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [one.name for one in taken if one.default is one.empty and one.kind in plain]


def _first_layer(module: torch.nn.Module) -> tuple[tuple[int | None, ...] | None, str]:
    """Return the shape and the type that the first layer with weights takes."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Embedding):
            return None, "int64"
        if isinstance(layer, _CONVOLUTIONS):
            return (layer.in_channels, *([None] * len(layer.kernel_size))), _dtype(layer.weight)
        own = next(iter(layer.parameters(recurse=False)), None)
        if own is not None and not isinstance(layer, torch.jit.ScriptModule):
            return None, _dtype(own)
    # A script says no classes: the kernel of a convolution is known by its axes.
    first = next((weight for weight in module.parameters() if weight.ndim > 1), next(module.parameters()))
    is_convolution = first.ndim in {3, 4, 5}
    return (first.shape[1], *([None] * (first.ndim - 2))) if is_convolution else None, _dtype(first)


def _dtype(tensor: torch.Tensor) -> str:
    # Half precision is what autocast and the module make of it; data comes in single.
    return "float64" if tensor.dtype is torch.float64 else "float32"
