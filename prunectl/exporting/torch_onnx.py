"""PyTorch to ONNX: by torch.export, or for TorchScript by the older tracing exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunectl.errors import WorkError, first_line
from prunectl.exporting import onnx_canonical, onnx_finish
from prunectl.exporting.job import ExportJob
from prunectl.exporting.torch import TorchRunnable, output_names, run_module, without_mha_fastpath
from prunectl.exporting.torch_files import example, is_script, program_of
from prunectl.formats.base import Family
from prunectl.graphs.onnx.tensors import load_message
from prunectl.training.quiet import quiet_conversion
from prunectl.training.torch.build import load_program

OPSET = 18


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an ONNX model."""
    runnable: TorchRunnable = job.runnable
    outputs = output_names(len(run_module(runnable.module, job.samples.batches[0])))
    try:
        with quiet_conversion(), without_mha_fastpath(), torch.no_grad():
            proto, notes = (_convert_script if is_script(runnable) else _convert_program)(job, outputs)
    except WorkError:
        raise
    except Exception as error:
        raise WorkError(
            f"PyTorch cannot convert {job.file.path} to ONNX: {_reason(error)}",
            hint="another --opset may know the operator",
        ) from error
    inputs = [spec.name for spec in job.inputs]
    parameters = {parameter: name for name, parameter in runnable.built.names.items()}
    onnx_canonical.canonical_names(proto, job.file, inputs, outputs, parameters)
    return (*notes, *onnx_finish.finalize(job, proto, target))


def _reason(error: Exception) -> str:
    """The message of the innermost cause: the outer errors only name the step."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _convert_program(job: ExportJob, outputs: list[str]) -> tuple[Any, tuple[str, ...]]:
    del outputs
    is_program = job.file.family is Family.TORCH_PROGRAM and not job.request.origin.model
    program = load_program(job.file, job.request.origin) if is_program else program_of(job)
    exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=job.request.opset or OPSET)
    if exported is None:
        raise WorkError(f"PyTorch made nothing of {job.file.path}")
    return exported.model_proto, ()


def _convert_script(job: ExportJob, outputs: list[str]) -> tuple[Any, tuple[str, ...]]:
    runnable: TorchRunnable = job.runnable
    inputs = [spec.name for spec in job.inputs]
    axes = {
        spec.name: {
            axis: onnx_canonical.BATCH if axis == 0 else f"{spec.name}_{axis}" for axis in _open_axes(spec.shape)
        }
        for spec in job.inputs
    }
    if any(0 in open_axes for open_axes in axes.values()):
        axes |= {name: {0: onnx_canonical.BATCH} for name in outputs}
    path = job.scratch / "script.onnx"
    torch.onnx.export(
        runnable.module,
        example(job),
        str(path),
        dynamo=False,
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=job.request.opset or OPSET,
    )
    note = "It is TorchScript, which the older exporter of PyTorch converts: the newer one takes no such file."
    return load_message(path), (note,)


def _open_axes(shape: tuple[int | None, ...] | None) -> list[int]:
    return [axis for axis, length in enumerate(shape or ()) if length is None]
