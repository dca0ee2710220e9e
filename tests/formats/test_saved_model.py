"""SavedModel folders, written by TensorFlow, Keras 2, Keras 3 and tfmot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import keras
import tensorflow as tf
import tf_keras
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.protobuf import saved_model_pb2

from prunectl import prune
from prunectl.errors import InputError
from prunectl.formats.base import PruningWrapper
from prunectl.formats.registry import open_model
from prunectl.formats.tensorflow.graph_def import _axes, _Use
from tests.contract import Array, FormatContract, raw, read_all
from tests.formats.test_checkpoint import by_name, stock

pytestmark = pytest.mark.filterwarnings("ignore")


class TestSavedModel(FormatContract):
    format = "saved-model"
    name = "model"
    is_checksummed = True

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        module = tf.Module()
        for name, array in arrays.items():
            layer, _, leaf = name.replace("weight", "kernel").partition(".")
            holder = module.__dict__.get(layer) or tf.Module()
            setattr(holder, leaf, tf.Variable(array.T if array.ndim == 2 else array, name=f"{layer}/{leaf}"))
            setattr(module, layer, holder)
        tf.saved_model.save(module, path)

    def read_back(self, path: Path) -> dict[str, Array]:
        return stock(path / "variables" / "variables.index")


def layers_of(k: Any) -> Any:
    """One small model of every kind of layer, in Keras 2 or 3."""
    lay = k.layers
    model = k.Sequential(
        [
            k.Input((8, 8, 3)),
            lay.Conv2D(4, 3, name="conv"),
            lay.DepthwiseConv2D(3, name="dw"),
            lay.BatchNormalization(name="bn"),
            lay.Conv2DTranspose(5, 2, name="up"),
            lay.Reshape((25, 5)),
            # With gates of another kind, Keras 2 does not trace what a GPU would do, which takes seconds.
            lay.LSTM(3, recurrent_activation="hard_sigmoid", name="rnn"),
            lay.Dense(2, name="out"),
        ],
        name="net",
    )
    model.compile("adam", "mse", metrics=["mae"], run_eagerly=True)
    model.fit(np.zeros((2, 8, 8, 3)), np.zeros((2, 2)), verbose=0)
    return model


@pytest.fixture(scope="module")
def keras2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keras2") / "model"
    layers_of(tf_keras).save(path, save_format="tf")
    return path


@pytest.fixture(scope="module")
def keras3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keras3") / "model"
    layers_of(keras).export(path, verbose=False)
    return path


def test_a_keras_2_model_tells_its_layers_and_their_classes(keras2: Path) -> None:
    found = {
        (tensor.layer, tensor.kind, str(tensor.role), tensor.shape, tensor.out_axis, tensor.in_axis)
        for tensor in open_model(keras2).tensors
        if tensor.role in {"kernel", "recurrent"}
    }
    assert found == {
        ("conv", "Conv2D", "kernel", (3, 3, 3, 4), 3, None),
        ("dw", "DepthwiseConv2D", "kernel", (3, 3, 4, 1), 2, 3),
        ("up", "Conv2DTranspose", "kernel", (2, 2, 5, 4), 2, 3),
        ("rnn", "LSTM", "kernel", (5, 12), 1, None),
        ("rnn", "LSTM", "recurrent", (3, 12), 1, None),
        ("out", "Dense", "kernel", (3, 2), 1, None),
    }


def test_a_keras_2_model_tells_how_it_was_trained(keras2: Path) -> None:
    model = open_model(keras2)
    assert model.about.producer.startswith(f"tensorflow {tf.__version__}, keras ")
    assert model.about.optimizer == "Adam"
    assert model.about.training == ("loss mse", "metrics mae")
    assert model.about.keras is not None
    assert model.about.keras["class_name"] == "Sequential"
    assert model.about.code == ()
    slots = [tensor for tensor in model.tensors if "optimizer" in tensor.name]
    metrics = [tensor for tensor in model.tensors if tensor.name.startswith("keras_api")]
    assert slots
    assert metrics
    assert {tensor.role for tensor in slots + metrics} == {"optimizer"}
    assert {tensor.name for tensor in model.tensors if tensor.layer == "bn" and tensor.role == "state"} == {
        "layer_with_weights-2/moving_mean",
        "layer_with_weights-2/moving_variance",
    }


def test_every_file_of_the_folder_is_listed_in_order(keras2: Path) -> None:
    assert [file.relative_to(keras2).as_posix() for file in open_model(keras2).files] == [
        "fingerprint.pb",
        "keras_metadata.pb",
        "saved_model.pb",
        "variables/variables.data-00000-of-00001",
        "variables/variables.index",
    ]


@pytest.mark.parametrize("which", ["keras2", "keras3"])
def test_values_are_those_that_tensorflow_reads(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    expected = stock(path / "variables" / "variables.index")
    assert {name: raw(array) for name, array in read_all(path).items()} == {
        name: raw(array) for name, array in expected.items()
    }


def test_a_keras_3_export_says_that_it_holds_its_variables_twice(keras3: Path) -> None:
    model = open_model(keras3)
    kernels = [tensor for tensor in model.tensors if tensor.layer == "conv" and tensor.role == "kernel"]
    assert len(kernels) == 2
    assert len({raw(model.read(tensor)) for tensor in kernels}) == 1
    copies = sum(tensor.nbytes for tensor in model.tensors if tensor.name.startswith("variables/"))
    copies -= sum(tensor.nbytes for tensor in model.tensors if tensor.layer.startswith("seed_generator"))
    note = f"The file holds some variables twice, as Keras 3 exports them: {copies} bytes are copies."
    assert model.about.notes == (note,)


def test_pruning_wrappers_are_told_with_their_schedule(tmp_path: Path) -> None:
    # Imported here, where its warnings are allowed.
    sparsity = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
    base = tf_keras.Sequential(
        [tf_keras.layers.Input((6,)), tf_keras.layers.Dense(4, name="fc"), tf_keras.layers.Dense(3, name="out")]
    )
    wrapped = sparsity.prune_low_magnitude(base, pruning_schedule=sparsity.PolynomialDecay(0.5, 0.8, 0, 1000))
    wrapped.save(tmp_path / "m", save_format="tf", save_traces=False)
    model = open_model(tmp_path / "m")
    schedule = "PolynomialDecay(0.5 -> 0.8, steps 0-1000)"
    assert model.about.wrappers == (PruningWrapper("tfmot", "fc", schedule), PruningWrapper("tfmot", "out", schedule))
    roles = sorted((tensor.layer, str(tensor.role)) for tensor in model.tensors)
    one = ["bias", "kernel", "mask", "schedule", "schedule"]
    assert roles == [(layer, role) for layer in ("fc", "out") for role in one]


def test_a_lambda_layer_is_named_as_code(tmp_path: Path) -> None:
    layers = [tf_keras.layers.Input((4,)), tf_keras.layers.Lambda(lambda x: x * 2, name="twice")]
    tf_keras.Sequential([*layers, tf_keras.layers.Dense(2)]).save(tmp_path / "m", save_format="tf")
    about = open_model(tmp_path / "m").about
    assert about.code == ("Lambda layer twice",)
    assert any("runs only the operations of its graph" in note for note in about.notes)
    assert 0 < about.code_bytes < (tmp_path / "m" / "saved_model.pb").stat().st_size


def test_a_model_of_tensorflow_1_is_read_with_its_partitioned_variables(tmp_path: Path) -> None:
    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 6])
        with v1.variable_scope("dense"):
            y = x @ v1.get_variable("kernel", [6, 5])
        table = v1.get_variable("table/embeddings", [10, 4], partitioner=v1.fixed_size_partitioner(2))
        loss = v1.reduce_sum(y) + v1.reduce_sum(v1.convert_to_tensor(table))
        v1.train.AdamOptimizer().minimize(loss, global_step=v1.train.get_or_create_global_step())
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(tmp_path / "m"), {"x": x}, {"y": y})
    model = open_model(tmp_path / "m")
    found = by_name(model)
    expected = stock(tmp_path / "m" / "variables" / "variables.index")
    assert {name: raw(array) for name, array in read_all(tmp_path / "m").items()} == {
        name: raw(array) for name, array in expected.items()
    }
    assert (found["dense/kernel"].layer, found["dense/kernel"].role) == ("dense", "kernel")
    assert (found["table/embeddings"].shape, found["table/embeddings"].role) == ((10, 4), "embedding")
    assert found["dense/kernel/Adam"].role == "optimizer"
    assert found["global_step"].role == "state"
    assert model.about.optimizer == "Adam"
    prune(tmp_path / "m", tmp_path / "sparse", sparsity=0.5, layers="table/embeddings")
    sparse = stock(tmp_path / "sparse" / "variables" / "variables.index")
    changed = {name for name, array in sparse.items() if raw(array) != raw(expected[name])}
    dense = expected["table/embeddings"]
    largest = np.where(np.abs(dense) > np.median(np.abs(dense)), dense, 0)
    np.testing.assert_array_equal(sparse["table/embeddings"], largest)
    assert changed == {"table/embeddings"}


def test_the_constants_of_a_frozen_model_are_its_weights(tmp_path: Path) -> None:
    weights = np.arange(3000, dtype=np.float32).reshape(6, 500)

    class Frozen(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 6], tf.float32)])
        def __call__(self, x: Any) -> Any:
            return x @ tf.constant(weights, name="kernel")

    tf.saved_model.save(Frozen(), tmp_path / "m")
    for leftover in (tmp_path / "m" / "variables").iterdir():
        leftover.unlink()
    model = open_model(tmp_path / "m")
    assert model.tensors
    for tensor in model.tensors:
        assert (tensor.shape, tensor.role, tensor.out_axis) == ((6, 500), "kernel", 1)
        assert raw(model.read(tensor)) == raw(weights)
    assert model.about.notes == ("The model has no variables: its weights are constants of the graph.",)


def test_a_constant_is_a_kernel_where_its_graph_multiplies_by_it_and_is_pruned(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"table": (20, 12), "turned": (8, 12), "first": (6, 12), "film": (3, 3, 4, 8), "mean": (1, 1, 4)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    captured = tf.constant(random.normal(size=(7, 7)).astype(np.float32), name="captured")

    class Frozen(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, 9, 9, 4], tf.float32)])
        def __call__(self, index: Any, image: Any) -> Any:
            table, turned, first, film, mean = (tf.constant(array, name=name) for name, array in arrays.items())
            rows = tf.gather(table, index)
            left = tf.matmul(first, tf.transpose(tf.matmul(rows, turned, transpose_b=True) @ turned))
            image = tf.nn.conv2d(image - mean, film, 1, "VALID")[..., 0]
            image = tf.while_loop(lambda _: True, lambda value: (value @ captured,), (image,), maximum_iterations=2)[0]
            return {"left": left, "image": image}

    tf.saved_model.save(Frozen(), tmp_path / "m", signatures=Frozen().__call__)
    model = open_model(tmp_path / "m")
    kernels = {tensor.shape: (tensor.out_axis, tensor.reduction_axis) for tensor in model.tensors if tensor.is_prunable}
    assert kernels == {(8, 12): (None, None), (6, 12): (0, 1), (3, 3, 4, 8): (3, 2), (7, 7): (1, 0)}
    assert {tensor.role for tensor in model.tensors if tensor.shape == (20, 12)} == {"embedding"}
    assert {tensor.role for tensor in model.tensors if tensor.shape == (1, 1, 4)} == {"other"}
    prune(tmp_path / "m", tmp_path / "sparse", sparsity=0.5, scope="layer")
    given = {"index": tf.range(5, dtype=tf.int64), "image": tf.ones((2, 9, 9, 4))}
    sparse = tf.saved_model.load(tmp_path / "sparse").signatures["serving_default"](**given)
    for array in (arrays["turned"], arrays["first"], arrays["film"]):
        array[np.abs(array) <= np.median(np.abs(array))] = 0
    kept = captured.numpy()
    kept[np.abs(kept) <= np.sort(np.abs(kept), axis=None)[round(0.5 * kept.size) - 1]] = 0
    captured = tf.constant(kept)
    for name, expected in Frozen()(**given).items():
        np.testing.assert_allclose(sparse[name], expected, rtol=1e-5, atol=1e-5)


def frozen(path: Path, functions: dict[str, list[Any]]) -> Path:
    """A SavedModel of functions without variables, each of the nodes that are given."""
    saved = saved_model_pb2.SavedModel()
    library = saved.meta_graphs.add().graph_def.library
    for name, nodes in functions.items():
        function = library.function.add()
        function.signature.name = name
        function.node_def.extend(nodes)
    path.mkdir()
    (path / "saved_model.pb").write_bytes(saved.SerializeToString())
    return path


def node(operation: str, name: str, *inputs: str, **attributes: Any) -> Any:
    definition = node_def_pb2.NodeDef(name=name, op=operation, input=inputs)
    for key, value in attributes.items():
        if isinstance(value, bool):
            definition.attr[key].b = value
        else:
            definition.attr[key].tensor.CopyFrom(tf.make_tensor_proto(value))
    return definition


def test_only_the_same_node_of_two_functions_used_in_the_same_way_is_a_copy(tmp_path: Path) -> None:
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    bias = np.arange(4, dtype=np.float32)

    def layers(*, is_turned: bool) -> list[Any]:
        constants = [node("Const", name, value=value) for name, value in (("w", weight), ("b1", bias), ("b2", bias))]
        return [*constants, node("MatMul", "y", "x", "w", transpose_b=is_turned)]

    functions = {"f": layers(is_turned=False), "g": layers(is_turned=True), "h": layers(is_turned=True)}
    model = open_model(frozen(tmp_path / "m", functions))
    turned = {"h/w": "g/w"}
    biases = {"g/b1": "f/b1", "h/b1": "f/b1", "g/b2": "f/b2", "h/b2": "f/b2"}
    assert model.duplicates == turned | biases


def test_the_same_node_with_other_numbers_is_no_copy(tmp_path: Path) -> None:
    functions = {name: [node("Const", "c", value=np.float32([[1, last]]))] for name, last in (("f", 2), ("g", 3))}
    assert open_model(frozen(tmp_path / "m", functions)).duplicates == {}


def lowered_loop(*, is_changed: bool) -> list[Any]:
    """A loop as TensorFlow lowers it to switches and merges, which multiplies by what goes round."""
    return [
        node("Const", "w", value=np.ones((4, 4), np.float32) * np.arange(1, 5, dtype=np.float32)),
        node("Enter", "enter", "w:output:0"),
        node("Merge", "merge", "enter:output:0", "next:output:0"),
        node("Switch", "switch", "merge:output:0", "condition"),
        node("Identity", "body", "switch:output_true:0", "^control"),
        node("MatMul", "product", "x", "body:output:0"),
        node("Tanh", "changed", "body:output:0"),
        node("NextIteration", "next", "changed:y:0" if is_changed else "body:output:0"),
    ]


def test_a_frozen_recurrent_kernel_is_followed_through_its_loop_and_a_state_is_not(tmp_path: Path) -> None:
    functions = {"kernel": lowered_loop(is_changed=False), "state": lowered_loop(is_changed=True)}
    tensors = open_model(frozen(tmp_path / "m", functions)).tensors
    assert {(tensor.name, str(tensor.role), tensor.out_axis, tensor.in_axis) for tensor in tensors} == {
        ("kernel/w", "kernel", 1, 0),
        ("state/w", "other", None, None),
    }


@pytest.mark.parametrize(("axis", "expected"), [(0, ("kernel", 2, 1)), (2, ("other", None, None))])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_window_of_one_dimension_is_a_kernel_where_its_new_axis_is_in_front(
    axis: int, expected: tuple[str, int | None, int | None], dtype: Any, tmp_path: Path
) -> None:
    nodes = [
        node("Const", "axis", value=dtype(axis)),
        node("Const", "w", value=np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
        node("Cast", "half", "w:output:0"),
        node("ExpandDims", "wide", "half:y:0", "axis:output:0"),
        node("Conv2D", "y", "x", "wide:output:0"),
    ]
    (tensor,) = open_model(frozen(tmp_path / "m", {"f": nodes})).tensors
    assert (str(tensor.role), tensor.out_axis, tensor.in_axis) == expected


def test_a_matrix_that_is_used_both_ways_has_no_axes_and_one_that_is_looked_up_is_an_embedding(tmp_path: Path) -> None:
    ways = [node("MatMul", "y", "x", "w"), node("MatMul", "z", "x", "w", transpose_b=True)]
    weight = node("Const", "w", value=np.arange(16, dtype=np.float32).reshape(4, 4))
    functions = {"both": [weight, *ways], "tied": [weight, *ways, node("GatherV2", "rows", "w", "index", "axis")]}
    tensors = open_model(frozen(tmp_path / "m", functions)).tensors
    assert {(tensor.name, str(tensor.role), tensor.out_axis, tensor.in_axis) for tensor in tensors} == {
        ("both/w", "kernel", None, None),
        ("tied/w", "embedding", None, None),
    }


def calls_to_open(path: Path) -> int:
    count = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        open_model(path)
    finally:
        sys.setprofile(before)
    return count


def test_the_work_of_following_constants_grows_with_the_graph_and_not_with_its_square(tmp_path: Path) -> None:
    def chain(length: int) -> Path:
        constants = [node("Const", f"c{index}", value=np.float32([[index + 1, 1]])) for index in range(length)]
        first = node("Identity", "i0", *(constant.name for constant in constants))
        rest = [node("Identity", f"i{index}", f"i{index - 1}") for index in range(1, length)]
        return frozen(tmp_path / str(length), {"f": [*constants, first, *rest]})

    calls_to_open(chain(10))  # What is imported at the first call does not count.
    assert calls_to_open(chain(200)) < 2.5 * calls_to_open(chain(100))


def tiny(path: Path, graph: bytes = b"") -> Path:
    """A SavedModel with one graph, written by TensorFlow's own protobuf."""
    saved = saved_model_pb2.SavedModel()
    saved.meta_graphs.add().meta_info_def.tensorflow_version = "2.21.0"
    saved.meta_graphs[0].graph_def.SetInParent()
    path.mkdir()
    (path / "saved_model.pb").write_bytes(saved.SerializeToString() + graph)
    return path


