"""From TensorFlow to ONNX, by tf2onnx."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError
from prunectl.exporting import onnx_finish, onnx_names
from prunectl.exporting.job import Job
from prunectl.exporting.tf2onnx_more import HANDLERS
from prunectl.exporting.tf_live import TfLive
from prunectl.formats.optional import require
from prunectl.training.keras.library import keras_two, quietly
from prunectl.training.keras.loading import first_line

_tf = keras_two().tensorflow
OPSET = 18


def write(job: Job, target: Path) -> tuple[str, ...]:
    """Write an ONNX model, its weights named as in the source where they can be told."""
    tf2onnx = require("tf2onnx", extra="export")
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)
    live: TfLive = job.live

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
    onnx_names.rename(proto, job.file, inputs, live.answers)
    return onnx_finish.finish(job, proto, target)


def _check_operators(job: Job, proto: Any) -> None:
    """Name what tf2onnx has left as it was."""
    defs = require("onnx.defs", extra="onnx")
    unknown = [node for node in proto.graph.node if node.domain in {"", "ai.onnx"} and not defs.has(node.op_type)]
    if unknown:
        named = ", ".join(dict.fromkeys(f"{node.op_type} ({node.name})" for node in unknown[:5]))
        raise WorkError(f"tf2onnx has no way for operators of {job.file.path}: {named}; nothing was written")
