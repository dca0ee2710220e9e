"""The class that was generated, run with the weights that were written for it."""

from __future__ import annotations

import types
from pathlib import Path

import torch

from prunectl.channels.torch.weights import beside as place_of
from prunectl.errors import UsageError, WorkError
from prunectl.exporting.by_torch import answers
from prunectl.exporting.job import Job
from prunectl.exporting.parity import Run
from prunectl.formats.base import Array
from prunectl.formats.table import open_model
from prunectl.training.torch.arrays import to_torch


def runner(job: Job, target: Path) -> Run:
    """Return what runs the class that was written, with the weights that were."""
    home = types.ModuleType("written")
    exec(compile(place_of(target).read_text("utf-8"), place_of(target).name, "exec"), home.__dict__)  # noqa: S102 - it is our own text
    kinds = [kind for kind in vars(home).values() if isinstance(kind, type) and kind.__module__ == home.__name__]
    module = kinds[0]().eval()
    module.load_state_dict(_held(job, target), strict=True)

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        try:
            return answers(module, inputs)
        except UsageError as error:
            sizes = " ".join(f"--input {flow.name}:{len(inputs[0])},..." for flow in job.flows)
            raise WorkError(
                f"of the class that was generated, {error.message}; nothing was written",
                hint=f"its steps may name the size of the batch: fixed shapes may help, {sizes}",
            ) from error

    return run


def _held(job: Job, target: Path) -> dict[str, torch.Tensor]:
    if job.request.to != "safetensors":
        found: dict[str, torch.Tensor] = torch.load(target, weights_only=True)
        return found
    model = open_model(target)
    return {tensor.name: to_torch(model.read(tensor)) for tensor in model.tensors}
