"""ONNX models, as onnxruntime runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError, WorkError, first_line
from prunectl.exporting.job import Job
from prunectl.exporting.live import Flow
from prunectl.exporting.parity import Run
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.optional import require
from prunectl.training.network import Origin

_FATAL = 4
"""What onnxruntime logs by itself; the rest comes as exceptions."""
_TYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, slots=True)
class OnnxLive:
    """A session, and what goes into it."""

    session: Any
    inputs: tuple[Flow, ...]
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


def open_live(model: ModelFile, origin: Origin) -> OnnxLive:
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


def _flow(port: Any) -> Flow:
    kind = port.type.removeprefix("tensor(").removesuffix(")")
    shape = None if port.shape is None else tuple(one if isinstance(one, int) else None for one in port.shape)
    return Flow(port.name, shape, _TYPES.get(kind, kind))


def runner(job: Job, target: Path) -> Run:
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