def test_a_model_without_any_weights_says_so(tmp_path: Path) -> None:
    model = open_model(tiny(tmp_path / "m"))
    assert model.tensors == ()
    assert model.about.notes == ("The model has neither variables nor weights in its graph.",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\x08\x01", "holds no graph"),
        (b"\x12\x7f", "not a SavedModel"),
        (b"\x12\x02\x12\x00" + b"\x1a\x00" * 1_100_000, "more than 1000000 fields"),
    ],
)
def test_a_graph_that_lies_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tiny(tmp_path / "m")
    (path / "saved_model.pb").write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        open_model(path)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [(b"{" * 100_000, "is not JSON|nested too deep"), (b'{"a":' * 100_000, "nested too deep")],
)
def test_keras_metadata_that_is_nested_too_deep_is_refused(tmp_path: Path, metadata: bytes, complaint: str) -> None:
    path = tiny(tmp_path / "m")
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    layer = saved.meta_graphs[0].object_graph_def.nodes.add().user_object
    layer.identifier, layer.metadata = "_tf_keras_layer", metadata.decode()
    (path / "saved_model.pb").write_bytes(saved.SerializeToString())
    with pytest.raises(InputError, match=complaint):
        open_model(path)


def test_a_missing_index_beside_data_is_refused(keras2: Path, tmp_path: Path) -> None:
    path = tiny(tmp_path / "m")
    (path / "variables").mkdir()
    (path / "variables" / "variables.data-00000-of-00001").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"is incomplete: it has data, but no variables\.index"):
        open_model(path)


def test_a_depthwise_constant_with_several_outputs_of_a_channel_has_no_axis_of_inputs() -> None:
    uses = (_Use("DepthwiseConv2dNative", is_output_last=False),)
    assert _axes(uses, (3, 3, 4, 4)) == (None, None)
    assert _axes(uses, (3, 3, 4, 1)) == (2, 3)
