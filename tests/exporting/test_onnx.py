"""ONNX to ONNX with fewer bits: old versions, weights that are inputs too, and weights without their zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prunectl.errors import InputError, UsageError
from tests.contract import Array
from tests.exporting.exporting import by_onnxruntime, export, random

NUMBERS = np.random.default_rng(0)
KERNELS: dict[str, Array] = {
    "conv": NUMBERS.standard_normal((6, 3, 3, 3)).astype(np.float32),
    "dense": np.where(NUMBERS.random((6, 32)) < 0.1, NUMBERS.standard_normal((6, 32)), 0).astype(np.float32),
}


def model(path: Path, opset: int, *, lists_weights: bool = False) -> Path:
    """A convolution, a pool and a dense layer; old writers list their weights as inputs too."""
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "dense"], ["y"]),
    ]
    kernels = [numpy_helper.from_array(array, name) for name, array in KERNELS.items()]
    shapes: dict[str, tuple[int | str, ...]] = {"x": ("batch", 3, 8, 8)}
    if lists_weights:
        shapes |= {name: array.shape for name, array in KERNELS.items()}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", 32))
    graph = helper.make_graph(nodes, "graph", inputs, [output], kernels)
    version = 3 if lists_weights else 8
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version), path)
    return path


@pytest.mark.parametrize(("option", "opset", "kind"), [("half", 9, 10), ("bf16", 13, 16)])
def test_weights_that_are_inputs_too_become_smaller_constants(
    option: str, opset: int, kind: int, tmp_path: Path
) -> None:
    source = model(tmp_path / "old.onnx", opset, lists_weights=True)
    result = export(source, tmp_path / "new.onnx", **{option: True})
    assert "Weights that the source also lists as inputs (2) can no longer be fed to the model." in result.notes
    proto = onnx.load(tmp_path / "new.onnx")
    assert {tensor.name: tensor.data_type for tensor in proto.graph.initializer} == {"conv": kind, "dense": kind}
    assert [port.name for port in proto.graph.input] == ["x"]
    x = random((4, 3, 8, 8))
    expected = by_onnxruntime(source, *x)[0]
    np.testing.assert_allclose(by_onnxruntime(tmp_path / "new.onnx", *x)[0], expected, atol=0.05)


def test_weights_that_are_inputs_too_stay_so_where_no_bits_are_saved(tmp_path: Path) -> None:
    source = model(tmp_path / "old.onnx", 9, lists_weights=True)
    export(source, tmp_path / "new.onnx")
    assert len(onnx.load(tmp_path / "new.onnx").graph.input) == 3


@pytest.mark.parametrize("options", [{}, {"half": True}])
def test_a_model_whose_inputs_all_have_numbers_in_the_file_is_refused(options: dict[str, bool], tmp_path: Path) -> None:
    kernel = numpy_helper.from_array(KERNELS["dense"], "dense")
    port = helper.make_tensor_value_info("dense", TensorProto.FLOAT, (6, 32))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (6, 32))
    graph = helper.make_graph([helper.make_node("Relu", ["dense"], ["y"])], "graph", [port], [output], [kernel])
    source = tmp_path / "old.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3), source)
    with pytest.raises(InputError, match=r"old\.onnx has no inputs"):
        export(source, tmp_path / "new.onnx", **options)
    assert not (tmp_path / "new.onnx").exists()


def test_calibrated_integers_ask_for_an_opset_that_has_them(tmp_path: Path) -> None:
    source = model(tmp_path / "old.onnx", 11)
    np.savez(tmp_path / "data.npz", x=random((64, 3, 8, 8))[0])
    words = {"int8": True, "data": f"{tmp_path / 'data.npz'}", "atol": 1.0}
    with pytest.raises(UsageError, match="needs ONNX opset 13, but the model has 11") as caught:
        export(source, tmp_path / "new.onnx", **words)
    assert caught.value.hint == "add opset=13"
    export(source, tmp_path / "new.onnx", **words, opset=13)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "new.onnx").graph.initializer}
    assert kinds["conv_quantized"] == TensorProto.INT8


@pytest.mark.parametrize("option", ["", "half", "bf16", "int8"])
def test_a_model_without_its_zeros_is_exported_again(option: str, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.onnx"
    export(model(tmp_path / "dense.onnx", 17), sparse, sparse=True)
    assert [tensor.values.name for tensor in onnx.load(sparse).graph.sparse_initializer] == ["dense"]
    words: dict[str, bool] = {option: True} if option else {}
    result = export(sparse, tmp_path / "again.onnx", **words)
    assert any(note.startswith("Zeros that the source does not store are stored") for note in result.notes)
    x = random((4, 3, 8, 8))
    expected = by_onnxruntime(tmp_path / "dense.onnx", *x)[0]
    np.testing.assert_allclose(by_onnxruntime(tmp_path / "again.onnx", *x)[0], expected, atol=0.1)
    again = export(sparse, tmp_path / "same.onnx", sparse=True)
    assert not any("Zeros that the source" in note for note in again.notes)
    assert len(onnx.load(tmp_path / "same.onnx").graph.sparse_initializer) == 1


@pytest.mark.parametrize("option", ["", "half", "int8"])
@pytest.mark.parametrize("is_inner", [False, True])
def test_a_constant_without_its_zeros_is_exported_with_them(is_inner: bool, option: str, tmp_path: Path) -> None:
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("", TensorProto.INT64, [2], [0, 5])
    nodes = [
        helper.make_node("Constant", [], ["w"], sparse_value=helper.make_sparse_tensor(values, indices, [4, 3])),
        helper.make_node("MatMul", ["x", "w"], ["z" if is_inner else "y"]),
    ]
    if is_inner:
        inner = helper.make_graph(nodes, "inner", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, ("n", 3))])
        nodes = [
            helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
            helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner),
        ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", size)) for name, size in (("x", 4), ("y", 3))]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:])
    source, target = tmp_path / "sparse.onnx", tmp_path / "dense.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    words: dict[str, bool] = {option: True} if option else {}
    export(source, target, **words)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    weights = np.array([[1, 0, 0], [0, 0, 2], [0, 0, 0], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(by_onnxruntime(target, x)[0], x @ weights, atol=0.05)


@pytest.mark.parametrize("data", ["", "data.npz"])
def test_sums_of_integers_overflow_on_no_processor(data: str, tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.full((64, 8), 1.0, np.float32), "dense")
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", size)) for name, size in (("x", 64), ("y", 8))
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "dense"], ["y"])], "graph", ports[:1], ports[1:], [weight]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, tmp_path / "ones.onnx")
    x = np.random.default_rng(1).uniform(0.9, 1, (80, 64)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    words = {"data": str(tmp_path / data)} if data else {}
    export(tmp_path / "ones.onnx", tmp_path / "int8.onnx", int8=True, atol=1e3, **words)
    held = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer
    }
    assert np.abs(held["dense_quantized"].astype(int)).max() <= 64
    np.testing.assert_allclose(by_onnxruntime(tmp_path / "int8.onnx", x)[0], x @ np.ones((64, 8)), rtol=0.02)
