"""TensorFlow Lite files, written by its converter and by its own FlatBuffer classes, read by its interpreter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flatbuffers
import ml_dtypes
import numpy as np
import pytest

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import tensorflow as tf
import tf_keras
from tensorflow.lite.python import schema_py_generated as schema

from prunectl.errors import InputError
from prunectl.formats.registry import open_model
from prunectl.formats.tflite import operations
from tests.contract import Array, FormatContract, raw
from tests.formats.test_checkpoint import by_name

pytestmark = pytest.mark.filterwarnings("ignore")
FLOAT, STRING, INT8, INT4 = 0, 5, 9, 17


class Builder:
    """A model in TensorFlow Lite's own object classes."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.buffers = [schema.BufferT()]
        self.model.operatorCodes, self.model.metadata = [], None
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators, self.graph.inputs, self.graph.outputs = [], [], [], []
        self.model.subgraphs = [self.graph]

    def tensor(self, name: str, shape: tuple[int, ...], data: bytes = b"", code: int = FLOAT) -> int:
        """Add a tensor, and return its number."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), code, 0
        if data:
            buffer = schema.BufferT()
            buffer.data = list(data)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def operator(self, code: int, inputs: list[int], output: int, options: Any = None, kind: int = 0) -> None:
        """Add an operator."""
        named, operator = schema.OperatorCodeT(), schema.OperatorT()
        named.builtinCode, named.deprecatedBuiltinCode = code, min(code, 127)
        self.model.operatorCodes.append(named)
        operator.opcodeIndex, operator.inputs, operator.outputs = len(self.model.operatorCodes) - 1, inputs, [output]
        operator.builtinOptions, operator.builtinOptionsType = options, kind
        self.graph.operators.append(operator)

    def write(self, path: Path) -> Path:
        """Write it with the flatbuffers library."""
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path


def dense(builder: Builder, given: int, name: str, kernel: Array, bias: Array | None = None) -> int:
    """Add a fully connected layer, and return its result."""
    inputs = [given, builder.tensor(f"{name}.weight", kernel.shape, kernel.tobytes())]
    if bias is not None:
        inputs.append(builder.tensor(f"{name}.bias", bias.shape, bias.tobytes()))
    result = builder.tensor(name, (1, kernel.shape[0]))
    builder.operator(schema.BuiltinOperator.FULLY_CONNECTED, inputs, result, schema.FullyConnectedOptionsT(), 8)
    return result


def interpreter(path: Path) -> Any:
    return tf.lite.Interpreter(str(path))


def stock(path: Path) -> dict[str, Array]:
    """Every constant, as TensorFlow Lite reads it."""
    reader = interpreter(path)
    found = {}
    for facts in reader.get_tensor_details():
        try:
            found[facts["name"]] = reader.get_tensor(facts["index"])
        except ValueError:
            continue  # not a constant: it has no values before it is run
    return found


def convert(model: Any, path: Path, *, optimise: tuple[Any, ...] = (), kinds: tuple[Any, ...] = ()) -> Path:
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = list(optimise)
    converter.target_spec.supported_types = list(kinds)
    path.write_bytes(converter.convert())
    return path


@pytest.fixture(scope="module")
def net() -> Any:
    lay = tf_keras.layers
    return tf_keras.Sequential(
        [
            lay.Input((8, 8, 3)),
            lay.Conv2D(4, 3, name="conv"),
            lay.DepthwiseConv2D(3, name="dw"),
            lay.Conv2DTranspose(8, 2, name="up"),
            lay.Flatten(),
            lay.Dense(200, name="fc"),
            lay.Dense(2, name="out"),
        ],
        name="net",
    )


class TestTflite(FormatContract):
    format = "tflite"
    name = "model.tflite"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        builder = Builder()
        given = builder.tensor("x", (1, 5))
        hidden = dense(builder, given, "first", arrays["first.weight"], arrays["first.bias"])
        result = dense(builder, hidden, "second", arrays["second.weight"])
        builder.graph.inputs, builder.graph.outputs = [given], [result]
        builder.write(path)

    def read_back(self, path: Path) -> dict[str, Array]:
        return stock(path)


def test_a_converted_model_tells_layers_roles_and_axes(net: Any, tmp_path: Path) -> None:
    path = convert(net, tmp_path / "m.tflite")
    model = open_model(path)
    found = {
        (tensor.layer, tensor.kind, tensor.shape, tensor.out_axis, tensor.in_axis)
        for tensor in model.tensors
        if tensor.role == "kernel"
    }
    assert found == {
        ("net/conv", "CONV_2D", (4, 3, 3, 3), 0, 3),
        ("net/dw", "DEPTHWISE_CONV_2D", (1, 3, 3, 4), 3, 0),
        ("net/up", "TRANSPOSE_CONV", (8, 2, 2, 4), 0, 3),
        ("net/fc", "FULLY_CONNECTED", (200, 200), 0, 1),
        ("net/out", "FULLY_CONNECTED", (2, 200), 0, 1),
    }
    assert {tensor.layer for tensor in model.tensors if tensor.role == "bias"} >= {"net/conv"}
    assert model.about.producer.startswith("tflite schema 3, runtime ")
    assert model.about.producer.endswith(", MLIR Converted")
    assert model.about.notes == ()
    expected = stock(path)
    for tensor in model.tensors:
        assert raw(model.read(tensor)) == raw(expected[tensor.name])


def test_multiplications_are_counted_per_inference(net: Any, tmp_path: Path) -> None:
    model = open_model(convert(net, tmp_path / "m.tflite"))
    found = {operation.layer: operation for operation in operations(model)}
    assert {layer: operation.macs for layer, operation in found.items()} == {
        "net/conv": 6 * 6 * 4 * 27,
        "net/dw": 4 * 4 * 4 * 9,
        "net/up": 4 * 4 * 4 * 8 * 4,
        "net/fc": 200 * 200,
        "net/out": 400,
    }
    assert all(by_name(model)[operation.weight].role == "kernel" for operation in found.values())


def test_quantised_weights_say_so(net: Any, tmp_path: Path) -> None:
    path = convert(net, tmp_path / "m.tflite", optimise=(tf.lite.Optimize.DEFAULT,))
    model = open_model(path)
    (kernel,) = [tensor for tensor in model.tensors if tensor.layer == "net/fc" and tensor.role == "kernel"]
    assert kernel.dtype == np.int8
    assert "quantised to int8." in " ".join(model.about.notes)
    assert raw(model.read(kernel)) == raw(stock(path)[kernel.name])


def test_half_precision_weights_are_known_behind_what_widens_them(net: Any, tmp_path: Path) -> None:
    path = convert(net, tmp_path / "m.tflite", optimise=(tf.lite.Optimize.DEFAULT,), kinds=(tf.float16,))
    model = open_model(path)
    kernels = {tensor.layer: tensor for tensor in model.tensors if tensor.role == "kernel"}
    assert kernels.keys() == {"net/conv", "net/dw", "net/up", "net/fc", "net/out"}
    assert {tensor.dtype for tensor in kernels.values()} == {np.dtype(np.float16)}
    assert {operation.weight for operation in operations(model)} == {tensor.name for tensor in kernels.values()}


@pytest.mark.parametrize("blocks", [False, True])
def test_a_sparse_tensor_is_unfolded(net: Any, tmp_path: Path, *, blocks: bool) -> None:
    layer = net.get_layer("fc")
    kernel, bias = layer.get_weights()
    random = np.random.default_rng(0)
    pruned = np.where(random.random(kernel.shape) < 0.9, 0, 1 + random.random(kernel.shape)).astype(np.float32)
    if blocks:  # four inputs of an output are zero together
        pruned = np.repeat(pruned[:50], 4, axis=0)
    layer.set_weights([pruned, bias])
    path = convert(net, tmp_path / "m.tflite", optimise=(tf.lite.Optimize.EXPERIMENTAL_SPARSITY,))
    layer.set_weights([kernel, bias])
    model = open_model(path)
    (tensor,) = [tensor for tensor in model.tensors if tensor.layer == "net/fc" and tensor.role == "kernel"]
    assert tensor.storage.extent is None
    assert tensor.storage.stored_bytes < tensor.storage.nbytes == pruned.nbytes
    assert raw(model.read(tensor)) == raw(pruned.T)
    assert "stored sparse." in " ".join(model.about.notes)
    assert model.about.is_compressed


def test_a_block_of_a_sparse_tensor_has_its_place(tmp_path: Path) -> None:
    builder = Builder()
    values = np.arange(1, 9, dtype=np.float32)
    at = builder.tensor("w", (4, 6), values.tobytes())
    facts = schema.SparsityParametersT()
    facts.traversalOrder, facts.blockMap, facts.dimMetadata = [0, 1, 2, 3], [0, 1], []
    for kind, size in ((0, 2), (1, 0), (0, 2), (0, 2)):
        level = schema.DimensionMetadataT()
        level.format, level.denseSize = kind, size
        if kind:
            level.arraySegmentsType = level.arrayIndicesType = schema.SparseIndexVector.Uint8Vector
            level.arraySegments, level.arrayIndices = schema.Uint8VectorT(), schema.Uint8VectorT()
            level.arraySegments.values, level.arrayIndices.values = [0, 1, 2], [2, 0]
        facts.dimMetadata.append(level)
    builder.graph.tensors[at].sparsity = facts
    model = open_model(builder.write(tmp_path / "m.tflite"))
    assert model.read(model.tensors[0]).tolist() == [
        [0, 0, 0, 0, 1, 2],
        [0, 0, 0, 0, 3, 4],
        [5, 6, 0, 0, 0, 0],
        [7, 8, 0, 0, 0, 0],
    ]
    facts.dimMetadata[1].arrayIndices.values = [3, 0]
    model = open_model(builder.write(tmp_path / "bad.tflite"))
    with pytest.raises(InputError, match="index outside its shape"):
        model.read(model.tensors[0])


def test_numbers_of_four_bits_are_unpacked(tmp_path: Path) -> None:
    builder = Builder()
    builder.tensor("w", (3, 3), bytes([0x1F, 0x87, 0x00, 0x32, 0x04]), INT4)
    model = open_model(builder.write(tmp_path / "m.tflite"))
    (tensor,) = model.tensors
    assert (tensor.dtype, tensor.storage.stored_bytes, tensor.storage.nbytes) == (ml_dtypes.int4, 5, 9)
    assert model.read(tensor).astype(int).tolist() == [[-1, 1, 7], [-8, 0, 0], [2, 3, 4]]


def test_names_that_come_twice_are_told_apart_and_tied_tensors_share_their_bytes(tmp_path: Path) -> None:
    builder = Builder()
    first = builder.tensor("w", (1,), bytes(4))
    second = builder.tensor("w", (1,))
    builder.graph.tensors[second].buffer = builder.graph.tensors[first].buffer
    builder.tensor("w#2", (1,), bytes(4))
    tensors = open_model(builder.write(tmp_path / "m.tflite")).tensors
    assert [tensor.name for tensor in tensors] == ["w", "w#2", "w#2#2"]
    assert tensors[0].storage == tensors[1].storage != tensors[2].storage


def test_data_behind_the_flatbuffer_is_found(tmp_path: Path) -> None:
    builder = Builder()
    at = builder.tensor("w", (2,), bytes(8))
    buffer = builder.model.buffers[builder.graph.tensors[at].buffer]
    path = tmp_path / "m.tflite"
    for _ in range(2):  # the second time with the length that the first one had
        buffer.data, buffer.offset, buffer.size = None, path.stat().st_size if path.exists() else 1 << 20, 8
        builder.write(path)
    path.write_bytes(path.read_bytes() + np.array([1, 2], np.float32).tobytes())
    model = open_model(path)
    assert model.read(model.tensors[0]).tolist() == [1, 2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="buffer 1 should end at byte"):
        open_model(path)


def test_strings_are_no_tensors_and_matrix_products_have_kernels(tmp_path: Path) -> None:
    builder = Builder()
    builder.tensor("text", (1,), bytes(12), STRING)
    given = builder.tensor("x", (-1, 2, 3))
    kernel = builder.tensor("w", (3, 4), bytes(48))
    result = builder.tensor("y", (-1, 2, 4))
    builder.operator(schema.BuiltinOperator.BATCH_MATMUL, [given, kernel], result, schema.BatchMatMulOptionsT(), 101)
    model = open_model(builder.write(tmp_path / "m.tflite"))
    assert [(tensor.name, str(tensor.role), tensor.out_axis) for tensor in model.tensors] == [("w", "kernel", 1)]
    assert [operation.macs for operation in operations(model)] == [2 * 4 * 3]


def test_a_fixed_basis_is_no_kernel_although_a_product_takes_it(tmp_path: Path) -> None:
    builder = Builder()
    basis = dense(builder, builder.tensor("x", (1, 4)), "net/cq_t2010v2/conv1d", np.ones((4, 4), np.float32))
    dense(builder, basis, "net/dense/MatMul", np.ones((4, 4), np.float32))
    model = open_model(builder.write(tmp_path / "m.tflite"))
    assert [str(tensor.role) for tensor in model.tensors] == ["state", "kernel"]


@pytest.mark.parametrize(
    ("shape", "data", "code", "complaint"),
    [
        ((3,), bytes(8), FLOAT, "does not match its 8 bytes"),
        ((-1,), bytes(8), FLOAT, "no fixed shape"),
        ((1,), bytes(4), 99, "as type 99"),
        ((1,) * 33, bytes(4), FLOAT, "more than 32 dimensions"),
        ((1 << 30, 1 << 30), bytes(4), FLOAT, "a shape too large for any memory"),
    ],
)
def test_a_tensor_that_lies_is_refused(
    tmp_path: Path, shape: tuple[int, ...], data: bytes, code: int, complaint: str
) -> None:
    builder = Builder()
    builder.tensor("w", shape, data, code)
    with pytest.raises(InputError, match=complaint):
        open_model(builder.write(tmp_path / "m.tflite"))


def test_an_operator_that_names_a_tensor_out_of_reach_is_refused(tmp_path: Path) -> None:
    builder = Builder()
    builder.operator(schema.BuiltinOperator.ADD, [0, 1], builder.tensor("y", (1,)))
    with pytest.raises(InputError, match="that does not exist"):
        open_model(builder.write(tmp_path / "m.tflite"))


def test_a_buffer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    builder = Builder()
    builder.graph.tensors[builder.tensor("w", (1,), bytes(4))].buffer = 7
    with pytest.raises(InputError, match="buffer 7, which does not exist"):
        open_model(builder.write(tmp_path / "m.tflite"))


def test_many_graphs_over_one_list_of_tensors_are_refused(tmp_path: Path) -> None:
    builder = Builder()
    for number in range(2000):
        builder.tensor(f"t{number}", (1,))
    path = builder.write(tmp_path / "m.tflite")
    data = path.read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    graph = model.Subgraphs(0)._tab.Pos
    # Behind the file stands a longer list of graphs, each of them the same one.
    vector = (len(data) + 3) // 4 * 4
    field = model._tab.Offset(8) + model._tab.Pos
    count = 50_000
    offsets = b"".join(((graph - (vector + 4 + 4 * at)) & 0xFFFFFFFF).to_bytes(4, "little") for at in range(count))
    patched = bytearray(data.ljust(vector, b"\0") + count.to_bytes(4, "little") + offsets)
    patched[field : field + 4] = (vector - field).to_bytes(4, "little")
    path.write_bytes(patched)
    with pytest.raises(InputError, match="truncated or damaged"):
        open_model(path)
