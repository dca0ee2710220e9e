"""A state dict, from any file of PyTorch, that `weights_only=True` loads."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from prunectl.errors import WorkError
from prunectl.exporting.job import Job
from prunectl.exporting.weights import arrays, same_bits
from prunectl.training.torch.arrays import to_numpy, to_torch


def write(job: Job, target: Path) -> tuple[str, ...]:
    """Write the tensors under the names that the file gives them; what is tied stays tied."""
    state: dict[str, torch.Tensor] = {}
    known: dict[object, torch.Tensor] = {}
    for tensor, array in arrays(job):
        view = (tensor.storage.key, tensor.start, tensor.shape, tensor.strides)
        if view not in known:
            known[view] = to_torch(array)
        state[tensor.name] = known[view]
    # Into memory: a file would be named inside of itself.
    whole = io.BytesIO()
    torch.save(state, whole)
    target.write_bytes(whole.getvalue())
    found = torch.load(target, weights_only=True)
    for tensor, array in arrays(job):
        if not same_bits(array, to_numpy(found[tensor.name])):
            raise WorkError(f"{tensor.name} came out with other numbers than it has; nothing was written")
    return ()
