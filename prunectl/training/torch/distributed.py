"""Distributed training under torchrun, or a single process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from prunectl.errors import InputError, UsageError, WorkError, first_line
from prunectl.training.runtimes import random_state, restore_random_state
from prunectl.training.torch._compat import tree_map_only

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """The rank of this process, the number of processes, and the device of this one."""

    rank: int
    ranks: int
    device: torch.device


def join(device: str) -> DistributedContext:
    """Join the process group, if there is one, and choose the device."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if ranks > 1 and not torch.distributed.is_initialized():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return DistributedContext(rank, ranks, chosen)


def barrier(context: DistributedContext) -> None:
    """Wait for all processes: one that exits early would end the others."""
    if context.ranks > 1:
        torch.distributed.barrier()


def all_true(context: DistributedContext, mine: bool) -> bool:
    """Whether something is true in every process (an all-reduce by the minimum)."""
    if context.ranks == 1:
        return mine
    flag = torch.tensor(int(mine), device=context.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_DEVICE = ("CUDA error", "CUDA driver", "cuDNN error", "CUBLAS", "cublas", "NCCL", "HIP error", "MPS")


@contextmanager
def failures(device: torch.device) -> Iterator[None]:
    """Turn errors of a device (failed, out of memory, contact lost) into WorkError; other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        text = first_line(error)
        if isinstance(error, torch.OutOfMemoryError) or any(phrase in text for phrase in _MEMORY):
            raise WorkError(
                f"the device {device} ran out of memory", hint="use a smaller --batch-size, or --precision bf16"
            ) from error
        if isinstance(error, torch.distributed.DistError):
            raise WorkError(
                f"a process lost contact with the others: {text}", hint="see the messages of the other processes"
            ) from error
        if any(phrase in text for phrase in _DEVICE):
            raise WorkError(f"{device} failed: {text}") from error
        raise


def gather_objects(context: DistributedContext, mine: Any) -> list[Any]:
    """The object of each process, in the order of the ranks."""
    gathered: list[Any] = [mine]
    if context.ranks > 1:
        gathered = [None] * context.ranks
        torch.distributed.all_gather_object(gathered, mine)
    return gathered


def leave() -> None:
    """Leave the process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name in {"", "auto"}:
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is not known", hint="use cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no GPU", hint="use --device cpu")
    if name == "cuda":
        return torch.device("cuda", local_rank)
    return device


_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList)


def shard(module: torch.nn.Module, context: DistributedContext) -> None:
    """Shard the parameters with FSDP, layer by layer, so that no process holds all of them on its device."""
    if context.ranks == 1:
        raise UsageError(
            "--shard needs several processes, but this is the only one",
            hint="start them with: torchrun --nproc-per-node 2 -m prunectl finetune … --shard",
        )
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise UsageError(
            "--shard needs a Python module: TorchScript and exported programs have no layers to distribute",
            hint="add --builder module:function, or leave out --shard",
        )
    # Imported here, since the import is slow: it takes longer than half of PyTorch.
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh(context.device.type, (context.ranks,))
    for layer in reversed(_shardable_layers(module)):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(context.device)


def _shardable_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers in containers, which run one after the other; outer layers first."""
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


def _is_distributed(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is sharded over processes (a DTensor), which needs its module to be imported already."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; a collective operation, so that all processes must call it."""
    return tensor.full_tensor() if _is_distributed(tensor) else tensor


def full_state(state: Any) -> Any:
    """A state with every sharded tensor gathered."""
    return tree_map_only(torch.Tensor, full_tensor, state)


def distribute_like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The shard of a tensor for this process, distributed like another tensor of the same shape."""
    if _is_distributed(model):
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - see above

        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
    return value.to(model.device)


def distribute_state(state: Any, models: Any) -> Any:
    """A state of an optimizer or module, with each tensor sharded like that of another state."""
    if isinstance(state, torch.Tensor) and isinstance(models, torch.Tensor):
        return distribute_like(state, models) if state.shape == models.shape else state
    if isinstance(state, dict) and isinstance(models, dict):
        return {key: distribute_state(value, models.get(key)) for key, value in state.items()}
    return state


def are_finite(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether all gradients are finite in every process; a tensor, so that the step need not wait for the device."""
    local = [gradient.to_local() if _is_distributed(gradient) else gradient for gradient in gradients]
    is_finite = torch.stack([gradient.isfinite().all() for gradient in local]).all()
    if any(map(_is_distributed, gradients)):
        all_finite = is_finite.to(torch.int32)
        torch.distributed.all_reduce(all_finite, torch.distributed.ReduceOp.MIN)
        is_finite = all_finite.bool()
    return is_finite


def sync_buffers(module: torch.nn.Module) -> None:
    """Broadcast the buffers of the first process, such as batch-norm statistics, to all processes."""
    for buffer in module.buffers():
        torch.distributed.broadcast(buffer, 0)


_FILE = "torch.pt"
_HOST_GENERATORS = ("numpy", "python")
"""The random generators outside PyTorch."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Everything that changes from step to step of training."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    place: DistributedContext
    gradient_sums: Mapping[str, torch.Tensor]
    """Sums of the gradient statistic, by tensor."""


def save(folder: Path | None, state: TrainerState) -> None:
    """Save the state to a folder; without one, only contribute this process's part to another's save."""
    parts = full_state(
        {
            "module": state.module.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "random": gather_objects(state.place, _random_states(state.place)),
            "evidence": state.gradient_sums,
        }
    )
    if folder is not None:
        torch.save(parts, folder / _FILE)


def restore(folder: Path, state: TrainerState) -> None:
    """Restore the state from a folder."""
    context = state.place
    parts = torch.load(folder / _FILE, map_location=context.device, weights_only=True)
    _check_version(folder / _FILE, parts)
    if len(parts["random"]) != context.ranks:
        raise UsageError(
            f"the run was made by {len(parts['random'])} processes, but is resumed by {context.ranks}",
            hint="start the same number of processes",
        )
    state.module.load_state_dict(distribute_state(parts["module"], state.module.state_dict()))
    state.optimizer.load_state_dict(_shard_slots(parts["optimizer"], state.optimizer))
    state.scaler.load_state_dict(parts["scaler"])
    _resume_random(parts["random"][context.rank], context)
    for name, total in parts["evidence"].items():
        state.gradient_sums[name].copy_(distribute_like(total, state.gradient_sums[name]))


def _check_version(path: Path, parts: Any) -> None:
    """Refuse the state of another version; early ones kept only the random state of the first process."""
    random = parts.get("random") if isinstance(parts, dict) else None
    if isinstance(random, list) and all(
        isinstance(states, dict) and states.keys() >= {"cpu", *_HOST_GENERATORS} for states in random
    ):
        return
    raise InputError(
        f"{path} was written by another version of prunectl and cannot be resumed",
        hint="finish the run with that version, or start it again in another folder",
    )


def _random_states(context: DistributedContext) -> dict[str, Any]:
    """The state of each random generator of this process: each process has its own dropout."""
    states = {"cpu": torch.get_rng_state(), **random_state()}
    if context.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(context.device)
    elif context.device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _resume_random(states: Mapping[str, Any], context: DistributedContext) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    restore_random_state(states)
    # A run that is resumed on another kind of device cannot be bit-identical.
    if context.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), context.device)
    elif context.device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"].cpu())


def _shard_slots(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The saved state of an optimizer, sharded like its weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        index: {name: distribute_state(value, weights[index]) for name, value in slots.items()}
        for index, slots in saved["state"].items()
    }
    return {**saved, "state": parts}
