"""Modules of PyTorch with weights of 8 bits, by its own tools; they run where PyTorch does, and need nothing else."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch

from prunectl.errors import UsageError, WorkError, first_line
from prunectl.exporting.by_torch import TorchLive
from prunectl.exporting.job import Job
from prunectl.training.torch.arrays import to_torch

_ELSE = "--to onnx has 8 bits for whatever it can hold"
_HOLDS_WEIGHTS = "torch.ao.nn."
"""Where the layers of 8 bits are from."""


def quantized(job: Job) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Return a copy of the module in 8 bits, its zeros still zeros: weights are spread evenly around it."""
    live: TorchLive = job.live
    if isinstance(live.module, torch.jit.ScriptModule):
        raise UsageError(
            f"{job.file.path} shows PyTorch no layers, whose weights it could hold in 8 bits",
            hint=f"begin from the state dict: --model mod:fn; or {_ELSE}",
        )
    module = copy.deepcopy(live.module)
    try:
        # By name: PyTorch has not decided how long it keeps them.
        tools: Any = importlib.import_module("torch.ao.quantization")
        found = _static(job, tools, module) if job.request.data else _dynamic(tools, module)
    except Exception as error:
        raise WorkError(f"PyTorch cannot hold {job.file.path} in 8 bits: {first_line(error)}", hint=_ELSE) from error
    count = sum(type(one).__module__.startswith(_HOLDS_WEIGHTS) for one in found.modules())
    if not count:
        raise UsageError(
            f"no layer of {job.file.path} has weights that PyTorch could hold in 8 bits",
            hint="convolutions need examples: --data SPEC",
        )
    if job.request.data:
        return found, (f"Weights and activations are 8-bit integers, their ranges by {job.inputs.examples} examples.",)
    return found, (
        "Weights of dense and recurrent layers are 8-bit integers; convolutions stay floats without --data.",
    )


def _dynamic(tools: Any, module: torch.nn.Module) -> Any:
    kinds = {torch.nn.Linear, torch.nn.LSTM, torch.nn.GRU}
    return tools.quantize_dynamic(module, kinds, dtype=torch.qint8, inplace=True)


def _static(job: Job, tools: Any, module: torch.nn.Module) -> Any:
    graphs: Any = importlib.import_module("torch.ao.quantization.quantize_fx")
    batches = [tuple(map(to_torch, batch)) for batch in job.inputs.batches]
    how = tools.get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = graphs.prepare_fx(module, how, batches[0])
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return graphs.convert_fx(prepared)
