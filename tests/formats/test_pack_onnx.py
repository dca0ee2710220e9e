"""ONNX models written again without their zeros, judged by onnx and onnxruntime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from prunectl.formats import budgets, extents
from prunectl.formats.onnx.rewrite import pack
from prunectl.formats.registry import open_model
from tests.contract import Array, raw, read_all
from tests.running import FIXTURES

FLOATS = [
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz),
]


def thinned(shape: tuple[int, ...], dtype: Any = np.float32, keep: float = 0.1) -> Array:
    """Numbers of which few are not zero."""
    random = np.random.default_rng(len(shape))
    return np.where(random.random(shape) < keep, random.standard_normal(shape), 0).astype(dtype)


def one_node(weight: TensorProto, op: str = "MatMul", *, ir: int = 10, **around: Any) -> onnx.ModelProto:
    """A model that gives what one operation makes of `x` and a weight."""
    kind = weight.data_type
    node = helper.make_node(op, ["w"] if op == "Identity" else ["x", "w"], ["y"], op.lower())
    sides = [helper.make_tensor_value_info(name, kind, shape) for name, shape in (("x", ["n", "k"]), ("y", None))]
    sides[1].type.tensor_type.shape.SetInParent()
    for length in weight.dims if op == "Identity" else ("n", "m"):
        side = sides[1].type.tensor_type.shape.dim.add()
        if isinstance(length, str):
            side.dim_param = length
        else:
            side.dim_value = length
    graph = helper.make_graph([node], "g", sides[:1], sides[1:], [weight], **around)
    return helper.make_model(graph, ir_version=ir, opset_imports=[helper.make_opsetid("", 17 if ir < 9 else 21)])


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    onnx.save(model, path)
    return path


def packed(path: Path) -> Path:
    """Pack a model, and see that it counts every byte of the file once."""
    target = path.with_name("packed.onnx")
    counted: list[int] = []
    pack(open_model(path), target, counted.append)
    assert sum(counted) == path.stat().st_size
    return target


def run(path: Path, **inputs: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {entry.name: inputs[entry.name] for entry in session.get_inputs()})
    return np.asarray(found)


def dense(path: Path) -> set[str]:
    return {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}


def scattered(path: Path) -> set[str]:
    return {tensor.values.name for tensor in onnx.load(path, load_external_data=False).graph.sparse_initializer}


def same_tensors(left: Path, right: Path) -> bool:
    ours, theirs = read_all(left), read_all(right)
    return ours.keys() == theirs.keys() and all(
        array.dtype == theirs[name].dtype and array.shape == theirs[name].shape and raw(array) == raw(theirs[name])
        for name, array in ours.items()
    )


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """The digits network with nine of ten weights zero."""
    model = onnx.load(FIXTURES / "digits_cnn.onnx")
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.ndim > 1:
            weight.raw_data = np.where(np.abs(array) > np.quantile(np.abs(array), 0.9), array, 0).tobytes()
    return saved(model, tmp_path)


def test_a_pruned_network_becomes_small_and_passes_the_checker(pruned: Path) -> None:
    target = packed(pruned)
    onnx.checker.check_model(target)
    assert target.stat().st_size < 0.5 * pruned.stat().st_size
    assert scattered(target) == {"conv2.weight", "fc1.weight", "fc2.weight", "conv1.weight"}
    assert dense(target) == {"conv1.bias", "conv2.bias", "fc1.bias", "fc2.bias"}


def test_onnxruntime_gives_the_same_bits(pruned: Path) -> None:
    digits = np.load(FIXTURES / "digits.npz")["x"][:50].transpose(0, 3, 1, 2).astype(np.float32) / 16
    assert raw(run(packed(pruned), pixels=digits)) == raw(run(pruned, pixels=digits))


def test_we_read_the_same_tensors_and_facts(pruned: Path) -> None:
    target = packed(pruned)
    assert same_tensors(target, pruned)
    before, after = open_model(pruned), open_model(target)
    assert after.about.is_compressed
    assert not before.about.is_compressed
    facts = {tensor.name: (tensor.layer, tensor.kind, tensor.role, tensor.out_axis) for tensor in before.tensors}
    assert facts == {tensor.name: (tensor.layer, tensor.kind, tensor.role, tensor.out_axis) for tensor in after.tensors}


def test_packing_twice_gives_the_same_bytes_and_packing_the_packed_one_too(pruned: Path) -> None:
    once = packed(pruned).read_bytes()
    assert packed(pruned).read_bytes() == once
    again = pruned.with_name("again.onnx")
    pack(open_model(packed(pruned)), again, lambda _: None)
    assert again.read_bytes() == once


def test_without_zeros_the_file_stays_as_it_is(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "digits_cnn.onnx", tmp_path))
    assert packed(path).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["float_data.onnx", "weights_in_branches.onnx"])
def test_what_cannot_be_smaller_stays_as_it_is(tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(FIXTURES / name, tmp_path))
    assert packed(path).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("is_raw", [True, False])
def test_every_kind_of_float_comes_back_bit_by_bit(tmp_path: Path, dtype: Any, is_raw: bool) -> None:
    array = thinned((40, 30), dtype, keep=0.03)
    weight = numpy_helper.from_array(array, "w")
    if not is_raw:
        weight = helper.make_tensor("w", weight.data_type, array.shape, array.reshape(-1))
        assert not weight.HasField("raw_data")
    model = one_node(weight, "Identity")
    model.graph.node[0].op_type = "Cast"
    model.graph.node[0].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    for side in (*model.graph.input, *model.graph.output):
        side.type.tensor_type.elem_type = TensorProto.FLOAT
    path = saved(model, tmp_path)
    target = packed(path)
    assert scattered(target) == {"w"}
    onnx.checker.check_model(target)
    assert same_tensors(target, path)
    assert raw(run(target, x=np.zeros((1, 1), np.float32))) == raw(array.astype(np.float32))


@pytest.mark.parametrize("shape", [(500,), (20, 30), (6, 5, 3, 3), (2, 3, 4, 5, 6)])
def test_every_rank_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(one_node(numpy_helper.from_array(thinned(shape), "w"), "Identity"), tmp_path)
    target = packed(path)
    assert scattered(target) == {"w"}
    onnx.checker.check_model(target)
    assert same_tensors(target, path)
    assert raw(run(target, x=np.zeros((1, 1), np.float32))) == raw(thinned(shape))


def test_a_tensor_of_zeros_alone_is_almost_nothing(tmp_path: Path) -> None:
    path = saved(one_node(numpy_helper.from_array(np.zeros((30, 40), np.float32), "w")), tmp_path)
    target = packed(path)
    onnx.checker.check_model(target)
    assert target.stat().st_size < 250
    assert same_tensors(target, path)
    assert not run(target, x=np.ones((2, 30), np.float32)).any()


def test_minus_zero_and_nan_are_values_that_are_kept(tmp_path: Path) -> None:
    array = np.zeros((30, 40), np.float32)
    array[3, 4], array[5, 6], array[7, 8], array[9, 10] = -0.0, np.nan, np.inf, 1e-45
    path = saved(one_node(numpy_helper.from_array(array, "w"), "Identity"), tmp_path)
    target = packed(path)
    assert onnx.load(target).graph.sparse_initializer[0].values.dims == [4]
    assert raw(read_all(target)["w"]) == raw(array) == raw(run(target, x=np.zeros((1, 1), np.float32)))


def test_a_tensor_bigger_than_a_block_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(one_node(numpy_helper.from_array(thinned((70, 90)), "w")), tmp_path)
    whole = packed(path).read_bytes()
    monkeypatch.setattr(extents, "BLOCK_BYTES", 64)
    assert packed(path).read_bytes() == whole


def test_a_weight_is_sparse_only_from_where_it_pays(tmp_path: Path) -> None:
    for kept in range(300, 340):
        array = np.zeros(1000, np.float32)
        array[:kept] = 1
        path = saved(one_node(numpy_helper.from_array(array, "w")), tmp_path)
        target = packed(path)
        assert target.stat().st_size <= path.stat().st_size
        assert bool(scattered(target)) == (target.stat().st_size < path.stat().st_size)


def test_a_weight_that_is_also_an_input_stays_dense_so_that_it_can_be_replaced(tmp_path: Path) -> None:
    model = one_node(numpy_helper.from_array(thinned((30, 40)), "w"))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [30, 40]))
    path = saved(model, tmp_path)
    assert packed(path).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("ir", [3, 4, 5])
def test_a_version_of_onnx_without_sparse_tensors_stays_as_it_is(tmp_path: Path, ir: int) -> None:
    model = one_node(numpy_helper.from_array(thinned((30, 40)), "w"))
    model.ir_version = ir
    path = saved(model, tmp_path)
    assert packed(path).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("ir", [6, 7, 8, 9, 10])
def test_every_version_with_them_is_packed(tmp_path: Path, ir: int) -> None:
    path = saved(one_node(numpy_helper.from_array(thinned((30, 40)), "w"), ir=ir), tmp_path)
    target = packed(path)
    assert scattered(target) == {"w"}
    onnx.checker.check_model(target)


def test_whole_numbers_and_texts_stay_dense(tmp_path: Path) -> None:
    model = one_node(numpy_helper.from_array(thinned((30, 40)), "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(500, np.int64), "i"))
    model.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"hello"]))
    path = saved(model, tmp_path)
    assert dense(packed(path)) == {"i", "text"}


def test_a_weight_used_in_a_branch_is_packed_and_one_inside_it_is_not(tmp_path: Path) -> None:
    array = thinned((4, 200))
    nodes = {"then_branch": ["x", "w"], "else_branch": ["x", "inner"]}
    branches = {
        key: helper.make_graph(
            [helper.make_node("MatMul", inputs, [f"{key}_y"])],
            key,
            [],
            [helper.make_tensor_value_info(f"{key}_y", TensorProto.FLOAT, ["n", 200])],
            [numpy_helper.from_array(array + 0, "inner")] if "inner" in inputs else [],
        )
        for key, inputs in nodes.items()
    }
    model = one_node(numpy_helper.from_array(array, "w"))
    model.graph.node[0].CopyFrom(helper.make_node("If", ["which"], ["y"], "choose", **branches))
    model.graph.input.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
    path = saved(model, tmp_path)
    target = packed(path)
    onnx.checker.check_model(target)
    assert scattered(target) == {"w"}
    assert same_tensors(target, path)
    x = np.ones((2, 4), np.float32)
    for which in (True, False):
        assert raw(run(target, x=x, which=np.array(which))) == raw(run(path, x=x, which=np.array(which)))


def test_everything_else_is_kept_to_the_byte(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(thinned((30, 40)), "w")
    weight.doc_string = "about the weight"
    weight.metadata_props.add(key="who", value="me")
    model = one_node(weight, doc_string="about the graph")
    model.producer_name, model.model_version = "somebody", 7
    helper.set_model_props(model, {"author": "nobody"})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    unknown = b"\xfa\x3e\x05hello"  # field 1007, which no version of ONNX knows
    path = tmp_path / "m.onnx"
    serialised = model.SerializeToString()
    path.write_bytes(serialised[:2] + unknown + serialised[2:] + unknown)
    target = packed(path)
    found = onnx.load(target)
    (sparse_weight,) = found.graph.sparse_initializer
    assert sparse_weight.values.doc_string == "about the weight"
    assert [(prop.key, prop.value) for prop in sparse_weight.values.metadata_props] == [("who", "me")]
    assert target.read_bytes().startswith(serialised[:2] + unknown)
    assert target.read_bytes().endswith(unknown)
    expected = onnx.load(path)
    for loaded in (found, expected):
        del loaded.graph.initializer[:], loaded.graph.sparse_initializer[:]
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_weights_beside_the_model_stay_there_and_those_inside_are_packed(tmp_path: Path) -> None:
    model = one_node(numpy_helper.from_array(thinned((30, 40)), "w"))
    model.graph.node.append(helper.make_node("Gemm", ["y", "v"], ["z"], "second"))
    model.graph.initializer.append(numpy_helper.from_array(thinned((40, 300)), "v"))
    model.graph.output[0].name = "z"
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="beside.bin", size_threshold=10_000)
    before = (tmp_path / "beside.bin").read_bytes()
    target = packed(path)
    assert (scattered(target), dense(target)) == ({"w"}, {"v"})
    assert (tmp_path / "beside.bin").read_bytes() == before
    onnx.checker.check_model(target)
    x = np.ones((2, 30), np.float32)
    assert raw(run(target, x=x)) == raw(run(path, x=x))
    assert same_tensors(target, path)
    assert open_model(target).files == (target, tmp_path / "beside.bin")


def test_a_tensor_that_a_reader_would_take_for_a_bomb_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(one_node(numpy_helper.from_array(np.zeros((30, 40), np.float32), "w")), tmp_path)
    assert scattered(packed(path)) == {"w"}
    monkeypatch.setattr(budgets, "MAX_UNFOLDED_TENSOR_BYTES", 1000)
    assert dense(packed(path)) == {"w"}


def test_a_scalar_and_an_empty_tensor_stay_dense(tmp_path: Path) -> None:
    model = one_node(numpy_helper.from_array(thinned((30, 40)), "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 4), np.float32), "none"))
    assert dense(packed(saved(model, tmp_path))) == {"one", "none"}
