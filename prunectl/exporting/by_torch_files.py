"""Modules of PyTorch as files that need no code: exported programs, and TorchScript."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from prunectl.errors import UsageError, WorkError, first_line
from prunectl.exporting.by_torch import TorchLive, answers
from prunectl.exporting.by_torch_int8 import quantized
from prunectl.exporting.by_torch_quiet import converting, unfused
from prunectl.exporting.job import Job
from prunectl.exporting.parity import Run
from prunectl.formats.base import Array
from prunectl.training.torch.arrays import to_torch


def example(job: Job) -> tuple[torch.Tensor, ...]:
    """Return inputs to trace with."""
    return tuple(to_torch(one) for one in job.inputs.batches[0])


def program_of(job: Job) -> Any:
    """Return a module as an exported program, its open axes open."""
    live: TorchLive = job.live
    free = torch.export.Dim.DYNAMIC
    axes = tuple(
        {at: free for at, length in enumerate(flow.shape or ()) if length is None} or None for flow in job.flows
    )
    try:
        with converting(), unfused(), torch.no_grad():
            return torch.export.export(live.module, example(job), dynamic_shapes=axes)
    except Exception as error:
        fixed = " ".join(
            f"--input {flow.name}:{','.join(map(str, one.shape))}"
            for flow, one in zip(job.flows, example(job), strict=True)
        )
        raise WorkError(
            f"PyTorch cannot export {job.file.path}: {first_line(error)}", hint=f"fixed shapes may help: {fixed}"
        ) from error


def is_script(live: TorchLive) -> bool:
    """Whether a module is TorchScript, of which no program can be made."""
    return isinstance(live.module, torch.jit.ScriptModule)


def check_names(job: Job) -> None:
    """Refuse names that only `forward` gives."""
    for flow, own in zip(job.flows, job.live.inputs, strict=True):
        if flow.name != own.name:
            raise UsageError(f"--input {flow.name}: the inputs of a PyTorch model are called as forward calls them")


def write_program(job: Job, target: Path) -> tuple[str, ...]:
    """Write an exported program."""
    if is_script(job.live):
        raise UsageError(
            f"{job.file.path} is TorchScript, and PyTorch makes no exported program of it",
            hint="export it to ONNX, or begin from the state dict: --model mod:fn",
        )
    check_names(job)
    whole = io.BytesIO()
    program = program_of(job)
    with converting():
        torch.export.save(program, whole)
    target.write_bytes(whole.getvalue())
    return ()


def write_script(job: Job, target: Path) -> tuple[str, ...]:
    """Write TorchScript, traced."""
    check_names(job)
    live: TorchLive = job.live
    whole = io.BytesIO()
    module, said = live.module, tuple[str, ...]()
    if job.request.is_int8:
        with converting():
            module, said = quantized(job)
    try:
        # What encoders do all at once reads weights as floats.
        with converting(), unfused() if job.request.is_int8 else nullcontext(), torch.no_grad():
            trace: Any = torch.jit.trace
            traced = module if is_script(live) else trace(module, example(job))
            torch.jit.save(traced, whole)
    except Exception as error:
        raise WorkError(f"PyTorch cannot trace {job.file.path}: {first_line(error)}") from error
    target.write_bytes(whole.getvalue())
    return (*said, "It was traced: the way that its code took for one batch is the way that it takes.")


def run_program(job: Job, target: Path) -> Run:
    """Return what runs an exported program."""
    del job
    with converting():
        module = torch.export.load(target).module()
    return _runner(module)


def run_script(job: Job, target: Path) -> Run:
    """Return what runs TorchScript."""
    del job
    with converting():
        return _runner(torch.jit.load(str(target), map_location="cpu"))  # type: ignore[no-untyped-call]


def _runner(module: Any) -> Callable[[tuple[Array, ...]], dict[str, Array]]:
    return lambda inputs: answers(module, inputs)
