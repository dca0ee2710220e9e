"""What goes into an ONNX graph and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.formats.onnx.dtypes import CODES
from prunectl.training.data.source import Arrays, each
from prunectl.training.ending import Ending
from prunectl.training.signature import Port, Signature

Shape = tuple[int | None, ...]


def signature(graph: Any) -> Signature:
    """Return the ports of a graph, without the axis that counts the examples."""
    makers = {name: node for node in graph.node for name in node.output}
    outputs = tuple(replace(_port(port), ending=_ending(makers, port.name)) for port in graph.output)
    return Signature(tuple(map(_port, graph.input)), outputs, is_channels_first=True)


_PASSED_ON = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast"})
_ENDINGS = {"Softmax": Ending.SOFTMAX, "LogSoftmax": Ending.LOG_SOFTMAX, "Sigmoid": Ending.SIGMOID}
_RAW = frozenset({"Gemm", "MatMul", "Conv", "Add", "Relu", "BatchNormalization", "Tanh", "GlobalAveragePool"})


def _ending(makers: Mapping[str, Any], name: str) -> Ending:
    """The last activation, by the node that makes an output; unknown where that does not tell."""
    for _ in range(len(makers)):
        node = makers.get(name)
        if node is None or not node.input or node.op_type not in _PASSED_ON:
            break
        name = node.input[0]
    kind = node.op_type if (node := makers.get(name)) is not None else ""
    return _ENDINGS.get(kind, Ending.RAW if kind in _RAW else Ending.UNKNOWN)


def piece(graph: Any) -> int | None:
    """Return how many examples go in at a time, if it is always the same number."""
    shapes = [_shape(port) for port in graph.input]
    sizes = {shape[0] if shape else None for shape in shapes}
    return next(iter(sizes)) if len(sizes) == 1 else None


def feeds(graph: Any, x: Arrays, *, is_any_count: bool) -> dict[str, Array]:
    """Return what is given to each input, refused if it does not fit."""
    arrays = each(x)
    if len(arrays) != len(graph.input):
        raise UsageError(f"the model takes {len(graph.input)} inputs, and {len(arrays)} are given")
    return {
        port.name: _fed(port, np.asarray(array), is_any_count=is_any_count)
        for port, array in zip(graph.input, arrays, strict=True)
    }


def _fed(port: Any, array: Array, *, is_any_count: bool) -> Array:
    shape = _shape(port)
    if shape is not None:
        expected = (None, *shape[1:]) if is_any_count else shape
        if not _fits(array.shape, expected):
            given, wanted = _text(array.shape), _text(expected)
            raise UsageError(f"the input {port.name!r} of the model has the shape {wanted}, and {given} is given")
    code = CODES.get(port.type.tensor_type.elem_type)
    if code is None or array.dtype == code.dtype:
        return array
    if not np.can_cast(array.dtype, code.dtype, "same_kind"):
        raise UsageError(f"the input {port.name!r} of the model is {code.dtype}, and {array.dtype} is given")
    return array.astype(code.dtype)


def _fits(shape: Sequence[int], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        wanted in {None, length} for length, wanted in zip(shape, expected, strict=True)
    )


def _port(port: Any) -> Port:
    shape, code = _shape(port), CODES.get(port.type.tensor_type.elem_type)
    return Port(port.name, shape[1:] if shape else None, "" if code is None else code.dtype.name)


def _shape(port: Any) -> Shape | None:
    """Return the shape with the axis of the examples; None if it is unknown."""
    kind = port.type.tensor_type
    if not port.type.HasField("tensor_type") or not kind.HasField("shape"):
        return None
    return tuple(
        axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None for axis in kind.shape.dim
    )


def _text(shape: Shape) -> str:
    return "x".join("?" if length is None else str(length) for length in shape) or "()"
