"""TensorFlow to ONNX, by tf2onnx with handlers for operators that it lacks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import WorkError
from prunectl.exporting import onnx_canonical, onnx_finish
from prunectl.exporting.job import ExportJob
from prunectl.exporting.tensorflow import TfRunnable
from prunectl.formats.safe_json import require
from prunectl.training.keras.backend import load_keras2
from prunectl.training.keras.load import error_line
from prunectl.training.quiet import ignore_warnings

Handler = Callable[[Any, Any, str, Any], None]


def _erfc(graph: Any, node: Any, name: str, _: Any) -> None:
    """Handler for Erfc, as in GELU: erfc(x) = 1 - erf(x)."""
    dtype = graph.get_dtype(node.output[0])
    erf = graph.make_node("Erf", [node.input[0]], dtypes=[dtype], shapes=[graph.get_shape(node.output[0])])
    ones = graph.make_const(f"{name}/one", np.array(1.0, np.float32))
    node.type, node.domain = "Sub", ""
    graph.replace_inputs(node, [ones.output[0], erf.output[0]])


HANDLERS: Mapping[str, tuple[Handler, list[str]]] = {"Erfc": (_erfc, [])}


_tf = load_keras2().tensorflow
OPSET = 18


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an ONNX model, its weights named as in the source where they can be matched."""
    tf2onnx = require("tf2onnx", extra="export")
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)
    runnable: TfRunnable = job.runnable

    def called(*arguments: Any) -> list[Any]:
        return runnable.call(arguments)

    function = _tf.function(called)
    try:
        with ignore_warnings():
            proto, _ = tf2onnx.convert.from_function(
                function,
                input_signature=runnable.specs(job.inputs),
                opset=job.request.opset or OPSET,
                custom_op_handlers=HANDLERS,
            )
    except Exception as error:
        raise WorkError(
            f"tf2onnx cannot convert {job.file.path}: {error_line(error)}",
            hint="another --opset may know the operator",
        ) from error
    _check_operators(job, proto)
    inputs = [flow.name for flow in job.inputs]
    onnx_canonical.canonical_names(proto, job.file, inputs, runnable.output_names)
    return onnx_finish.finalize(job, proto, target)


def _check_operators(job: ExportJob, proto: Any) -> None:
    """Refuse operators of TensorFlow that tf2onnx has left in the graph."""
    defs = require("onnx.defs", extra="onnx")
    unknown = [node for node in proto.graph.node if node.domain in {"", "ai.onnx"} and not defs.has(node.op_type)]
    if unknown:
        operators = ", ".join(dict.fromkeys(f"{node.op_type} ({node.name})" for node in unknown[:5]))
        raise WorkError(f"tf2onnx has no way for operators of {job.file.path}: {operators}; nothing was written")
