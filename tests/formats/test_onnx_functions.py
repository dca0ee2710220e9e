"""Weights that an ONNX model gives to functions of its own: they are what they are once the functions are inlined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.calibration.reconstruct import bias_of
from prunectl.formats.base import ModelFile, Role, Tensor
from prunectl.formats.registry import open_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
inliner = pytest.importorskip("onnx.inliner")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]


def call(name: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(name, inputs.split(), [output], domain="own", **attributes)


def referring(kind: str, inputs: str, output: str, attribute: str, code: int) -> Any:
    """A node with an attribute that stands for the one of the same name of the call."""
    node = helper.make_node(kind, inputs.split(), [output])
    node.attribute.add(name=attribute, ref_attr_name=attribute, type=code)
    return node


def function(name: str, inputs: str, output: str, nodes: list[Any], *settings: str, **defaults: Any) -> Any:
    given = [helper.make_attribute(*pair) for pair in defaults.items()]
    return helper.make_function("own", name, inputs.split(), [output], nodes, OPSETS, list(settings), given)


def saved(folder: Path, calls: list[Any], functions: list[Any], **shapes: tuple[int, ...]) -> Path:
    held = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("N", "M")) for name in "xy"]
    graph = helper.make_graph(calls, "g", ports[:1], ports[1:], held)
    made = helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=10)
    onnx.save(made, folder / "m.onnx")
    onnx.save(inliner.inline_local_functions(made), folder / "inlined.onnx")
    return folder / "m.onnx"


def purposes(path: Path) -> dict[str, Any]:
    return {tensor.name: (tensor.role, tensor.out_axis, tensor.reduction_axis) for tensor in open_model(path).tensors}


def biases(model: ModelFile) -> dict[str, str]:
    pairs: list[tuple[Tensor, Tensor | None]] = [(tensor, bias_of(model, tensor)) for tensor in model.tensors]
    return {tensor.name: bias.name for tensor, bias in pairs if bias is not None and tensor.role is Role.KERNEL}


GEMM = referring("Gemm", "a b c", "o", "transB", onnx.AttributeProto.INT)
GIVEN = function("F", "a b c", "o", [GEMM], "transB")
DEFAULT = function("F", "a b c", "o", [GEMM], transB=1)
HANDED = function("G", "a b c", "o", [referring("F", "a b c", "o", "transB", onnx.AttributeProto.INT)], transB=1)
HANDED.node[0].domain = "own"
TURNED = function("F", "b", "o", [referring("Transpose", "b", "o", "perm", onnx.AttributeProto.INTS)], "perm")
PRODUCT = function("P", "a b", "c", [helper.make_node("MatMul", ["a", "b"], ["c"])])
BLOCK = function(
    "B", "a w v b", "o", [call("P", "a w", "h"), helper.make_node("Gemm", ["h", "v", "b"], ["o"], transB=1)]
)
MATRIX, VECTOR = (8, 8), (8,)


@pytest.mark.parametrize(
    ("calls", "functions"),
    [
        ([call("F", "x w b", "y", transB=1)], [GIVEN]),
        ([call("F", "w", "t", perm=[1, 0]), helper.make_node("Gemm", ["x", "t", "b"], ["y"])], [TURNED]),
        ([call("F", "w", "t", perm=[0, 1]), helper.make_node("Gemm", ["x", "t", "b"], ["y"])], [TURNED]),
        ([call("B", "x v w b", "z"), call("P", "v z", "y")], [PRODUCT, BLOCK]),
    ],
    ids=["given", "turned", "not turned", "nested"],
)
def test_a_weight_that_a_function_is_given_is_what_it_is_inlined(
    calls: list[Any], functions: list[Any], tmp_path: Path
) -> None:
    path = saved(tmp_path, calls, functions, w=MATRIX, v=MATRIX, b=VECTOR)
    assert purposes(path) == purposes(tmp_path / "inlined.onnx")
    assert purposes(path)["w"][0] is Role.KERNEL


@pytest.mark.parametrize(
    ("calls", "functions"),
    [
        ([call("F", "x w b", "y")], [DEFAULT]),
        ([call("F", "x w b", "y", transB=0)], [DEFAULT]),
        ([call("F", "x w b", "y")], [GIVEN]),
        ([call("G", "x w b", "y")], [GIVEN, HANDED]),
        ([call("G", "x w b", "y", transB=0)], [GIVEN, HANDED]),
    ],
    ids=["default", "over default", "neither", "handed on", "handed on over default"],
)
def test_what_a_call_leaves_out_is_what_the_function_says(
    calls: list[Any], functions: list[Any], tmp_path: Path
) -> None:
    """As onnxruntime has it: what inlines functions for onnx forgets their defaults."""
    path = saved(tmp_path, calls, functions, w=(8, 4), b=(1,))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.ones((2, open_model(path).tensors[0].shape[purposes(path)["w"][2]]), np.float32)
    assert session.run(None, {"x": x})[0].shape == (2, 12 - x.shape[1])


def test_overloads_of_a_function_are_told_apart(tmp_path: Path) -> None:
    plain = function("F", "a b", "o", [helper.make_node("Gemm", ["a", "b"], ["o"])])
    turned = function("F", "a b", "o", [helper.make_node("Gemm", ["a", "b"], ["o"], transB=1)])
    calls = [call("F", "x w", "h"), call("F", "h v", "y")]
    plain.overload, turned.overload = "plain", "turned"
    calls[0].overload, calls[1].overload = "turned", "plain"
    path = saved(tmp_path, calls, [plain, turned], w=MATRIX, v=MATRIX)
    assert purposes(path) == {"w": (Role.KERNEL, 0, 1), "v": (Role.KERNEL, 1, 0)}
    assert open_model(path).about.code == ()


def test_an_axis_that_depends_on_an_unknown_call_is_not_guessed(tmp_path: Path) -> None:
    held = numpy_helper.from_array(np.ones(MATRIX, np.float32))
    constant = helper.make_node("Constant", [], ["b"], value=held)
    path = saved(tmp_path, [call("F", "x v", "y", transB=1)], [function("F", "a c", "o", [constant, GEMM], "transB")])
    assert purposes(path) == {"F/b": (Role.KERNEL, None, None)}


def test_a_weight_that_a_function_does_nothing_with_is_used_all_the_same(tmp_path: Path) -> None:
    passing = function("F", "b", "o", [helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Relu", ["c"], ["o"])])
    ignoring = function("G", "a b", "o", [helper.make_node("Relu", ["a"], ["o"])])
    path = saved(tmp_path, [call("F", "w", "t"), call("G", "x v", "y")], [passing, ignoring], w=MATRIX, v=MATRIX)
    assert [tensor.kind for tensor in open_model(path).tensors] == ["Relu", "G"]
    assert open_model(path).about.notes == ()


def test_each_call_of_a_function_is_a_layer_with_a_bias_of_its_own(tmp_path: Path) -> None:
    """The nodes of functions may be called like those around them."""
    inner = function("F", "a b c", "o", [helper.make_node("Gemm", ["a", "b", "c"], ["o"])])
    calls = [call("F", "x w b", "h"), call("F", "h v c", "i"), helper.make_node("Gemm", ["i", "u", "d"], ["o"])]
    shapes = {**dict.fromkeys("wvu", MATRIX), **dict.fromkeys("bcd", VECTOR)}
    path = saved(tmp_path, [*calls, helper.make_node("Relu", ["o"], ["y"])], [inner], **shapes)
    found = open_model(path)
    assert biases(found) == biases(open_model(tmp_path / "inlined.onnx")) == {"w": "b", "v": "c", "u": "d"}
    assert {tensor.name: tensor.layer for tensor in found.tensors if tensor.name in "wvu"} == {
        "w": "h/o",
        "v": "i/o",
        "u": "o",
    }
