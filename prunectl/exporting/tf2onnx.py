"""From TensorFlow to ONNX, by tf2onnx."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import WorkError
from prunectl.exporting import onnx_finish, onnx_order
from prunectl.exporting.job import ExportJob
from prunectl.exporting.tensorflow import TfRunnable
from prunectl.formats.safe_json import require
from prunectl.training.keras.backend import keras_two, quietly
from prunectl.training.keras.load import first_line

Handler = Callable[[Any, Any, str, Any], None]


def _erfc(graph: Any, node: Any, name: str, _: Any) -> None:
    """Make erfc(x) of GELU into 1 - erf(x)."""
    dtype = graph.get_dtype(node.output[0])
    erf = graph.make_node("Erf", [node.input[0]], dtypes=[dtype], shapes=[graph.get_shape(node.output[0])])
    one = graph.make_const(f"{name}/one", np.array(1.0, np.float32))
    node.type, node.domain = "Sub", ""
    graph.replace_inputs(node, [one.output[0], erf.output[0]])


HANDLERS: Mapping[str, tuple[Handler, list[str]]] = {"Erfc": (_erfc, [])}


_tf = keras_two().tensorflow
OPSET = 18


def write(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write an ONNX model, its weights named as in the source where they can be told."""
    tf2onnx = require("tf2onnx", extra="export")
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)
    live: TfRunnable = job.live

    def called(*given: Any) -> list[Any]:
        return live.call(given)

    function = _tf.function(called)
    try:
        with quietly():
            proto, _ = tf2onnx.convert.from_function(
                function,
                input_signature=live.specs(job.flows),
                opset=job.request.opset or OPSET,
                custom_op_handlers=HANDLERS,
            )
    except Exception as error:
        raise WorkError(
            f"tf2onnx cannot convert {job.file.path}: {first_line(error)}",
            hint="another --opset may know the operator",
        ) from error
    _check_operators(job, proto)
    inputs = [flow.name for flow in job.flows]
    onnx_order.canonical_names(proto, job.file, inputs, live.answers)
    return onnx_finish.finish(job, proto, target)


def _check_operators(job: ExportJob, proto: Any) -> None:
    """Name what tf2onnx has left as it was."""
    defs = require("onnx.defs", extra="onnx")
    unknown = [node for node in proto.graph.node if node.domain in {"", "ai.onnx"} and not defs.has(node.op_type)]
    if unknown:
        named = ", ".join(dict.fromkeys(f"{node.op_type} ({node.name})" for node in unknown[:5]))
        raise WorkError(f"tf2onnx has no way for operators of {job.file.path}: {named}; nothing was written")
