"""How much ONNX graphs calculate, against counts made by hand and shapes inferred by onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from prunectl.formats.base import Operation
from prunectl.formats.onnx import messages
from prunectl.formats.onnx.flops import Shapes, operations
from prunectl.formats.onnx.messages import parsing
from prunectl.formats.onnx.tensors import TensorLocator
from prunectl.formats.registry import open_model

OPSET = [helper.make_opsetid("", 17)]


def kernel(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def numbers(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def save(
    path: Path, nodes: list[onnx.NodeProto], shape: list[Any] | None, initializers: list[TensorProto], **more: Any
) -> Path:
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, at) for name, at in (("x", shape), ("y", None))]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=OPSET, ir_version=8, **more), path)
    return path


def count(path: Path) -> tuple[Operation, ...]:
    return operations(open_model(path))


def node(op: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), ["y"], "op", **attributes)


@pytest.mark.parametrize(
    ("operation", "shape", "weights", "macs"),
    [
        (node("Conv", "x", "w"), [1, 3, 8, 8], [kernel("w", 4, 3, 3, 3)], 4 * 6 * 6 * 27),
        (node("Conv", "x", "w"), ["batch", 3, 8, 8], [kernel("w", 4, 3, 3, 3)], 4 * 6 * 6 * 27),
        (
            node("Conv", "x", "w", pads=[1] * 4, strides=[2, 2]),
            [2, 3, 8, 8],
            [kernel("w", 4, 3, 3, 3)],
            2 * 4 * 16 * 27,
        ),
        (node("Conv", "x", "w", group=3), [1, 3, 8, 8], [kernel("w", 3, 1, 3, 3)], 3 * 36 * 9),
        (node("Conv", "x", "w", dilations=[2]), [1, 3, 8], [kernel("w", 4, 3, 3)], 4 * 4 * 9),
        (node("Conv", "x", "w", auto_pad="SAME_UPPER"), [1, 3, 8, 8], [kernel("w", 4, 3, 3, 3)], 4 * 64 * 27),
        (node("ConvTranspose", "x", "w"), [1, 3, 8, 8], [kernel("w", 3, 4, 2, 2)], 3 * 64 * 16),
        (node("Gemm", "x", "w"), [5, 3], [kernel("w", 3, 4)], 5 * 3 * 4),
        (node("Gemm", "x", "w", transB=1), [None, 3], [kernel("w", 4, 3)], 3 * 4),
        (node("MatMul", "x", "w"), [2, 7, 3], [kernel("w", 3, 4)], 2 * 7 * 3 * 4),
    ],
)
def test_the_multiplications_of_an_operation_are_those_counted_by_hand(
    tmp_path: Path, operation: onnx.NodeProto, shape: list[Any], weights: list[TensorProto], macs: int
) -> None:
    path = save(tmp_path / "m.onnx", [operation], shape, weights)
    assert count(path) == (Operation("op", operation.op_type, macs, "w"),)


@pytest.mark.parametrize(("cell", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_recurrent_layer_multiplies_by_both_its_kernels_at_each_step(tmp_path: Path, cell: str, gates: int) -> None:
    weights = [kernel("w", 1, gates * 5, 3), kernel("r", 1, gates * 5, 5)]
    path = save(tmp_path / "m.onnx", [node(cell, "x", "w", "r", hidden_size=5)], [7, 2, 3], weights)
    assert count(path) == (
        Operation("op", cell, 7 * 2 * gates * 15, "w"),
        Operation("op", cell, 7 * 2 * gates * 25, "r"),
    )


def test_a_weight_is_found_behind_what_hands_it_on(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"], "op")]
    path = save(tmp_path / "m.onnx", nodes, [1, 3], [kernel("w", 4, 3)])
    assert count(path) == (Operation("op", "MatMul", 12, "w"),)


def test_operations_of_unknown_shape_or_in_branches_have_no_count(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["b"], "product")],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "open"),
        helper.make_node("If", ["c"], ["y"], "choice", then_branch=inner, else_branch=inner),
    ]
    assert count(save(tmp_path / "m.onnx", nodes, [1, "length", 3], [kernel("w", 3, 4)])) == (
        Operation("open", "MatMul", None, "w"),
        Operation("choice/else_branch/product", "MatMul", None, "w"),
        Operation("choice/then_branch/product", "MatMul", None, "w"),
    )


def test_shapes_that_the_file_tells_serve_where_a_foreign_operation_stands(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Magic", ["x"], ["h"], domain="com.acme"),
        helper.make_node("MatMul", ["h", "w"], ["y"], "op"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [1, 3], [kernel("w", 3, 4)])
    assert count(path)[0].macs is None
    model = onnx.load(path)
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [6, 3]))
    onnx.save(model, path)
    assert count(path)[0].macs == 6 * 3 * 4


def chain(*steps: tuple[str, list[str], dict[str, Any]]) -> list[onnx.NodeProto]:
    """Nodes each of which takes what the one before made, written as `-`."""
    nodes, last = [], "x"
    for number, (op, inputs, attributes) in enumerate(steps):
        names = [last if name == "-" else name for name in inputs]
        last = f"v{number}"
        nodes.append(helper.make_node(op, names, [last], **attributes))
    return nodes


def test_shapes_are_those_that_onnx_infers(tmp_path: Path) -> None:
    nodes = chain(
        ("Pad", ["-", "pads"], {}),
        ("Conv", ["-", "w"], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("BatchNormalization", ["-", "c", "c", "c", "c"], {}),
        ("MaxPool", ["-"], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        ("AveragePool", ["-"], {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}),
        ("ConvTranspose", ["-", "t"], {"strides": [2, 2], "output_padding": [1, 1], "pads": [1, 1, 1, 1]}),
        ("Resize", ["-", "", "scales"], {}),
        ("DepthToSpace", ["-"], {"blocksize": 2}),
        ("SpaceToDepth", ["-"], {"blocksize": 2}),
        ("Transpose", ["-"], {"perm": [0, 2, 3, 1]}),
        ("Slice", ["-", "starts", "ends", "axes"], {}),
        ("Concat", ["-", "-"], {"axis": -1}),
        ("Reshape", ["-", "shape"], {}),
        ("Unsqueeze", ["-", "axes"], {}),
        ("Tile", ["-", "times"], {}),
        ("ReduceMean", ["-"], {"axes": [1], "keepdims": 0}),
        ("Gather", ["-", "indices"], {"axis": 1}),
        ("Squeeze", ["-", "axes"], {}),
        ("Expand", ["-", "wide"], {}),
        ("Add", ["-", "row"], {}),
        ("Flatten", ["-"], {"axis": 2}),
        ("MatMul", ["-", "row"], {}),
    )
    path = save(
        tmp_path / "m.onnx",
        nodes,
        [1, 3, 30, 31],
        [
            *(
                kernel("w", 8, 3, 3, 3),
                kernel("c", 8),
                kernel("t", 8, 8, 3, 3),
                kernel("scales", 4),
                kernel("row", 16, 1),
            ),
            *(numbers("pads", 0, 0, 1, 1, 0, 0, 1, 1), numbers("starts", 1), numbers("ends", -1), numbers("axes", 1)),
            *(
                numbers("shape", 0, -1, 4),
                numbers("times", 1, 2, 1, 1),
                numbers("indices", 0),
                numbers("wide", 2, 1, 1),
            ),
        ],
    )
    inferred = shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    expected = {
        value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in inferred.graph.value_info
    }
    assert len(expected) >= 10
    with parsing(path) as reader:
        graph = messages.graph(reader, messages.model(reader).graph)
        shapes = Shapes(reader, TensorLocator(path), graph)
        assert {name: shapes.of(name) for name in expected} == expected


def test_shapes_that_a_graph_computes_are_followed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "zero"], ["first"]),
        helper.make_node("Slice", ["s", "one", "three"], ["rest"]),
        helper.make_node("ReduceProd", ["rest"], ["all"]),
        helper.make_node("Div", ["all", "two"], ["half"]),
        helper.make_node("Mul", ["first", "two"], ["twice"]),
        helper.make_node("Concat", ["twice", "half"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["y"], "op"),
    ]
    constants = [numbers("zero", 0), numbers("one", 1), numbers("two", 2), numbers("three", 3)]
    path = save(tmp_path / "m.onnx", nodes, ["n", 3, 8], [*constants, kernel("w", 12, 5)])
    assert count(path)[0].macs == 2 * 12 * 5


@pytest.mark.parametrize(
    "nodes",
    [
        chain(("Concat", ["-", "-"], {"axis": 7})),
        chain(("Transpose", ["-"], {"perm": [9, 9, 9]})),
        chain(("Reshape", ["-", "bad"], {})),
        chain(("Conv", ["-", "w"], {"strides": [0, 0]})),
        chain(("Conv", ["-", "w"], {"strides": [1]})),
        chain(("SpaceToDepth", ["-"], {"blocksize": 0})),
        chain(("LSTM", ["-", "w", "w"], {})),
        chain(("Gemm", ["-"], {})),
        chain(("Split", ["-", "bad"], {"axis": 1})),
        chain(("Add", [], {})),
        chain(("Slice", ["-", "bad", "bad", "bad", "zero"], {})),
        chain(*[("Concat", ["-", "-"], {"axis": 1})] * 200),
    ],
    ids=lambda nodes: nodes[0].op_type + str(len(nodes)),
)
def test_nonsense_has_no_shape_and_does_no_harm(tmp_path: Path, nodes: list[onnx.NodeProto]) -> None:
    tail = helper.make_node("Conv", [nodes[-1].output[0], "w"], ["y"], "op")
    constants = [numbers("bad", -7, 99, 5), numbers("zero", 0, 0, 0), kernel("w", 4, 3, 3, 3)]
    path = save(tmp_path / "m.onnx", [*nodes, tail], [1, 3, 8, 8], constants)
    assert count(path)[-1] == Operation("op", "Conv", None, "w")
