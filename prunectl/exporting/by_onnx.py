"""From ONNX to ONNX: another version of its operators, fewer bits."""

from __future__ import annotations

from pathlib import Path

from prunectl.errors import InputError, UsageError, WorkError, first_line
from prunectl.exporting import onnx_finish
from prunectl.exporting.job import Job
from prunectl.exporting.onnx_opset import opset_of
from prunectl.formats.optional import require


def write(job: Job, target: Path) -> tuple[str, ...]:
    """Write a model again, all its numbers in one file."""
    is_open = any(flow.shape is None or None in flow.shape[1:] for flow in job.live.inputs)
    if job.request.inputs and not is_open:
        raise UsageError("--input does not change what an ONNX model takes", hint="export its source again")
    tried = ("It was tried on what --input says; what it takes is as open as it was.",) if job.request.inputs else ()
    onnx = require("onnx", extra="onnx")
    try:
        proto = onnx.load(str(job.file.path))
    except Exception as error:
        raise InputError(f"{job.file.path} cannot be read by onnx: {first_line(error)}") from error
    own = {entry.key: entry.value for entry in proto.metadata_props}
    opset = opset_of(proto)
    if job.request.opset is not None and job.request.opset != opset:
        try:
            proto = require("onnx.version_converter", extra="onnx").convert_version(proto, job.request.opset)
        except Exception as error:
            raise WorkError(
                f"onnx cannot bring {job.file.path} from opset {opset} to {job.request.opset}: {first_line(error)}"
            ) from error
    try:
        return (*tried, *onnx_finish.finish(job, proto, target, kept=own))
    except WorkError as error:
        if found := onnx_finish.flaw(job.file.path):
            raise InputError(f"{job.file.path} is no valid ONNX itself: {found}") from error
        raise
