"""An ONNX model in onnxruntime, on the processor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.formats.base import Array
from prunectl.formats.safe_json import require
from prunectl.graphs.onnx.nodes import copy_message
from prunectl.graphs.onnx.tensors import OnnxNetwork

_FATAL = 4
"""The severity from which onnxruntime logs; the rest comes as exceptions."""


class OnnxSession:
    """A graph that is ready to run, some of its inner values among its outputs; whatever onnxruntime raises passes."""

    def __init__(
        self,
        source: OnnxNetwork | Path,
        observed: Iterable[str] = (),
        *,
        num_threads: int = 0,
        is_optimized: bool = True,
        is_prepacked: bool = True,
    ) -> None:
        runtime = require("onnxruntime", extra="onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = num_threads
        if not is_optimized:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not is_prepacked:
            options.add_session_config_entry("session.disable_prepacking", "1")
        model: str | bytes = str(source)
        # Kept alive, as onnxruntime reads the arrays where they lie.
        self._outside: dict[str, Array] = {}
        if isinstance(source, OnnxNetwork):
            outside = source.outside.items()
            self._outside = {name: np.require(array, requirements=["C", "A"]) for name, array in outside}
            types = {tensor.name: tensor.data_type for tensor in source.proto.graph.initializer}
            as_value = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
            values = [as_value(array, types[name]) for name, array in self._outside.items()]
            if values:
                options.add_external_initializers(list(self._outside), values)
            model = _with_outputs(source.proto, observed).SerializeToString()
        self.runtime = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, names: Collection[str], feeds: Mapping[str, Array]) -> list[Any]:
        """Some values for what goes in."""
        values: list[Any] = self.runtime.run(list(names), dict(feeds))
        return values


def _with_outputs(proto: Any, names: Iterable[str]) -> Any:
    """A copy of a message whose graph gives some inner values out as well."""
    copy = copy_message(proto)
    known = {port.name for port in proto.graph.output}
    for name in names:
        if name not in known:
            copy.graph.output.add().name = name
    return copy
