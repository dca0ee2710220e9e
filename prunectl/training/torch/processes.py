"""One process of several that torchrun has started, or the only one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prunectl.errors import UsageError, WorkError, first_line


@dataclass(frozen=True, slots=True)
class Place:
    """Which process this is, and what it reckons on."""

    rank: int
    ranks: int
    device: torch.device


def take_place(device: str) -> Place:
    """Join the other processes, if there are any, and return the device to use."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if ranks > 1 and not torch.distributed.is_initialized():
        if found.type == "cuda":
            torch.cuda.set_device(found)
        torch.distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
    return Place(rank, ranks, found)


def wait(place: Place) -> None:
    """Go on together: who ends earlier would have the others ended too."""
    if place.ranks > 1:
        torch.distributed.barrier()


def all_true(place: Place, mine: bool) -> bool:
    """Whether something is true in every process (an all-reduce by the minimum)."""
    if place.ranks == 1:
        return mine
    found = torch.tensor(int(mine), device=place.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return bool(found)


_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_DEVICE = ("CUDA error", "CUDA driver", "cuDNN error", "CUBLAS", "cublas", "NCCL", "HIP error", "MPS")


@contextmanager
def failures(device: torch.device) -> Iterator[None]:
    """Tell a device that fails, or has no memory left, from arrays that do not fit together."""
    try:
        yield
    except RuntimeError as error:
        text = first_line(error)
        if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _MEMORY):
            raise WorkError(
                f"out of memory on {device}", hint="a smaller --batch-size, or --precision bf16, takes less"
            ) from error
        if isinstance(error, torch.distributed.DistError):
            raise WorkError(f"the processes lost each other: {text}", hint="see what the others say") from error
        if any(words in text for words in _DEVICE):
            raise WorkError(f"{device} failed: {text}") from error
        raise


def gathered(place: Place, mine: Any) -> list[Any]:
    """What each process holds, in the order of their ranks."""
    found: list[Any] = [mine]
    if place.ranks > 1:
        found = [None] * place.ranks
        torch.distributed.all_gather_object(found, mine)
    return found


def leave() -> None:
    """Part from the other processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name in {"", "auto"}:
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device", hint="cpu, cuda, cuda:1 or mps") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no GPU that PyTorch can use", hint="--device cpu")
    if name == "cuda":
        return torch.device("cuda", local_rank)
    return found
