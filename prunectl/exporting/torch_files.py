"""Modules of PyTorch as files that need no code: exported programs, and TorchScript."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from prunectl.errors import UsageError, WorkError, first_line
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob
from prunectl.exporting.quiet import quiet_conversion, without_mha_fastpath
from prunectl.exporting.torch import TorchLive, answers
from prunectl.exporting.weights import arrays, same_bits
from prunectl.formats.base import Array
from prunectl.training.torch.tensors import to_numpy, to_torch

_ELSE = "--to onnx has 8 bits for whatever it can hold"
_HOLDS_WEIGHTS = "torch.ao.nn."
"""Where the layers of 8 bits are from."""


def quantized(job: ExportJob) -> tuple[torch.nn.Module, tuple[str, ...]]:
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


def _static(job: ExportJob, tools: Any, module: torch.nn.Module) -> Any:
    graphs: Any = importlib.import_module("torch.ao.quantization.quantize_fx")
    batches = [tuple(map(to_torch, batch)) for batch in job.inputs.batches]
    how = tools.get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = graphs.prepare_fx(module, how, batches[0])
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return graphs.convert_fx(prepared)


def example(job: ExportJob) -> tuple[torch.Tensor, ...]:
    """Return inputs to trace with."""
    return tuple(to_torch(one) for one in job.inputs.batches[0])


def program_of(job: ExportJob) -> Any:
    """Return a module as an exported program, its open axes open."""
    live: TorchLive = job.live
    free = torch.export.Dim.DYNAMIC
    axes = tuple(
        {at: free for at, length in enumerate(flow.shape or ()) if length is None} or None for flow in job.flows
    )
    try:
        with quiet_conversion(), without_mha_fastpath(), torch.no_grad():
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


def check_names(job: ExportJob) -> None:
    """Refuse names that only `forward` gives."""
    for flow, own in zip(job.flows, job.live.inputs, strict=True):
        if flow.name != own.name:
            raise UsageError(f"--input {flow.name}: the inputs of a PyTorch model are called as forward calls them")


def write_program(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an exported program."""
    if is_script(job.live):
        raise UsageError(
            f"{job.file.path} is TorchScript, and PyTorch makes no exported program of it",
            hint="export it to ONNX, or begin from the state dict: --model mod:fn",
        )
    check_names(job)
    whole = io.BytesIO()
    program = program_of(job)
    with quiet_conversion():
        torch.export.save(program, whole)
    target.write_bytes(whole.getvalue())
    return ()


def write_script(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write TorchScript, traced."""
    check_names(job)
    live: TorchLive = job.live
    whole = io.BytesIO()
    module, said = live.module, tuple[str, ...]()
    if job.request.is_int8:
        with quiet_conversion():
            module, said = quantized(job)
    try:
        # What encoders do all at once reads weights as floats.
        with quiet_conversion(), without_mha_fastpath() if job.request.is_int8 else nullcontext(), torch.no_grad():
            trace: Any = torch.jit.trace
            traced = module if is_script(live) else trace(module, example(job))
            torch.jit.save(traced, whole)
    except Exception as error:
        raise WorkError(f"PyTorch cannot trace {job.file.path}: {first_line(error)}") from error
    target.write_bytes(whole.getvalue())
    return (*said, "It was traced: the way that its code took for one batch is the way that it takes.")


def run_program(job: ExportJob, target: Path) -> Run:
    """Return what runs an exported program."""
    del job
    with quiet_conversion():
        module = torch.export.load(target).module()
    return _runner(module)


def run_script(job: ExportJob, target: Path) -> Run:
    """Return what runs TorchScript."""
    del job
    with quiet_conversion():
        return _runner(torch.jit.load(str(target), map_location="cpu"))  # type: ignore[no-untyped-call]


def _runner(module: Any) -> Callable[[tuple[Array, ...]], dict[str, Array]]:
    return lambda inputs: answers(module, inputs)


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
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
