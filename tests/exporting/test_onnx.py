"""ONNX to ONNX with fewer bits: old versions, weights that are inputs too, and weights without their zeros."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prunectl.errors import InputError, UsageError
from prunectl.exporting.onnx_inline import inline_functions
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
    if is_inner and option == "int8":
        with pytest.raises(UsageError, match="int8 changes nothing"):
            export(source, target, **words)
        return
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


def dense_model(path: Path, kind: str) -> Path:
    """Two dense layers: their weights as initializers, as constants, in a function, one in a branch, or of 64 bits."""
    is_double = kind == "double"
    first, second = (
        NUMBERS.standard_normal(shape).astype(np.float64 if is_double else np.float32) / 4
        for shape in ((16, 32), (32, 8))
    )
    arrays = {"first": numpy_helper.from_array(first, "first"), "second": numpy_helper.from_array(second, "second")}
    kept = {} if kind == "constant" else dict(arrays)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "second"], ["y"]),
    ]
    functions, opsets = [], [helper.make_opsetid("", 17)]
    if kind == "constant":
        nodes = [helper.make_node("Constant", [], [name], value=array) for name, array in arrays.items()] + nodes
    elif kind == "function":
        body = [helper.make_node("Constant", [], ["w"], value=kept.pop("second"))]
        body.append(helper.make_node("MatMul", ["v", "w"], ["z"]))
        functions = [helper.make_function("own", "Dense", ["v"], ["z"], body, opsets, [])]
        nodes[-1] = helper.make_node("Dense", ["b"], ["y"], domain="own")
        opsets = [*opsets, helper.make_opsetid("own", 1)]
    elif kind == "branch":
        product = helper.make_node("MatMul", ["b", "second"], ["z"])
        port = helper.make_tensor_value_info("z", TensorProto.FLOAT, ("n", 8))
        inner = [kept.pop("second")]
        graph = helper.make_graph([product], "branch", [], [port], inner)
        kept["yes"] = numpy_helper.from_array(np.array(True), "yes")
        nodes[-1] = helper.make_node("If", ["yes"], ["y"], "if", then_branch=graph, else_branch=graph)
    element = TensorProto.DOUBLE if is_double else TensorProto.FLOAT
    ports = [helper.make_tensor_value_info(name, element, ("n", size)) for name, size in (("x", 16), ("y", 8))]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], list(kept.values()))
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions), path)
    np.savez(path.with_suffix(".npz"), x=NUMBERS.standard_normal((80, 16)).astype(first.dtype))
    return path


def wide_matrices(path: Path) -> int:
    """How many matrices of 32 bits a model holds, wherever they are."""
    proto, found = onnx.load(path), 0
    waiting = [proto.graph, *proto.functions]
    for graph in waiting:
        values = [*getattr(graph, "initializer", ()), *(part.t for node in graph.node for part in node.attribute)]
        found += sum(value.data_type == TensorProto.FLOAT and len(value.dims) > 1 for value in values)
        waiting += [part.g for node in graph.node for part in node.attribute if part.HasField("g")]
    return found


@pytest.mark.parametrize("option", ["int8", "calibrated", "half", "bf16"])
@pytest.mark.parametrize("kind", ["initializer", "constant", "function"])
def test_weights_become_smaller_wherever_they_are(kind: str, option: str, tmp_path: Path) -> None:
    source, target = dense_model(tmp_path / "m.onnx", kind), tmp_path / "out.onnx"
    words = {"int8": True, "data": str(tmp_path / "m.npz")} if option == "calibrated" else {option: True}
    result = export(source, target, atol=1e3, **words)
    assert wide_matrices(source) == 2
    assert wide_matrices(target) == 0
    assert not any("Not converted" in note for note in result.notes)
    x = random((4, 16))
    np.testing.assert_allclose(by_onnxruntime(target, *x)[0], by_onnxruntime(source, *x)[0], atol=0.2)


def test_weights_that_the_converter_leaves_are_named(tmp_path: Path) -> None:
    source, target = dense_model(tmp_path / "m.onnx", "branch"), tmp_path / "out.onnx"
    result = export(source, target, int8=True)
    names = "if/else_branch/second (float32), if/then_branch/second (float32)"
    assert f"Not converted: {names}." in result.notes
    assert wide_matrices(target) == 2


@pytest.mark.parametrize("option", ["half", "int8"])
def test_an_option_that_would_change_no_weight_is_refused(option: str, tmp_path: Path) -> None:
    source = dense_model(tmp_path / "m.onnx", "double")
    words = {option: True, "data": str(tmp_path / "m.npz")}
    with pytest.raises(UsageError, match=rf"{option} changes nothing: .* first \(float64\), second \(float64\)"):
        export(source, tmp_path / "out.onnx", **words)
    assert not (tmp_path / "out.onnx").exists()


def model_of(path: Path, nodes: list[onnx.NodeProto], *functions: onnx.FunctionProto, size: int = 64) -> Path:
    """A model of 64 inputs with a weight `w` of `size` columns."""
    weight = numpy_helper.from_array(NUMBERS.standard_normal((64, size)).astype(np.float32) / 8, "w")
    written = {name for node in nodes for name in node.output}
    shapes: dict[str, tuple[str | int, int]] = {"y": ("n", size), "k": (4, 4)}
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in shapes if name in written
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 64))]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [weight])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions), path)
    return path


def function_of(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["v"], ["z"], list(nodes), opsets, [])


def check_answers(source: Path, target: Path) -> None:
    x = NUMBERS.standard_normal((4, 64)).astype(np.float32)
    for expected, actual in zip(by_onnxruntime(source, x), by_onnxruntime(target, x), strict=True):
        np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("option", ["half", "bf16", "int8"])
def test_a_weight_of_one_column_becomes_smaller(option: str, tmp_path: Path) -> None:
    source = model_of(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], size=1)
    export(source, tmp_path / "out.onnx", **{option: True})
    kinds = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8}
    assert kinds & {tensor.data_type for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    check_answers(source, tmp_path / "out.onnx")


@pytest.mark.parametrize("option", ["half", "bf16", "int8"])
def test_a_constant_may_be_an_output(option: str, tmp_path: Path) -> None:
    value = numpy_helper.from_array(NUMBERS.standard_normal((4, 4)).astype(np.float32), "k")
    nodes = [helper.make_node("Constant", [], ["k"], value=value), helper.make_node("MatMul", ["x", "w"], ["y"])]
    source = model_of(tmp_path / "m.onnx", nodes)
    export(source, tmp_path / "out.onnx", **{option: True})
    check_answers(source, tmp_path / "out.onnx")


@pytest.mark.parametrize(("option", "most"), [("half", 2), ("bf16", 2), ("int8", 4)])
def test_functions_whose_copies_would_need_more_bytes_are_left_and_named(
    option: str, most: int, tmp_path: Path
) -> None:
    source = tmp_path / "m.onnx"
    value = numpy_helper.from_array(NUMBERS.standard_normal((64, 64)).astype(np.float32) / 8, "u")
    inside = [helper.make_node("Constant", [], ["u"], value=value), helper.make_node("MatMul", ["v", "u"], ["z"])]
    for calls in (most, most + 1):
        values = [*(f"v{number}" for number in range(calls)), "y"]
        nodes = [helper.make_node("Dense", [a], [b], domain="own") for a, b in itertools.pairwise(values)]
        nodes.insert(0, helper.make_node("MatMul", ["x", "w"], ["v0"]))
        model_of(source, nodes, function_of("Dense", *inside))
        target = tmp_path / f"{calls}.onnx"
        result = export(source, target, atol=1e3, **{option: True})
        assert bool(onnx.load(target).functions) == (calls > most)
        assert ("Not converted: Dense/u (float32)." in result.notes) == (calls > most)
        assert target.stat().st_size < source.stat().st_size
        check_answers(source, target)


@pytest.mark.parametrize("levels", [3, 12, 60])
def test_functions_that_call_one_another_are_inlined_only_up_to_some_nodes(levels: int, tmp_path: Path) -> None:
    functions = [function_of("F0", helper.make_node("Relu", ["v"], ["z"]))]
    for level in range(levels):
        inner = [helper.make_node(f"F{level}", [a], [b], domain="own") for a, b in (("v", "q"), ("q", "z"))]
        functions.append(function_of(f"F{level + 1}", *inner))
    call = helper.make_node(f"F{levels}", ["x"], ["y"], domain="own")
    proto = onnx.load(model_of(tmp_path / "m.onnx", [call], *functions))
    inlined = inline_functions(proto, saving=2)
    assert (len(inlined.graph.node), len(inlined.functions)) == ((2**levels, 0) if levels == 3 else (1, levels + 1))


def test_each_reference_to_an_attribute_of_a_call_counts_as_a_copy(tmp_path: Path) -> None:
    value = numpy_helper.from_array(np.ones((64, 64), np.float32), "u")
    inside = []
    for number in range(9):
        inside.append(helper.make_node("Constant", [], [f"u{number}"]))
        inside[-1].attribute.add(name="value", ref_attr_name="weight", type=onnx.AttributeProto.TENSOR)
    function = function_of("Sum", *inside, helper.make_node("Sum", [f"u{number}" for number in range(9)], ["z"]))
    function.attribute.append("weight")
    call = helper.make_node("Sum", ["x"], ["y"], domain="own", weight=value)
    proto = onnx.load(model_of(tmp_path / "m.onnx", [call], function))
    assert inline_functions(proto, saving=2).functions
    del function.node[1:]
    function.node[0].output[0] = "z"
    proto = onnx.load(model_of(tmp_path / "m.onnx", [call], function))
    assert not inline_functions(proto, saving=2).functions


def test_a_model_that_the_inliner_refuses_is_called_invalid(tmp_path: Path) -> None:
    functions = [function_of(f"F{number}", helper.make_node("Relu", ["v"], ["z"])) for number in range(10_001)]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("F0", ["a"], ["y"], domain="own")]
    source = model_of(tmp_path / "m.onnx", nodes, *functions)
    with pytest.raises(InputError, match="not valid ONNX: Model contains 10001 local functions"):
        export(source, tmp_path / "out.onnx", half=True)
