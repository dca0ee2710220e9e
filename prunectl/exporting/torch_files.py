"""PyTorch files: exported programs, TorchScript (int8 too), and state dicts."""

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
from prunectl.exporting.torch import TorchRunnable, run_module, without_mha_fastpath
from prunectl.exporting.weights import exported_arrays, same_bits
from prunectl.formats.base import Array
from prunectl.training.quiet import quiet_conversion
from prunectl.training.torch.tensors import to_numpy, to_torch

_ONNX_HINT = "--to onnx has 8 bits for whatever it can hold"
_INT8_LAYERS = "torch.ao.nn."
"""The package of 8-bit layers."""


def quantize(job: ExportJob) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Post-training quantization to int8 of a copy; weights are quantized symmetrically, so zeros stay zeros."""
    runnable: TorchRunnable = job.runnable
    if isinstance(runnable.module, torch.jit.ScriptModule):
        raise UsageError(
            f"{job.file.path} shows PyTorch no layers, whose weights it could hold in 8 bits",
            hint=f"begin from the state dict: --model mod:fn; or {_ONNX_HINT}",
        )
    module = copy.deepcopy(runnable.module)
    try:
        # By name: PyTorch has not decided how long it keeps them.
        quantization: Any = importlib.import_module("torch.ao.quantization")
        module_int8 = (
            _quantize_static(job, quantization, module) if job.request.data else _quantize_dynamic(quantization, module)
        )
    except Exception as error:
        raise WorkError(
            f"PyTorch cannot hold {job.file.path} in 8 bits: {first_line(error)}", hint=_ONNX_HINT
        ) from error
    count = sum(type(layer).__module__.startswith(_INT8_LAYERS) for layer in module_int8.modules())
    if not count:
        raise UsageError(
            f"no layer of {job.file.path} has weights that PyTorch could hold in 8 bits",
            hint="convolutions need examples: --data SPEC",
        )
    if job.request.data:
        return module_int8, (
            f"Weights and activations are 8-bit integers, their ranges by {job.samples.examples} examples.",
        )
    return module_int8, (
        "Weights of dense and recurrent layers are 8-bit integers; convolutions stay floats without --data.",
    )


def _quantize_dynamic(quantization: Any, module: torch.nn.Module) -> Any:
    kinds = {torch.nn.Linear, torch.nn.LSTM, torch.nn.GRU}
    return quantization.quantize_dynamic(module, kinds, dtype=torch.qint8, inplace=True)


def _quantize_static(job: ExportJob, quantization: Any, module: torch.nn.Module) -> Any:
    fx: Any = importlib.import_module("torch.ao.quantization.quantize_fx")
    batches = [tuple(map(to_torch, batch)) for batch in job.samples.batches]
    qconfig = quantization.get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = fx.prepare_fx(module, qconfig, batches[0])
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return fx.convert_fx(prepared)


def example(job: ExportJob) -> tuple[torch.Tensor, ...]:
    """Inputs to trace with."""
    return tuple(to_torch(one) for one in job.samples.batches[0])


def program_of(job: ExportJob) -> Any:
    """A module as an exported program, its open axes open."""
    runnable: TorchRunnable = job.runnable
    dynamic = torch.export.Dim.DYNAMIC
    dynamic_shapes = tuple(
        {axis: dynamic for axis, length in enumerate(spec.shape or ()) if length is None} or None for spec in job.inputs
    )
    try:
        with quiet_conversion(), without_mha_fastpath(), torch.no_grad():
            return torch.export.export(runnable.module, example(job), dynamic_shapes=dynamic_shapes)
    except Exception as error:
        options = " ".join(
            f"--input {spec.name}:{','.join(map(str, array.shape))}"
            for spec, array in zip(job.inputs, example(job), strict=True)
        )
        raise WorkError(
            f"PyTorch cannot export {job.file.path}: {first_line(error)}", hint=f"fixed shapes may help: {options}"
        ) from error


def is_script(runnable: TorchRunnable) -> bool:
    """Whether a module is TorchScript, of which no program can be made."""
    return isinstance(runnable.module, torch.jit.ScriptModule)


def check_names(job: ExportJob) -> None:
    """Refuse other input names than those of `forward`."""
    for spec, declared in zip(job.inputs, job.runnable.inputs, strict=True):
        if spec.name != declared.name:
            raise UsageError(f"--input {spec.name}: the inputs of a PyTorch model are called as forward calls them")


def write_program(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an exported program."""
    if is_script(job.runnable):
        raise UsageError(
            f"{job.file.path} is TorchScript, and PyTorch makes no exported program of it",
            hint="export it to ONNX, or begin from the state dict: --model mod:fn",
        )
    check_names(job)
    buffer = io.BytesIO()
    program = program_of(job)
    with quiet_conversion():
        torch.export.save(program, buffer)
    target.write_bytes(buffer.getvalue())
    return ()


def write_script(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write TorchScript, traced."""
    check_names(job)
    runnable: TorchRunnable = job.runnable
    buffer = io.BytesIO()
    module, notes = runnable.module, tuple[str, ...]()
    if job.request.int8:
        with quiet_conversion():
            module, notes = quantize(job)
    try:
        # What encoders do all at once reads weights as floats.
        with quiet_conversion(), without_mha_fastpath() if job.request.int8 else nullcontext(), torch.no_grad():
            trace: Any = torch.jit.trace
            traced = module if is_script(runnable) else trace(module, example(job))
            torch.jit.save(traced, buffer)
    except Exception as error:
        raise WorkError(f"PyTorch cannot trace {job.file.path}: {first_line(error)}") from error
    target.write_bytes(buffer.getvalue())
    return (*notes, "It was traced: the way that its code took for one batch is the way that it takes.")


def run_program(job: ExportJob, target: Path) -> Run:
    """A function that runs an exported program."""
    del job
    with quiet_conversion():
        module = torch.export.load(target).module()
    return _runner(module)


def run_script(job: ExportJob, target: Path) -> Run:
    """A function that runs TorchScript."""
    del job
    with quiet_conversion():
        return _runner(torch.jit.load(str(target), map_location="cpu"))  # type: ignore[no-untyped-call]


def _runner(module: Any) -> Callable[[tuple[Array, ...]], dict[str, Array]]:
    return lambda inputs: run_module(module, inputs)


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a state dict under the names of the file; tied tensors stay tied."""
    state: dict[str, torch.Tensor] = {}
    shared: dict[object, torch.Tensor] = {}
    for tensor, array in exported_arrays(job):
        view = (tensor.storage.key, tensor.start, tensor.shape, tensor.strides)
        if view not in shared:
            shared[view] = to_torch(array)
        state[tensor.name] = shared[view]
    # Into memory: a file would be named inside of itself.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    target.write_bytes(buffer.getvalue())
    loaded = torch.load(target, weights_only=True)
    for tensor, array in exported_arrays(job):
        if not same_bits(array, to_numpy(loaded[tensor.name])):
            raise WorkError(f"{tensor.name} came out with other numbers than it has; nothing was written")
    return ()
