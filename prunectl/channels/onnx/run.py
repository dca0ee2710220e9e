"""Running an ONNX message on random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prunectl.errors import WorkError, first_line
from prunectl.formats.base import Array
from prunectl.formats.optional import require
from prunectl.training.onnx.session import with_outputs

_MAX_MESSAGE_BYTES = (1 << 31) - 1
_FATAL = 4
_FLOATS = {1: np.float32, 10: np.float16, 11: np.float64}
_WHOLE = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_, 12: np.uint32}
"""Types of element, by their numbers in the format."""


def session(proto: Any, shown: Sequence[str]) -> Any:
    """Return a message in onnxruntime, some inner values among its outputs."""
    runtime = require("onnxruntime", extra="onnx")
    if proto.ByteSize() > _MAX_MESSAGE_BYTES:
        raise WorkError("a network of more than 2 GB cannot be proved to be the same, and is not cut")
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL
    try:
        message = with_outputs(proto, shown).SerializeToString()
        return runtime.InferenceSession(message, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise WorkError(
            f"the network cannot be loaded by onnxruntime: {first_line(error)}; nothing was written"
        ) from error


def feed(port: Any, shape: Sequence[int], random: np.random.Generator) -> Array:
    """Return random numbers for an input of a message."""
    kind = port.type.tensor_type.elem_type
    if kind in _FLOATS:
        return random.standard_normal(shape).astype(_FLOATS[kind])
    if kind not in _WHOLE:
        raise WorkError(f"the network takes an input, {port.name}, of which nothing random can be made")
    # Small enough for any table of words.
    return random.integers(0, 2, shape).astype(_WHOLE[kind])
