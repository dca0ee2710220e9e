"""ONNX graphs whose numbers do not lie flat, written again with others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.onnx.rewrite import pack, write
from prunectl.formats.patch import TensorUpdate
from prunectl.formats.registry import open_model
from tests.running import FIXTURES


def one_matmul(path: Path, weight: onnx.TensorProto, kind: int) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "fc")
    inputs = [helper.make_tensor_value_info("x", kind, [1, 4])]
    outputs = [helper.make_tensor_value_info("y", kind, [1, 6])]
    graph = helper.make_graph([node], "g", inputs, outputs, [weight], doc_string="kept")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.metadata_props.add(key="also", value="kept")
    onnx.save(model, path)
    return path


def doubled(model: ModelFile, names: set[str]) -> list[TensorUpdate]:
    def blocks(array: Array) -> Iterator[Array]:
        yield np.asarray(array * array.dtype.type(2))

    found = [tensor for tensor in model.tensors if tensor.name in names]
    return [TensorUpdate(tensor, partial(blocks, model.read(tensor))) for tensor in found]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE])
def test_numbers_in_typed_fields_come_out_as_raw_bytes(tmp_path: Path, kind: int) -> None:
    values = np.arange(24).reshape(4, 6) - 7
    path = one_matmul(tmp_path / "m.onnx", helper.make_tensor("w", kind, values.shape, values.ravel()), kind)
    model = open_model(path)
    write(model, {path: tmp_path / "out.onnx"}, doubled(model, {"w"}))
    found = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(found)
    np.testing.assert_array_equal(numpy_helper.to_array(found.graph.initializer[0]).astype(np.float64), values * 2.0)
    assert found.graph.doc_string == "kept"
    assert found.metadata_props[0].value == "kept"


def test_a_packed_model_comes_out_packed_and_right(tmp_path: Path) -> None:
    weights = np.where(np.arange(64 * 64).reshape(64, 64) % 8, 0, 1.5).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "fc")
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", floats, [1, 64])],
        [helper.make_tensor_value_info("y", floats, [1, 64])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    pack(open_model(tmp_path / "m.onnx"), tmp_path / "packed.onnx", lambda _: None)
    model = open_model(tmp_path / "packed.onnx")
    write(model, {model.path: tmp_path / "out.onnx"}, doubled(model, {"w"}))
    assert open_model(tmp_path / "out.onnx").about.is_compressed
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    x = np.arange(64, dtype=np.float32).reshape(1, 64)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x @ (weights * 2))


def test_a_model_that_lies_flat_keeps_every_other_byte(tmp_path: Path) -> None:
    path = FIXTURES / "weights_in_branches.onnx"
    model = open_model(path)
    write(model, {path: tmp_path / "out.onnx"}, doubled(model, {model.tensors[0].name}))
    extent = model.tensors[0].storage.extent
    assert extent is not None
    old, new = path.read_bytes(), (tmp_path / "out.onnx").read_bytes()
    end = extent.offset + extent.nbytes
    assert (old[: extent.offset], old[end:]) == (new[: extent.offset], new[end:])


def test_typed_numbers_inside_a_branch_are_refused_by_name(tmp_path: Path) -> None:
    half = TensorProto.FLOAT16
    branches = [
        helper.make_graph(
            [helper.make_node("Identity", [f"w{name}"], [f"y{name}"])],
            name,
            [],
            [helper.make_tensor_value_info(f"y{name}", half, [2, 2])],
            [helper.make_tensor(f"w{name}", half, [2, 2], [1.0, 2.0, 3.0, 4.0])],
        )
        for name in ("yes", "no")
    ]
    node = helper.make_node("If", ["c"], ["y"], "choose", then_branch=branches[0], else_branch=branches[1])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", half, [2, 2])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    model = open_model(tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"stores \S+ in a form that cannot be changed"):
        write(model, {model.path: tmp_path / "out.onnx"}, doubled(model, {model.tensors[0].name}))
