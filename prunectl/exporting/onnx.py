"""ONNX models as sources: onnxruntime sessions, and ONNX to ONNX with another opset or fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.analysis.timing import Timed
from prunectl.errors import InputError, UsageError, WorkError, first_line
from prunectl.exporting.compare import Run
from prunectl.exporting.job import ExportJob, InputSpec, threads_of
from prunectl.exporting.onnx_finish import checker_error, finalize
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require
from prunectl.onnx_graph import OnnxSession, densify, load_message, opset_of
from prunectl.training.backend import LoadOptions


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an ONNX model again with another opset, precision or metadata."""
    is_open = any(spec.shape is None or None in spec.shape[1:] for spec in job.runnable.inputs)
    if job.request.input and not is_open:
        raise UsageError(
            "--input cannot change the inputs of an ONNX model", hint="export the model again from its source"
        )
    notes: tuple[str, ...] = (
        ("The comparison used the shapes of --input; the model's own input shapes are unchanged.",)
        if job.request.input
        else ()
    )
    proto = load_message(job.file.path)
    # Neither onnx.checker nor the converters support weights that are stored without their zeros.
    if densify(proto, job.file) and not job.request.sparse:
        notes += ("Zeros that the source does not store are stored: add --sparse to leave them out again.",)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    opset = opset_of(proto)
    if job.request.opset is not None and job.request.opset != opset:
        try:
            proto = require("onnx.version_converter", extra="onnx").convert_version(proto, job.request.opset)
        except Exception as error:
            raise WorkError(
                f"onnx cannot convert {job.file.path} from opset {opset} to {job.request.opset}: {first_line(error)}"
            ) from error
    try:
        return (*notes, *finalize(job, proto, target, metadata=metadata))
    except WorkError as error:
        if reason := checker_error(job.file.path):
            raise InputError(f"{job.file.path} is not valid ONNX: {reason}") from error
        raise


_DTYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, slots=True)
class OnnxRunnable:
    """An onnxruntime session with its inputs."""

    session: OnnxSession
    inputs: tuple[InputSpec, ...]
    is_channels_first: bool = True
    notes: tuple[str, ...] = ()
    runtime: str = "onnxruntime"

    def prepare(self, inputs: tuple[Array, ...]) -> Timed:
        """A function that runs one batch per call."""
        return partial(self.session.run, self._output_names(), self._feeds(inputs))

    def _output_names(self) -> list[str]:
        return [output.name for output in self.session.runtime.get_outputs()]

    def _feeds(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        return {
            spec.name: array.astype(spec.dtype, copy=False) for spec, array in zip(self.inputs, inputs, strict=True)
        }

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """The outputs for one batch."""
        names, feeds = self._output_names(), self._feeds(inputs)
        try:
            values = self.session.run(names, feeds)
        except Exception as error:
            raise UsageError(
                f"the model cannot run: {first_line(error)}", hint="add --data SPEC, so that it runs on real inputs"
            ) from error
        return {name: _output_array(name, value) for name, value in zip(names, values, strict=True)}


def _output_array(name: str, value: Any) -> Array:
    """An output as an array; ai.onnx.ml classifiers give a list of dictionaries, a score per class."""
    if isinstance(value, list) and value and all(isinstance(element, dict) for element in value):
        value = [[row[key] for key in value[0]] for row in value]
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty((), object)
    if array.dtype.kind == "O" and not isinstance(value, np.ndarray):
        raise UsageError(f"the output {name} of the model is not a tensor and cannot be compared")
    return array


def open_runnable(model: ModelFile, origin: LoadOptions) -> OnnxRunnable:
    """Open a session on an ONNX file."""
    try:
        return _open_session(model.path, threads_of(origin) or 1)
    except Exception as error:
        raise InputError(f"onnxruntime cannot load {model.path}: {first_line(error)}") from error


def _open_session(path: Path, threads: int = 1) -> OnnxRunnable:
    """A session; its default of one thread makes sums the same each time."""
    session = OnnxSession(path, num_threads=threads)
    return OnnxRunnable(session, tuple(_input_spec(port) for port in session.runtime.get_inputs()))


def _input_spec(port: Any) -> InputSpec:
    type_name = port.type.removeprefix("tensor(").removesuffix(")")
    shape = None if port.shape is None else tuple(size if isinstance(size, int) else None for size in port.shape)
    return InputSpec(port.name, shape, _DTYPES.get(type_name, type_name))


def runner(job: ExportJob, target: Path) -> Run:
    """A function that runs the result."""
    del job
    try:
        runnable = _open_session(target)
    except Exception as error:
        raise WorkError(f"onnxruntime cannot load the result: {first_line(error)}; nothing was written") from error

    def run(inputs: tuple[Array, ...]) -> dict[str, Array]:
        try:
            return runnable.run(inputs)
        except UsageError as error:
            raise WorkError(f"onnxruntime cannot run the result: {error.message}; nothing was written") from error

    return run
