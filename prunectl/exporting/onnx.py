"""From ONNX to ONNX: another version of its operators, fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError, WorkError, first_line
from prunectl.exporting import onnx_finish
from prunectl.exporting.compare import Run
from prunectl.exporting.inputs import InputSpec
from prunectl.exporting.job import ExportJob
from prunectl.exporting.onnx_order import opset_of
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require
from prunectl.training.backend import ModelOrigin


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
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
        if found := onnx_finish.checker_error(job.file.path):
            raise InputError(f"{job.file.path} is no valid ONNX itself: {found}") from error
        raise


_FATAL = 4
"""What onnxruntime logs by itself; the rest comes as exceptions."""
_TYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, slots=True)
class OnnxLive:
    """A session, and what goes into it."""

    session: Any
    inputs: tuple[InputSpec, ...]
    is_channels_first: bool = True
    notes: tuple[str, ...] = ()

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """Return what comes out."""
        names = [port.name for port in self.session.get_outputs()]
        feeds = {flow.name: one.astype(flow.dtype, copy=False) for flow, one in zip(self.inputs, inputs, strict=True)}
        try:
            found = self.session.run(names, feeds)
        except Exception as error:
            raise UsageError(
                f"the model cannot be run: {first_line(error)}", hint="--data SPEC shows what it takes"
            ) from error
        return {name: _array(name, value) for name, value in zip(names, found, strict=True)}


def _array(name: str, value: Any) -> Array:
    """Return an output as an array; classifiers of old give a list of what each class is worth."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        value = [[one[key] for key in value[0]] for one in value]
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.empty((), object)
    if found.dtype.kind == "O" and not isinstance(value, np.ndarray):
        raise UsageError(f"the output {name} of the model is no tensor, and cannot be compared")
    return found


def open_live(model: ModelFile, origin: ModelOrigin) -> OnnxLive:
    """Return a model that was given; the file says all of it."""
    del origin
    try:
        return _opened(model.path)
    except Exception as error:
        raise InputError(f"{model.path} cannot be loaded by onnxruntime: {first_line(error)}") from error


def _opened(path: Path) -> OnnxLive:
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL
    # One thread after the other gives the same sums each time.
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return OnnxLive(session, tuple(_flow(port) for port in session.get_inputs()))


def _flow(port: Any) -> InputSpec:
    kind = port.type.removeprefix("tensor(").removesuffix(")")
    shape = None if port.shape is None else tuple(one if isinstance(one, int) else None for one in port.shape)
    return InputSpec(port.name, shape, _TYPES.get(kind, kind))


def runner(job: ExportJob, target: Path) -> Run:
    """Return what runs the result."""
    del job
    try:
        live = _opened(target)
    except Exception as error:
        raise WorkError(f"onnxruntime cannot load what was made: {first_line(error)}; nothing was written") from error

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        try:
            return live.run(inputs)
        except UsageError as error:
            raise WorkError(f"onnxruntime: of what was made, {error.message}; nothing was written") from error

    return run
