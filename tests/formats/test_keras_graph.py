"""How much Keras models calculate, against the shapes that Keras gives and the graph that TensorFlow makes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, ModelInfo, Operation, Role, Shape, Storage, Tensor
from prunectl.formats.keras.flops import operations, trace_shapes
from prunectl.formats.registry import open_model
from tests.networks import keras, tf_keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.filterwarnings("ignore")


def lenet(k: Any) -> Any:
    layers = k.layers
    return k.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(6, 5, padding="same", activation="tanh", name="c1"),
            layers.AveragePooling2D(2, name="p1"),
            layers.Conv2D(16, 5, name="c2"),
            layers.BatchNormalization(name="norm"),
            layers.MaxPooling2D((3, 2), strides=2, padding="same", name="p2"),
            layers.Flatten(name="flat"),
            layers.Dense(20, name="d1"),
            layers.Dropout(0.5, name="drop"),
            layers.Dense(10, name="d2"),
        ]
    )


def mobile_block(k: Any) -> Any:
    layers = k.layers
    x = inputs = layers.Input((33, 32, 3), name="image")
    x = layers.Rescaling(1 / 255, name="scale")(x)
    x = layers.ZeroPadding2D(((0, 1), (2, 3)), name="pad")(x)
    x = layers.Conv2D(8, 3, strides=2, use_bias=False, name="stem")(x)
    x = layers.ReLU(6.0, name="relu")(x)
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2, name="depthwise")(x)
    side = layers.SeparableConv2D(16, (3, 5), padding="same", name="separable")(x)
    x = layers.Add(name="residual")([x, side])
    x = layers.Concatenate(name="wide")([x, side])
    gate = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    gate = layers.Conv2D(32, 1, activation="sigmoid", name="excite")(gate)
    x = layers.Multiply(name="gated")([x, gate])
    x = layers.Conv2D(12, 3, groups=4, padding="same", name="grouped")(x)
    x = layers.GlobalMaxPooling2D(name="pool")(x)
    return k.Model(inputs, layers.Dense(5, activation="softmax", name="head")(x))


def sequence(k: Any) -> Any:
    layers = k.layers
    x = inputs = layers.Input((3, 5), name="series")
    x = layers.LSTM(4, return_sequences=True, unroll=True, name="lstm")(x)
    x = layers.Bidirectional(layers.GRU(3, return_sequences=True, unroll=True), name="both")(x)
    x = layers.TimeDistributed(layers.Dense(7, name="inner"), name="each")(x)
    x = layers.MultiHeadAttention(2, 3, value_dim=4, name="attention")(x, x)
    x = layers.EinsumDense("abc,cd->abd", output_shape=(3, 8), name="einsum")(x)
    return k.Model(inputs, layers.SimpleRNN(2, unroll=True, name="last")(x))


def shared_and_nested(k: Any) -> Any:
    layers = k.layers
    tower = k.Sequential(
        [layers.Input((9, 4)), layers.SeparableConv1D(6, 3, name="sep"), layers.Flatten()], name="tower"
    )
    body = layers.Input((42,), name="body_in")
    body = k.Model(body, layers.Dense(3, name="dense")(body), name="body")
    twice = layers.Dense(42, name="twice")
    left, right = layers.Input((9, 4), name="left"), layers.Input((9, 4), name="right")
    a, b = tower(left), tower(right)
    both = layers.Subtract(name="difference")([twice(a), twice(twice(b))])
    return k.Model([left, right], body(both))


def zoo(k: Any) -> Any:
    layers = k.layers
    x = inputs = layers.Input((40,), name="tokens")
    x = layers.Embedding(11, 6, name="words")(x)
    x = layers.Conv1D(8, 3, padding="causal", name="causal")(x)
    x = layers.Conv1D(8, 3, strides=3, name="strided")(x)
    x = layers.Cropping1D((1, 0), name="crop")(x)
    x = layers.Reshape((4, -1, 8), name="image")(x)
    x = layers.Conv2DTranspose(5, (3, 2), strides=2, padding="same", name="up")(x)
    x = layers.Conv2DTranspose(4, 3, strides=2, output_padding=1, name="further_up")(x)
    x = layers.UpSampling2D((2, 1), name="stretch")(x)
    x = layers.Permute((3, 1, 2), name="turn")(x)
    x = layers.Reshape((4, 36, 14, 1), name="volume")(x)
    x = layers.Conv3D(2, (2, 3, 3), strides=(1, 2, 2), name="conv3d")(x)
    x = layers.MaxPooling3D((1, 2, 2), name="pool3d")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.RepeatVector(3, name="again")(x)
    return k.Model(inputs, layers.Dense(2, name="head")(x))


MODELS = [lenet, mobile_block, sequence, shared_and_nested, zoo]
KERAS = [pytest.param(keras, id="keras3"), pytest.param(tf_keras, id="keras2")]


def saved(model: Any, path: Path) -> ModelFile:
    model.save(path)
    return open_model(path)


def shapes(layer: Any) -> tuple[Shape, ...]:
    """What Keras says that a layer gives at its first call."""
    outputs = layer.get_output_at(0) if hasattr(layer, "get_output_at") else layer._inbound_nodes[0].outputs
    return tuple(tuple(one.shape)[1:] for one in (outputs if isinstance(outputs, (list, tuple)) else [outputs]))


def total_of_tensorflow(model: Any) -> int:
    """Multiply-accumulates of the operations in the graph that TensorFlow makes of a model."""
    specs = [tf.TensorSpec((1, *one.shape[1:]), one.dtype) for one in model.inputs]
    graph = tf.function(lambda *inputs: model(list(inputs) if len(inputs) > 1 else inputs[0]))
    pending, total = [graph.get_concrete_function(*specs).graph], 0
    functions = {function.name.decode(): function.graph for function in pending[0]._functions.values()}
    while pending:
        for op in pending.pop().get_operations():
            if op.type in {"PartitionedCall", "StatefulPartitionedCall"}:
                pending.append(functions[op.get_attr("f").name])
            total += of_operation(op)
    return total


def elements(shape: Any) -> int:
    # In functions that are compiled by themselves the batch stays open.
    return math.prod(length or 1 for length in shape)


def of_operation(op: Any) -> int:
    sizes = [tuple(one.shape) for one in op.inputs]
    if op.type in {"Conv2D", "Conv3D"}:
        return elements(op.outputs[0].shape) * math.prod(sizes[1][:-1])
    if op.type == "Conv2DBackpropInput":
        return math.prod(sizes[2]) * math.prod(sizes[1][:-1])
    if op.type == "DepthwiseConv2dNative":
        return elements(op.outputs[0].shape) * math.prod(sizes[1][:2])
    if op.type in {"MatMul", "BatchMatMulV2"}:
        assert not op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
        return elements(op.outputs[0].shape) * sizes[0][-1]
    if op.type == "Einsum":
        labels = op.get_attr("equation").decode().partition("->")[0].split(",")
        lengths = dict(
            pair for names, size in zip(labels, sizes, strict=True) for pair in zip(names, size, strict=True)
        )
        return math.prod(lengths.values())
    return 0


@cache
def counted_by_tensorflow(build: Callable[[Any], Any], version: Callable[[], Any]) -> tuple[Any, int]:
    """A model, and how much it calculates: the same in whatever file."""
    network = build(version())
    return network, total_of_tensorflow(network)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("version", KERAS)
@pytest.mark.parametrize("build", MODELS)
def test_shapes_and_counts_are_those_of_the_framework(
    tmp_path: Path, build: Callable[[Any], Any], version: Callable[[], Any], suffix: str
) -> None:
    network, total = counted_by_tensorflow(build, version)
    model = saved(network, tmp_path / f"m{suffix}")
    found = trace_shapes(model)
    for layer in network.layers:
        if type(layer).__name__ != "InputLayer":
            assert found.shapes[layer.name][0] == shapes(layer), layer.name
    assert sum(one.macs for one in found.operations) == total
    kernels = {tensor.name for tensor in model.tensors if tensor.is_prunable}
    assert {one.weight for one in found.operations if one.weight} == kernels
    for one in found.operations:
        assert one.weight or one.layer == "attention"


def test_the_layers_of_a_nested_model_have_the_shapes_that_keras_gives_them(tmp_path: Path) -> None:
    network = shared_and_nested(keras())
    found = trace_shapes(saved(network, tmp_path / "m.keras"))
    for name in ("tower", "body"):
        for layer in network.get_layer(name).layers:
            if type(layer).__name__ != "InputLayer":
                assert found.shapes[f"{name}/{layer.name}"][0] == shapes(layer)
    assert len(found.shapes["tower/sep"]) == 2
    assert len(found.shapes["twice"]) == 3


def test_a_layer_used_three_times_counts_three_times(tmp_path: Path) -> None:
    counted = [one for one in operations(saved(shared_and_nested(keras()), tmp_path / "m.h5")) if one.layer == "twice"]
    assert [one.macs for one in counted] == [42 * 42] * 3
    assert len({one.weight for one in counted}) == 1


@pytest.mark.parametrize("build", [lenet, sequence])
def test_a_saved_model_counts_the_same(tmp_path: Path, build: Callable[[Any], Any]) -> None:
    network, total = counted_by_tensorflow(build, tf_keras)
    # What Keras says of its layers is counted, not their graphs, which take long to write.
    network.save(tmp_path / "m", save_format="tf", save_traces=False)
    counted = operations(open_model(tmp_path / "m"))
    assert sum(one.macs for one in counted) == total
    kernels = {tensor.name for tensor in open_model(tmp_path / "m").tensors if tensor.is_prunable}
    assert {one.weight for one in counted if one.weight} == kernels


@pytest.mark.parametrize("version", KERAS)
def test_a_film_is_convolved_by_both_kernels_at_each_step(tmp_path: Path, version: Callable[[], Any]) -> None:
    k = version()
    layer = k.layers.ConvLSTM2D(4, 3, strides=2, return_sequences=True, name="film")
    network = k.Sequential([k.layers.Input((5, 9, 9, 2)), layer, k.layers.TimeDistributed(k.layers.MaxPooling2D())])
    found = trace_shapes(saved(network, tmp_path / "m.h5"))
    assert found.shapes["film"] == [shapes(layer)] == [((5, 4, 4, 4),)]
    assert [one.macs for one in found.operations] == [5 * 16 * 9 * 2 * 16, 5 * 16 * 9 * 4 * 16]


@pytest.mark.parametrize("version", KERAS)
def test_dilation_channels_first_and_states_are_followed(tmp_path: Path, version: Callable[[], Any]) -> None:
    k = version()
    image, series = k.layers.Input((3, 20, 21), name="image"), k.layers.Input((None, 5), name="series")
    x = k.layers.Conv2D(4, 3, dilation_rate=2, data_format="channels_first", name="dilated")(image)
    x = k.layers.MaxPooling2D(data_format="channels_first", name="pool")(x)
    states = k.layers.LSTM(6, return_state=True, return_sequences=True, name="states")(series)
    network = k.Model([image, series], [k.layers.Flatten(name="flat")(x), *states])
    found = trace_shapes(saved(network, tmp_path / "m.keras"))
    for layer in (one for one in network.layers if type(one).__name__ != "InputLayer"):
        assert found.shapes[layer.name][0] == shapes(layer)
    macs = {one.weight: one.macs for one in found.operations}
    assert macs.pop("dilated/kernel") == 4 * 16 * 17 * 27
    assert set(macs.values()) == {None}


def test_an_unknown_layer_passes_no_shape_on_but_what_is_said_behind_it_counts(tmp_path: Path) -> None:
    k = keras()

    @k.saving.register_keras_serializable("prunectl.tests")
    class Strange(k.layers.Layer):  # type: ignore[name-defined, misc]
        def call(self, x: Any) -> Any:
            return x

    network = k.Sequential([k.layers.Input((4, 6)), Strange(), k.layers.Dense(3, name="behind")])
    model = saved(network, tmp_path / "m.keras")
    assert operations(model) == (Operation("behind", "Dense", 4 * 6 * 3, "behind/kernel"),)
    # An older file does not say what a layer was built for.
    bare = described(
        [{"class_name": "Strange", "config": {"name": "s"}}, dense("behind", 3)], (6, 3), "behind/kernel:0"
    )
    assert operations(bare) == (Operation("behind", "Dense", None),)


def dense(name: str, units: int, **config: Any) -> dict[str, Any]:
    return {"class_name": "Dense", "config": {"name": name, "units": units, **config}}


def described(layers: Any, shape: tuple[int, ...] = (), weight: str = "w", kind: str = "Sequential") -> ModelFile:
    """A model of which nothing but its description and one weight is there."""
    storage = Storage("k", 0, None, 0)
    tensor = Tensor(weight, weight.rpartition("/")[0], shape, np.dtype(np.float32), Role.KERNEL, storage)
    about = ModelInfo(keras={"class_name": kind, "config": layers})
    return ModelFile(Path("m.h5"), "keras-h5", (tensor,), about, ())


def test_the_words_of_keras_1_are_understood() -> None:
    convolution = {"name": "c", "nb_filter": 4, "nb_row": 3, "nb_col": 5, "border_mode": "valid", "subsample": [2, 1]}
    image = {"batch_input_shape": [None, 3, 20, 21], "dim_ordering": "th"}
    layers = [
        {"class_name": "Convolution2D", "config": {**convolution, **image}},
        {"class_name": "MaxPooling2D", "config": {"name": "p", "pool_size": [3, 2], "dim_ordering": "th"}},
        {"class_name": "Flatten", "config": {"name": "f"}},
        {"class_name": "Dense", "config": {"name": "d", "output_dim": 7}},
    ]
    found = trace_shapes(described(layers, (4, 3, 3, 5), "c/c_W:0"))
    assert found.shapes == {"c": [((4, 9, 17),)], "p": [((4, 3, 8),)], "f": [((96,),)], "d": [((7,),)]}
    assert [one.macs for one in found.operations] == [4 * 9 * 17 * 45, 96 * 7]
    assert found.operations[0].weight == "c/c_W:0"


def test_the_gates_that_keras_1_keeps_apart_share_what_their_layer_multiplies() -> None:
    layers = [{"class_name": "LSTM", "config": {"name": "l", "output_dim": 4, "batch_input_shape": [None, 5, 3]}}]
    model = described(layers)
    storage = Storage("k", 0, None, 0)
    tensors = tuple(
        Tensor(f"l_{name}_{gate}:0", "l", shape, np.dtype(np.float32), role, storage)
        for name, shape, role in (("W", (3, 4), Role.KERNEL), ("U", (4, 4), Role.RECURRENT))
        for gate in "ifco"
    )
    counted = operations(ModelFile(model.path, model.format, tensors, model.about, ()))
    assert {one.weight: one.macs for one in counted} == {tensor.name: 5 * math.prod(tensor.shape) for tensor in tensors}


def test_wrappers_of_training_count_what_they_wrap() -> None:
    wrapped = {"name": "prune_low_magnitude_d", "layer": dense("d", 3), "batch_input_shape": [None, 5]}
    model = described(
        [{"class_name": "PruneLowMagnitude", "config": wrapped}], (5, 3), "prune_low_magnitude_d/d/kernel:0"
    )
    assert operations(model) == (Operation("d", "Dense", 15, "prune_low_magnitude_d/d/kernel:0"),)


@pytest.mark.parametrize("config", [None, {}, {"class_name": "VAE", "config": {}}, {"config": {"layers": 7}}])
def test_a_model_without_a_configuration_is_refused(config: Any) -> None:
    model = ModelFile(Path("m.h5"), "keras-h5", (), ModelInfo(keras=config), ())
    with pytest.raises(InputError, match=r"it holds weights but no configuration"):
        operations(model)


def nest(depth: int) -> dict[str, Any]:
    layer = dense("d", 3, batch_input_shape=[None, 5])
    for number in range(depth):
        layer = {"class_name": "Sequential", "config": {"name": f"s{number}", "layers": [layer]}}
    return layer


def double(depth: int) -> dict[str, Any]:
    """Each model calls the one inside it twice: as many calls as a power of two."""
    layer = dense("x", 3)
    for _ in range(depth):
        inner = {**layer, "name": "x", "inbound_nodes": [[["i", 0, 0, {}]], [["x", 0, 0, {}]]]}
        first = {
            "class_name": "InputLayer",
            "name": "i",
            "config": {"batch_input_shape": [None, 3]},
            "inbound_nodes": [],
        }
        ends = {"input_layers": [["i", 0, 0]], "output_layers": [["x", 1, 0]]}
        layer = {"class_name": "Model", "config": {"name": "x", "layers": [first, inner], **ends}}
    return layer


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        (nest(200), r"m\.h5 is refused: its models are nested more than \d+ deep"),
        (double(30), r"m\.h5 is refused: its configuration "),
    ],
    ids=["deep", "doubling"],
)
def test_a_configuration_that_would_never_end_is_refused(layer: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        operations(described([layer]))


HUGE = 10**40


def test_a_layer_is_told_by_its_whole_name_where_that_has_a_slash() -> None:
    described_as = [dense("c", 4, batch_input_shape=[None, 4]), dense("b/c", 4)]
    storage = Storage("k", 0, None, 0)
    tensors = tuple(
        Tensor(f"{name}/kernel:0", "c", (4, 4), np.dtype(np.float32), Role.KERNEL, storage) for name in ("b/c", "c")
    )
    about = ModelInfo(keras={"class_name": "Sequential", "config": described_as})
    counted = operations(ModelFile(Path("m.h5"), "keras-h5", tensors, about, ()))
    assert [one.weight for one in counted] == ["c/kernel:0", "b/c/kernel:0"]


@pytest.mark.parametrize(
    "layer",
    [
        {"class_name": "Conv2D", "config": {"name": "c", "filters": HUGE, "kernel_size": [3, 3]}},
        {"class_name": "Conv2D", "config": {"name": "c", "filters": 4, "kernel_size": [3, 3], "strides": [0, 1]}},
        {"class_name": "Conv2D", "config": {"name": "c", "filters": 4, "kernel_size": [99, 99]}},
        {"class_name": "Conv2D", "config": {"name": "c", "filters": 4, "kernel_size": ["a", {}]}},
        {"class_name": "Conv2D", "config": {"name": "c", "filters": 4, "kernel_size": [3, 3], "groups": 0}},
        {"class_name": "Conv3D", "config": {"name": "c", "filters": 4, "kernel_size": 3}},
        {"class_name": "Dense", "config": {"name": "c"}},
        {"class_name": "Dense", "config": []},
        {"class_name": "Dense", "config": {"units": True}},
        {"class_name": "MaxPooling2D", "config": {"pool_size": [0, 0]}},
        {"class_name": "ZeroPadding2D", "config": {"padding": [[1], 2, 3]}},
        {"class_name": "Cropping2D", "config": {"cropping": 99}},
        {"class_name": "Reshape", "config": {"target_shape": [-1, -1]}},
        {"class_name": "Reshape", "config": {"target_shape": [0, -1]}},
        {"class_name": "Reshape", "config": {"target_shape": [2] * 100}},
        {"class_name": "Permute", "config": {"dims": [9, 9, 9]}},
        {"class_name": "RepeatVector", "config": {"n": -1}},
        {"class_name": "Concatenate", "config": {"axis": 9}},
        {"class_name": "Dot", "config": {"axes": 7}},
        {"class_name": "LSTM", "config": {"units": 3}},
        {"class_name": "RNN", "config": {"cell": {"class_name": "StackedRNNCells", "config": {"cells": [1, 2]}}}},
        {"class_name": "EinsumDense", "config": {"equation": "...,->", "output_shape": [1]}},
        {"class_name": "EinsumDense", "config": {"equation": "abcd,de->abce", "output_shape": "x"}},
        {"class_name": "MultiHeadAttention", "config": {"num_heads": None}},
        {"class_name": "TimeDistributed", "config": {"layer": {"class_name": "Conv2D"}}},
        {"class_name": "Bidirectional", "config": {"layer": {"class_name": 7}}},
        {"class_name": "Bidirectional", "config": {"layer": dense("x", 2), "backward_layer": 3}},
        {"class_name": "Magic", "config": {"layer": dense("x", 2)}},
        {"class_name": ["Dense"]},
    ],
    ids=lambda layer: str(layer)[:60],
)
def test_nonsense_has_no_shape_and_does_no_harm(layer: dict[str, Any]) -> None:
    first = {"class_name": "Activation", "config": {"name": "first", "batch_input_shape": [None, 8, 9, 3]}}
    counted = operations(described([first, layer, dense("behind", 3)]))
    assert counted[-1].layer == "behind"
    assert all(one.macs is None or 0 <= one.macs < 1 << 63 for one in counted)


@pytest.mark.parametrize(
    "nodes",
    [
        [[["b", 0, 0, {}]]],
        [[["a", 0, 0, {}]]],
        [[["nobody", 7, 7, {}]]],
        [[["i", -1, -1, {"y": ["i", 0, 0]}]]],
        [["i", 0, 0, {}]],
        [{"args": 7, "kwargs": []}],
        [{"args": [{"class_name": "__keras_tensor__", "config": {"keras_history": ["i", 0]}}]}],
        [7, None, "x"],
    ],
    ids=str,
)
def test_a_graph_of_nonsense_ends(nodes: list[Any]) -> None:
    layers = [
        {"class_name": "InputLayer", "name": "i", "config": {"batch_input_shape": [None, 3]}, "inbound_nodes": []},
        {**dense("a", 3), "name": "a", "inbound_nodes": nodes},
        {**dense("b", 3), "name": "b", "inbound_nodes": [[["a", 0, 0, {}]]]},
    ]
    assert {one.layer for one in operations(described({"layers": layers}, kind="Model"))} == {"a", "b"}
