"""A model as onnxruntime runs it, with some of its inner values given out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from prunectl.errors import InputError, first_line
from prunectl.formats.base import Array
from prunectl.formats.optional import require
from prunectl.training.onnx.held import Held

_FATAL = 4
"""What onnxruntime logs by itself; the rest comes as exceptions."""


class Session:
    """A graph that is ready to run; what was assigned later is not in it."""

    def __init__(self, held: Held, inner: Collection[str] = ()) -> None:
        self._path = held.model.path
        # Kept alive, as onnxruntime reads the arrays where they lie.
        self._outside = {name: _aligned(array) for name, array in held.outside.items()}
        try:
            self._session = _session(held.proto, inner, self._outside)
        except Exception as error:
            raise InputError(f"{self._path} cannot be loaded by onnxruntime: {first_line(error)}") from error

    def run(self, names: Collection[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return some values for what goes in."""
        try:
            found = self._session.run(list(names), dict(feeds))
        except Exception as error:
            raise InputError(f"{self._path} cannot be run by onnxruntime: {first_line(error)}") from error
        for name, value in zip(names, found, strict=True):
            if not isinstance(value, np.ndarray):
                raise InputError(f"{self._path} cannot be used: its value {name!r} is not an array of numbers")
        return dict(zip(names, found, strict=True))


def _session(proto: Any, inner: Collection[str], outside: Mapping[str, Array]) -> Any:
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL
    # Else each weight would be kept once more, in the order of some kernel, after every assignment anew.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if inner:
        # A value that is given out stands at the same place whatever is optimised; building is faster without.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if outside:
        values = [runtime.OrtValue.ortvalue_from_numpy(array) for array in outside.values()]
        options.add_external_initializers(list(outside), values)
    message = with_outputs(proto, inner).SerializeToString()
    return runtime.InferenceSession(message, options, providers=["CPUExecutionProvider"])


def with_outputs(proto: Any, names: Iterable[str]) -> Any:
    """Return a copy of a message whose graph gives some inner values out as well."""
    found = type(proto)()
    found.CopyFrom(proto)
    known = {port.name for port in proto.graph.output}
    for name in names:
        if name not in known:
            found.graph.output.add().name = name
    return found


def _aligned(array: Array) -> Array:
    return np.require(array, requirements=["C", "A"])
