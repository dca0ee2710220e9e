"""Operators that onnxruntime adds to ONNX and fuses others into, for the inference of shapes, which knows none of them.

In a copy of the graph that is never run, each gets operators of ONNX in its place that make the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.formats.safe_json import require
from prunectl.onnx_graph import STANDARD_DOMAINS, get_attribute, input_of

MICROSOFT = "com.microsoft"
_FLOAT = 1
_LIKE_FIRST = frozenset(
    {
        *("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "RotaryEmbedding", "SimplifiedLayerNormalization"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "GroupQueryAttention"),
    }
)
"""What comes out has the shape of the first input."""
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
    helper = require("onnx.helper", extra="onnx")
    if node.op_type in _LIKE_FIRST:
        if node.op_type == "GroupQueryAttention" and not input_of(node, 1):
            return
        # Not Identity, which would hand on numbers that are the same in every run.
        for name in (node.output[0], *node.output[_SUM : _SUM + 1]):
            if name:
                yield helper.make_node("RandomNormalLike", [node.input[0]], [name])
    elif node.op_type == "MultiHeadAttention" and input_of(node, 2):
        query, key, value = node.input[:3]
        result = node.output[0]
        yield helper.make_node("Transpose", [key], [f"{result}/key"], perm=[0, 2, 1])
        yield helper.make_node("MatMul", [query, f"{result}/key"], [f"{result}/scores"])
        yield helper.make_node("MatMul", [f"{result}/scores", value], [result])
    elif node.op_type == "EmbedLayerNormalization":
        yield helper.make_node("Gather", [node.input[2], node.input[0]], [node.output[0]])
    elif (shape := _weight_shape(node, dims.get(input_of(node, 1), ()))) is not None:
        weight = f"{node.output[0]}/weight"
        graph.input.append(helper.make_tensor_value_info(weight, _FLOAT, shape))
        yield helper.make_node("MatMul", [node.input[0], weight], [node.output[0]])


def _weight_shape(node: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The shape of a matrix that makes the same shape of the first input."""
    if node.op_type == "MatMulNBits":
        return get_attribute(node, "K", 0), get_attribute(node, "N", 0)
    if len(shape) != 2:
        return None
    if node.op_type == "Attention":
        return shape[0], get_attribute(node, "qkv_hidden_sizes", (0, 0, shape[1] // 3))[2]
    is_plain = not any(get_attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if node.op_type in {"FusedMatMul", "FusedGemm"} and is_plain:
        rows, columns = shape
        return (columns, rows) if get_attribute(node, "transB", 0) else (rows, columns)
    return None
