"""Operators that onnxruntime adds to ONNX and fuses others into, for the inference of shapes, which knows none of them.

In a copy of the graph that is never run, each gets operators of ONNX in its place that make the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.formats.budgets import MAX_ELEMENTS
from prunectl.formats.safe_json import require
from prunectl.onnx_graph import STANDARD_DOMAINS, get_attribute, input_of, output_of

MICROSOFT = "com.microsoft"
_FLOAT = 1
_LIKE_FIRST = frozenset(
    {
        *("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "RotaryEmbedding", "SimplifiedLayerNormalization"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    }
)
"""What comes out has the shape of the first input."""
_NEEDED = {"MultiHeadAttention": (0, 1, 2), "EmbedLayerNormalization": (0, 2)}
"""Inputs that the shape follows from, where they are not the first alone."""
_ACTIVATION = frozenset({"activation", "activation_params"})
_SUM = 3
"""Output of a norm with a skip: what it adds up."""


def replace_fused(graph: Any, dims: Mapping[str, tuple[int, ...]]) -> None:
    """Put operators of ONNX in the place of those that are fused; ``dims`` are the shapes of the weights."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        is_fused = node.domain == MICROSOFT or (
            node.domain in STANDARD_DOMAINS and node.op_type == "SimplifiedLayerNormalization"
        )
        graph.node.extend((is_fused and list(_stand_ins(graph, node, dims))) or [node])


def _stand_ins(graph: Any, node: Any, dims: Mapping[str, tuple[int, ...]]) -> Iterator[Any]:
    """Yield what makes the same shapes; nothing for a node that lacks what its operator needs."""
    helper = require("onnx.helper", extra="onnx")
    result = output_of(node, 0)
    if not result or not all(input_of(node, position) for position in _NEEDED.get(node.op_type, (0,))):
        return
    if node.op_type in _LIKE_FIRST:
        # Not Identity, which would hand on numbers that are the same in every run.
        for name in filter(None, (result, output_of(node, _SUM))):
            yield helper.make_node("RandomNormalLike", [node.input[0]], [name])
    elif node.op_type == "MultiHeadAttention":
        query, key, value = node.input[:3]
        yield helper.make_node("Transpose", [key], [f"{result}/key"], perm=[0, 2, 1])
        yield helper.make_node("MatMul", [query, f"{result}/key"], [f"{result}/scores"])
        yield helper.make_node("MatMul", [f"{result}/scores", value], [result])
    elif node.op_type == "EmbedLayerNormalization":
        yield helper.make_node("Gather", [node.input[2], node.input[0]], [result])
    elif node.op_type == "FusedConv" and input_of(node, 1):
        convolution = helper.make_node("Conv", node.input[:2], [result])
        convolution.attribute.extend(given for given in node.attribute if given.name not in _ACTIVATION)
        yield convolution
    elif (shape := _weight_shape(node, dims.get(input_of(node, 1), ()))) is not None:
        weight = f"{result}/weight"
        graph.input.append(helper.make_tensor_value_info(weight, _FLOAT, shape))
        yield helper.make_node("MatMul", [node.input[0], weight], [result])


def _weight_shape(node: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The shape of a matrix that makes the same shape of the first input; None if its attributes do not say one."""
    rows, columns = shape if len(shape) == 2 else (0, 0)
    if node.op_type == "MatMulNBits":
        rows, columns = get_attribute(node, "K", 0), get_attribute(node, "N", 0)
    elif node.op_type == "Attention":
        sizes = get_attribute(node, "qkv_hidden_sizes", (columns // 3,) * 3)
        columns = sizes[2] if isinstance(sizes, tuple) and len(sizes) == 3 else 0
    elif node.op_type in {"FusedMatMul", "FusedGemm"}:
        if any(get_attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
            return None
        if get_attribute(node, "transB", 0):
            rows, columns = columns, rows
    else:
        return None
    return (
        (rows, columns) if all(isinstance(size, int) and 0 < size <= MAX_ELEMENTS for size in (rows, columns)) else None
    )
