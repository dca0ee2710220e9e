"""Operators of TensorFlow that tf2onnx does not know, each said in those that ONNX has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Handler = Callable[[Any, Any, str, Any], None]


def _erfc(graph: Any, node: Any, name: str, _: Any) -> None:
    """Make erfc(x) of GELU into 1 - erf(x)."""
    dtype = graph.get_dtype(node.output[0])
    erf = graph.make_node("Erf", [node.input[0]], dtypes=[dtype], shapes=[graph.get_shape(node.output[0])])
    one = graph.make_const(f"{name}/one", np.array(1.0, np.float32))
    node.type, node.domain = "Sub", ""
    graph.replace_inputs(node, [one.output[0], erf.output[0]])


HANDLERS: Mapping[str, tuple[Handler, list[str]]] = {"Erfc": (_erfc, [])}
