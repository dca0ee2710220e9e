"""A smaller program, as a file of torch.export."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from prunectl.channels.torch.opening import Opened
from prunectl.channels.torch.run import Network
from prunectl.channels.torch.tracing import quietly
from prunectl.errors import WorkError, first_line

_ENDLESS = 1 << 62


def write_program(found: Opened, network: Network, path: Path) -> tuple[str, ...]:
    """Trace a smaller program anew, so that every shape in it is right, write it, and return what has to be said."""
    with quietly():
        try:
            program, notes = _traced(found, whole(found, network))
            torch.export.save(program, path)
        except Exception as error:
            raise WorkError(f"the cut program cannot be exported: {first_line(error)}; nothing was written") from error
    return notes


def _traced(found: Opened, module: torch.nn.Module) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Return a program with the bounds of the one that was read, or with those that its steps ask for."""
    bounds = _bounds(found)
    try:
        axes = _open_axes(found, bounds)
        return torch.export.export(module, found.examples, dynamic_shapes=axes, strict=False), ()
    except Exception as error:
        if not bounds:
            raise
        axes = _open_axes(found, {})
        program = torch.export.export(module, found.examples, dynamic_shapes=axes, strict=False)
        reason = first_line(error)
        return program, (f"The bounds of the program's sizes are not those of the file, but PyTorch's own: {reason}.",)


def whole(found: Opened, network: Network) -> torch.fx.GraphModule:
    """Return a module with the smaller weights in it, those that nothing reads included."""
    memo: dict[int, Any] = {}
    for name, weight in (*found.module.named_parameters(), *found.module.named_buffers()):
        value = network.values.get(name, weight)
        is_trained = isinstance(weight, torch.nn.Parameter)
        memo[id(weight)] = torch.nn.Parameter(value, requires_grad=weight.requires_grad) if is_trained else value
    module = copy.deepcopy(found.module, memo)
    module.graph = copy.deepcopy(network.module.graph)
    return module


def _open_axes(found: Opened, bounds: Mapping[str, Any]) -> tuple[dict[int, Any] | None, ...]:
    """Return the axes that may have any length."""
    names = set(found.program.graph_signature.user_inputs)
    axes = []
    for node in found.program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            shape = getattr(node.meta.get("val"), "shape", ())
            open_axes = {at: length for at, length in enumerate(shape) if not isinstance(length, int)}
            axes.append({at: bounds.get(str(length), Dim.AUTO) for at, length in open_axes.items()})
    return tuple(one or None for one in axes)


def _bounds(found: Opened) -> dict[str, Any]:
    """Return an axis for each length that the program gives a name and limits."""
    return {
        str(symbol): Dim(f"length_{at}", min=int(limits.lower), max=_most(limits.upper))
        for at, (symbol, limits) in enumerate(found.program.range_constraints.items())
    }


def _most(limit: Any) -> int | None:
    return int(limit) if str(limit).isdecimal() and int(limit) < _ENDLESS else None
