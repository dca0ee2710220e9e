"""Models that no single device holds: every process keeps its part of each parameter (FSDP2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from prunectl.errors import UsageError
from prunectl.training.torch.processes import Place

_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList)


def shard(module: torch.nn.Module, place: Place) -> None:
    """Leave each process its part of the parameters; layer by layer, so that none holds all of them on its device."""
    if place.ranks == 1:
        raise UsageError(
            "--shard spreads a model over processes, and this is the only one",
            hint="torchrun --nproc-per-node 2 -m prunectl finetune … --shard",
        )
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise UsageError(
            "--shard needs a module of Python: a program that was saved as a graph has no layers to spread",
            hint="--model module:function, or leave out --shard",
        )
    mesh = init_device_mesh(place.device.type, (place.ranks,))
    for piece in reversed(_pieces(module)):
        fully_shard(piece, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(place.device)


def _pieces(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that lie in containers, which are called one after the other; outer ones first."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if len(names) != len(list(module.parameters())):
        return []  # two layers that share a parameter have to keep it together
    return [
        child
        for container in module.modules()
        if isinstance(container, _CONTAINERS)
        for child in container.children()
        if not isinstance(child, _CONTAINERS) and any(True for _ in child.parameters())
    ]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts of all processes, which all of them must ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_all(state: Any) -> Any:
    """Return a state with every tensor in it whole."""
    return tree_map_only(torch.Tensor, whole, state)


def like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds of another of its shape."""
    if isinstance(model, DTensor):
        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
    return value.to(model.device)


def all_like(state: Any, models: Any) -> Any:
    """Return a state of an optimizer, or of a module, with every tensor spread as it is in another."""
    if isinstance(state, torch.Tensor) and isinstance(models, torch.Tensor):
        return like(state, models) if state.shape == models.shape else state
    if isinstance(state, dict) and isinstance(models, dict):
        return {key: all_like(value, models.get(key)) for key, value in state.items()}
    return state


def are_finite(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether all gradients are finite numbers, in every process; a tensor, so that no step waits for it."""
    mine = [one.to_local() if isinstance(one, DTensor) else one for one in gradients]
    found = torch.stack([one.isfinite().all() for one in mine]).all()
    if any(isinstance(one, DTensor) for one in gradients):
        whole = found.to(torch.int32)
        torch.distributed.all_reduce(whole, torch.distributed.ReduceOp.MIN)
        found = whole.bool()
    return found


def agree(module: torch.nn.Module) -> None:
    """Give all processes the buffers of the first, such as the statistics of its normalisations."""
    for buffer in module.buffers():
        torch.distributed.broadcast(buffer, 0)
