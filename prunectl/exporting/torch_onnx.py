"""From PyTorch to ONNX: by its exporter of programs, or for TorchScript by the older one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunectl.errors import WorkError, first_line
from prunectl.exporting import onnx_finish, onnx_order
from prunectl.exporting.job import ExportJob
from prunectl.exporting.quiet import quiet_conversion, without_mha_fastpath
from prunectl.exporting.torch import TorchLive, answers, names_of
from prunectl.exporting.torch_files import example, is_script, program_of
from prunectl.formats.safe_json import require
from prunectl.training.torch.build import load_program

OPSET = 18


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an ONNX model."""
    live: TorchLive = job.live
    outputs = names_of(len(answers(live.module, job.inputs.batches[0])))
    try:
        with quiet_conversion(), without_mha_fastpath(), torch.no_grad():
            proto, said = (_of_script if is_script(live) else _of_program)(job, outputs)
    except WorkError:
        raise
    except Exception as error:
        raise WorkError(
            f"PyTorch cannot convert {job.file.path} to ONNX: {_reason(error)}",
            hint="another --opset may know the operator",
        ) from error
    inputs = [flow.name for flow in job.flows]
    parameters = {name: of for of, name in live.built.names.items()}
    onnx_order.canonical_names(proto, job.file, inputs, outputs, parameters)
    return (*said, *onnx_finish.finish(job, proto, target))


def _reason(error: Exception) -> str:
    """Return what the innermost error says: the outer ones tell at which step it was."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _of_program(job: ExportJob, outputs: list[str]) -> tuple[Any, tuple[str, ...]]:
    del outputs
    is_program = job.file.format == "torch-export" and not job.request.origin.model
    program = load_program(job.file, job.request.origin) if is_program else program_of(job)
    found = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=job.request.opset or OPSET)
    if found is None:
        raise WorkError(f"PyTorch made nothing of {job.file.path}")
    return found.model_proto, ()


def _of_script(job: ExportJob, outputs: list[str]) -> tuple[Any, tuple[str, ...]]:
    live: TorchLive = job.live
    inputs = [flow.name for flow in job.flows]
    axes = {
        flow.name: {at: onnx_order.BATCH if at == 0 else f"{flow.name}_{at}" for at in _open(flow.shape)}
        for flow in job.flows
    }
    if any(0 in found for found in axes.values()):
        axes |= {name: {0: onnx_order.BATCH} for name in outputs}
    place = job.scratch / "script.onnx"
    torch.onnx.export(
        live.module,
        example(job),
        str(place),
        dynamo=False,
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=job.request.opset or OPSET,
    )
    onnx = require("onnx", extra="onnx")
    said = "It is TorchScript, which the older exporter of PyTorch converts: the newer one takes no such file."
    return onnx.load(str(place)), (said,)


def _axis(name: str, at: int) -> str:
    return onnx_order.BATCH if at == 0 else f"{name}_{at}"


def _open(shape: tuple[int | None, ...] | None) -> list[int]:
    return [at for at, length in enumerate(shape or ()) if length is None]
