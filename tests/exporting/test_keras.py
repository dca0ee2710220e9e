"""Keras 2 and 3, and SavedModels: to ONNX, TensorFlow Lite, SavedModel and each other's files."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl import api
from prunectl.errors import InputError, UntrustedError, UsageError, WorkError
from prunectl.exporting.compare import ExportResult
from prunectl.formats.registry import open_model
from tests.contract import Array
from tests.exporting import nets_keras
from tests.exporting.exporting import DIGITS, by_onnxruntime, by_tflite, digits, export, random, save, zeros
from tests.networks import keras, tf_keras
from tests.running import FIXTURES

pytest.importorskip("tf2onnx")

KERAS = {"2": (tf_keras, ".h5"), "3": (keras, ".keras")}
SOURCES = ("digits_cnn.h5", "digits_cnn.keras", "digits_cnn_savedmodel")
SHAPES = {
    "resnet": [(5, 8, 8, 3)],
    "mobilenet": [(5, 8, 8, 3)],
    "lstm": [(5, 6, 3)],
    "transformer": [(5, 6, 8)],
    "several": [(5, 4), (5, 3)],
}


@cache
def reference() -> Array:
    """What the digits network answers in the library that wrote it."""
    found: Array = tf_keras().models.load_model(FIXTURES / "digits_cnn.h5", compile=False)(digits()).numpy()
    return found


def saved(which: str, name: str, folder: Path) -> tuple[Path, Any]:
    """Return a file of a small network, and the network."""
    library, suffix = KERAS[which]
    model = nets_keras.made(library(), name)
    place = folder / f"{name}{suffix}"
    save(model, place)
    return place, model


def answers(model: Any, inputs: list[Array]) -> list[Array]:
    """What a network answers."""
    found = model(inputs if len(inputs) > 1 else inputs[0], training=False)
    return [one.numpy() for one in (found if isinstance(found, list) else [found])]


Exported = Callable[[str, str], tuple[ExportResult, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """What becomes of a fixture and where, each pair of source and suffix once: conversions take seconds."""

    @cache
    def run(source: str, suffix: str) -> tuple[ExportResult, Path]:
        place = tmp_path_factory.mktemp("exported") / f"m{suffix}"
        return export(source, place, **({"data": DIGITS} if suffix == ".onnx" else {})), place

    return run


@pytest.mark.parametrize("source", SOURCES)
def test_the_digits_answer_alike_in_onnxruntime_and_in_tflite(source: str, exported: Exported, tmp_path: Path) -> None:
    found, place = exported(source, ".onnx")
    assert found.comparison is not None
    assert found.comparison.top1_agreement == 1.0
    (answered,) = by_onnxruntime(place, digits())
    np.testing.assert_allclose(answered, reference(), atol=1e-4)
    if source == SOURCES[1]:
        return
    export(source, tmp_path / "m.tflite")
    (lite,) = by_tflite(tmp_path / "m.tflite", {"pixels": digits()}).values()
    np.testing.assert_allclose(lite, reference(), atol=1e-4)


@pytest.mark.parametrize("source", SOURCES[:2])
def test_a_saved_model_serves_what_the_model_answers_and_holds_each_variable_once(source: str, tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    export(source, tmp_path / "served", to="saved-model")
    served = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    (answered,) = served(pixels=tf.constant(digits())).values()
    np.testing.assert_allclose(answered.numpy(), reference(), atol=1e-5)
    model = open_model(tmp_path / "served")
    assert sum(tensor.size for tensor in model.tensors) == 9_802


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
@pytest.mark.parametrize(("which", "policy"), [("2", "mixed_float16"), ("3", "mixed_float16"), ("3", "bfloat16")])
def test_layers_that_compute_in_16_bits_compute_in_32_bits_outside_of_keras(
    which: str, policy: str, suffix: str, tmp_path: Path
) -> None:
    library, source_suffix = KERAS[which]
    k = library()

    def built(dtype: str) -> Any:
        of = k.layers
        inner = k.Sequential([of.Input((8, 8, 3)), of.Conv2D(4, 3, activation="relu", dtype=dtype)])
        return k.Sequential(
            [of.Input((8, 8, 3), name="image"), inner, of.Flatten(dtype=dtype), of.Dense(2, dtype="float32")]
        )

    model, plain = built(policy), built("float32")
    plain.set_weights([np.asarray(weight, "float32") for weight in model.get_weights()])
    save(model, tmp_path / f"m{source_suffix}")
    result = export(tmp_path / f"m{source_suffix}", tmp_path / f"m{suffix}")
    (inputs,) = random((3, 8, 8, 3))
    output = tmp_path / f"m{suffix}"
    (found,) = by_onnxruntime(output, inputs) if suffix == ".onnx" else by_tflite(output, {"image": inputs}).values()
    np.testing.assert_allclose(found, answers(plain, [inputs])[0], atol=1e-5)
    assert any("32-bit floats in the output" in note for note in result.notes)


@pytest.mark.parametrize("which", KERAS)
def test_a_saved_model_is_compared_whatever_the_order_of_its_inputs(which: str, tmp_path: Path) -> None:
    library, suffix = KERAS[which]
    k, tf = library(), pytest.importorskip("tensorflow")
    late, early = k.layers.Input((4,), name="late"), k.layers.Input((3,), name="early")
    model = k.Model([late, early], k.layers.concatenate([k.layers.Dense(2)(late), k.layers.Dense(5)(early)]))
    save(model, tmp_path / f"m{suffix}")
    export(tmp_path / f"m{suffix}", tmp_path / "served", to="saved-model")
    inputs = random((5, 4), (5, 3))
    served = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    (found,) = served(late=tf.constant(inputs[0]), early=tf.constant(inputs[1])).values()
    np.testing.assert_allclose(found, answers(model, inputs)[0], atol=1e-5)


@pytest.mark.parametrize(("source", "suffix"), [("digits_cnn.h5", ".keras"), ("digits_cnn.keras", ".h5")])
def test_archives_and_hdf5_become_each_other_in_their_own_library(source: str, suffix: str, exported: Exported) -> None:
    _, place = exported(source, suffix)
    library = tf_keras() if source.endswith(".h5") else keras()
    loaded = library.models.load_model(place)
    np.testing.assert_allclose(np.asarray(loaded(digits())), reference(), atol=1e-5)


def test_a_saved_model_of_keras_becomes_a_file_of_keras(tmp_path: Path) -> None:
    export("digits_cnn_savedmodel", tmp_path / "m.h5")
    loaded = tf_keras().models.load_model(tmp_path / "m.h5", compile=False)
    np.testing.assert_allclose(loaded(digits()).numpy(), reference(), atol=1e-5)


def test_a_saved_model_becomes_one_that_serves_and_holds_nothing_of_training(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    model = tf_keras().Sequential([tf_keras().layers.Input((3,), name="x"), tf_keras().layers.Dense(2)])
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    tf.saved_model.save(model, str(tmp_path / "trained"))
    export(tmp_path / "trained", tmp_path / "served", to="saved-model")
    before, after = (sum(one.size for one in open_model(tmp_path / name).tensors) for name in ("trained", "served"))
    assert before > after == 8
    (inputs,) = random((2, 3))
    (answered,) = (
        tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"](tf.constant(inputs)).values()
    )
    np.testing.assert_allclose(answered.numpy(), answers(model, [inputs])[0], atol=1e-6)


@pytest.mark.parametrize(("which", "name"), [*(("3", name) for name in nets_keras.NETS), ("2", "lstm")])
def test_networks_of_every_kind_answer_alike_as_onnx(which: str, name: str, tmp_path: Path) -> None:
    place, model = saved(which, name, tmp_path)
    export(place, tmp_path / "m.onnx")
    inputs = random(*SHAPES[name])
    for ours, theirs in zip(by_onnxruntime(tmp_path / "m.onnx", *inputs), answers(model, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # What was zero is, and what exporters fold into kernels zeros survive.
    kernels = [array for layer in model.layers for array in layer.get_weights() if array.ndim > 1]
    assert zeros(tmp_path / "m.onnx") >= sum(int((array == 0).sum()) for array in kernels)


@pytest.mark.parametrize(("which", "name"), [("2", "mobilenet"), ("3", "transformer"), ("3", "several")])
def test_networks_of_every_kind_answer_alike_in_tflite(which: str, name: str, tmp_path: Path) -> None:
    place, model = saved(which, name, tmp_path)
    export(place, tmp_path / "m.tflite")
    inputs = random(*SHAPES[name])
    found = by_tflite(tmp_path / "m.tflite", dict(zip([one.name for one in model.inputs], inputs, strict=True)))
    for ours, theirs in zip(sorted(found.values(), key=lambda one: one.shape), answers(model, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_what_tflite_cannot_do_with_open_axes_it_does_with_fixed_ones(tmp_path: Path) -> None:
    place, model = saved("3", "lstm", tmp_path)
    with pytest.raises(WorkError, match=r"tf\.TensorListReserve requires") as caught:
        export(place, tmp_path / "m.tflite")
    assert "input='steps:1,6,3'" in caught.value.hint
    assert not (tmp_path / "m.tflite").exists()
    export(place, tmp_path / "m.tflite", input=["steps:2,6,3"])
    (inputs,) = random((2, 6, 3))
    (found,) = by_tflite(tmp_path / "m.tflite", {"steps": inputs}).values()
    np.testing.assert_allclose(found, answers(model, [inputs])[0], atol=1e-5)


def test_names_are_the_users_and_the_batch_is_open_or_as_said(exported: Exported, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    _, place = exported("digits_cnn.keras", ".onnx")
    graph = onnx.load(place).graph
    assert [graph.input[0].name, graph.output[0].name] == ["pixels", "fc2"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    export("digits_cnn.keras", tmp_path / "n.onnx", input=["image:2,8,8,1:f32"], opset=15, metadata=["author=me"])
    model = onnx.load(tmp_path / "n.onnx")
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [2, 8, 8, 1]
    assert model.graph.input[0].name == "image"
    assert model.opset_import[0].version == 15
    assert {one.key: one.value for one in model.metadata_props} == {"author": "me"}
    names = {one.name for one in graph.initializer}
    assert sum("kernel" in name for name in names) == 4


@pytest.mark.parametrize(
    ("source", "suffix"), [("digits_cnn.keras", ".onnx"), ("digits_cnn.keras", ".h5"), ("digits_cnn.h5", ".keras")]
)
def test_the_same_input_gives_the_same_bytes(source: str, suffix: str, exported: Exported, tmp_path: Path) -> None:
    _, place = exported(source, suffix)
    export(source, tmp_path / f"again{suffix}")
    assert place.read_bytes() == (tmp_path / f"again{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["m.onnx", "m.tflite"])
def test_half_is_half_as_big_and_near(name: str, tmp_path: Path) -> None:
    found = export("digits_cnn.h5", tmp_path / name, half=True, data=DIGITS)
    assert found.after.bytes.raw < 0.62 * 40_000
    assert found.comparison is not None
    assert found.comparison.top1_agreement is not None
    assert found.comparison.top1_agreement > 0.98


@pytest.mark.parametrize("name", ["m.onnx", "m.tflite"])
def test_integers_are_a_third_as_big_and_near_and_zeros_stay_zeros(name: str, tmp_path: Path) -> None:
    place = tmp_path / "sparse.h5"
    api.prune(FIXTURES / "digits_cnn.h5", place, sparsity=0.5)
    found = export(place, tmp_path / name, int8=True, data=DIGITS, samples=16)
    assert found.after.bytes.raw < 0.5 * 40_000
    assert found.comparison is not None
    assert found.comparison.top1_agreement is not None
    assert found.comparison.top1_agreement == 1.0
    kernels = [tensor for tensor in open_model(tmp_path / name).tensors if tensor.size in {72, 1152, 8192, 320}]
    held = open_model(tmp_path / name)
    integers = [held.read(tensor) for tensor in kernels]
    assert {array.dtype for array in integers} == {np.dtype(np.int8)}
    assert sum(int((array == 0).sum()) for array in integers) >= 0.5 * 9_736 - 4


def test_zeros_are_left_out_of_onnx_when_asked(tmp_path: Path) -> None:
    api.prune(FIXTURES / "digits_cnn.h5", tmp_path / "sparse.h5", sparsity=0.9)
    export(tmp_path / "sparse.h5", tmp_path / "dense.onnx")
    found = export(tmp_path / "sparse.h5", tmp_path / "m.onnx", sparse=True)
    assert (tmp_path / "m.onnx").stat().st_size < 0.6 * (tmp_path / "dense.onnx").stat().st_size
    assert found.after.sparsity == pytest.approx(found.before.sparsity, abs=0.01)


def test_a_sparse_tflite_that_its_own_interpreter_gets_wrong_is_not_written(tmp_path: Path) -> None:
    place, _ = saved("3", "several", tmp_path)
    with pytest.raises(WorkError, match="the output one differs"):
        export(place, tmp_path / "m.tflite", sparse=True)
    assert not (tmp_path / "m.tflite").exists()


def test_wrappers_of_tfmot_are_taken_off_on_the_way(tmp_path: Path) -> None:
    found = export("wrapped_by_tfmot.h5", tmp_path / "m.onnx")
    assert any("tfmot" in remark for remark in found.notes)
    assert not [tensor for tensor in open_model(tmp_path / "m.onnx").tensors if "mask" in tensor.name]


def test_custom_layers_and_code_ask_for_what_explains_them(tmp_path: Path) -> None:
    with pytest.raises(UntrustedError, match="Lambda layer"):
        export("lambda_layer.keras", tmp_path / "m.onnx")
    export("lambda_layer.keras", tmp_path / "m.onnx", trust=True)

    class Twice(tf_keras().layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x * 2

    model = tf_keras().Sequential([tf_keras().layers.Input((3,)), Twice(), tf_keras().layers.Dense(2)])
    save(model, tmp_path / "twice.h5")
    with pytest.raises(InputError, match="Twice") as caught:
        export(tmp_path / "twice.h5", tmp_path / "n.onnx")
    assert "custom_objects=" in caught.value.hint
    code = "import tf_keras\n\nclass Twice(tf_keras.layers.Layer):\n    def call(self, x):\n        return x * 2\n\n"
    (tmp_path / "layers.py").write_text(f"{code}ALL = {{'Twice': Twice}}\n")
    export(tmp_path / "twice.h5", tmp_path / "n.onnx", custom_objects=f"{tmp_path}/layers.py:ALL")


def test_an_operator_that_a_format_has_not_is_named(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    k = tf_keras()
    x = k.layers.Input((3, 3))
    model = k.Model(x, k.layers.Dense(2)(k.layers.Reshape((1,))(tf.math.lgamma(tf.linalg.det(x)))))
    save(model, tmp_path / "odd.h5")
    with pytest.raises(WorkError, match=r"Lgamma \(.*lgamma"):
        export(tmp_path / "odd.h5", tmp_path / "m.onnx")
    with pytest.raises(WorkError, match=r"tf\.\w+ is neither") as caught:
        export(tmp_path / "odd.h5", tmp_path / "m.tflite")
    # No shape brings it.
    assert caught.value.hint == ""


def test_the_shape_of_an_input_with_a_single_axis_is_given_as_it_is_taken(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    module = tf.Module()
    module.serve = tf.function(lambda x: {"out": tf.roll(x, 1, 0)}, input_signature=[tf.TensorSpec((None,), name="x")])
    tf.saved_model.save(module, str(tmp_path / "rolled"), signatures=module.serve)
    with pytest.raises(WorkError, match=r"tf\.Roll is neither") as caught:
        export(tmp_path / "rolled", tmp_path / "m.tflite")
    assert caught.value.hint.endswith("input='x:1'")
    export(tmp_path / "rolled", tmp_path / "m.tflite", input=["x:1"])
    (inputs,) = random((1,))
    (found,) = by_tflite(tmp_path / "m.tflite", {"x": inputs}).values()
    np.testing.assert_array_equal(found, inputs)


def test_open_axes_ask_how_long_they_are(tmp_path: Path) -> None:
    k = keras()
    model = k.Sequential([k.layers.Input((None, 3), name="steps"), k.layers.LSTM(4)])
    save(model, tmp_path / "open.keras")
    with pytest.raises(UsageError, match=r"steps of the model has the shape \?,\?,3"):
        export(tmp_path / "open.keras", tmp_path / "m.onnx")
    export(tmp_path / "open.keras", tmp_path / "m.onnx", input=["?,?,3"])
    for length in (2, 9):
        (inputs,) = random((3, length, 3))
        (found,) = by_onnxruntime(tmp_path / "m.onnx", inputs)
        np.testing.assert_allclose(found, answers(model, [inputs])[0], atol=1e-5)


def test_layers_that_run_as_a_graph_alone_are_run_so(tmp_path: Path) -> None:
    k = tf_keras()
    model = k.Sequential([k.layers.Input((3, 4, 4, 1)), k.layers.ConvLSTM2D(2, 3), k.layers.Flatten()])
    save(model, tmp_path / "m.h5")
    export(tmp_path / "m.h5", tmp_path / "m.onnx")
    (inputs,) = random((2, 3, 4, 4, 1))
    (found,) = by_onnxruntime(tmp_path / "m.onnx", inputs)
    np.testing.assert_allclose(found, model.predict_on_batch(inputs), atol=1e-5)


@pytest.mark.parametrize("which", KERAS)
def test_convolutions_in_groups_which_keras_has_xla_compile_become_onnx(which: str, tmp_path: Path) -> None:
    library, suffix = KERAS[which]
    k = library()
    grouped = k.layers.Conv2D(16, 3, groups=4, activation="relu")
    model = k.Sequential([k.layers.Input((8, 8, 8)), grouped, k.layers.Conv2D(8, 3, groups=8), k.layers.Flatten()])
    save(model, tmp_path / f"m{suffix}")
    export(tmp_path / f"m{suffix}", tmp_path / "m.onnx")
    (inputs,) = random((3, 8, 8, 8))
    (found,) = by_onnxruntime(tmp_path / "m.onnx", inputs)
    np.testing.assert_allclose(found, answers(model, [inputs])[0], atol=1e-5)
    nodes = importlib.import_module("onnx").load(tmp_path / "m.onnx").graph.node
    groups = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "group"]
    assert groups == [4, 8]


def test_a_constant_from_outside_of_a_function_is_none_of_the_inputs_in_onnx(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    # TensorFlow copies smaller ones into the graph.
    outside, inside = (array[0] for array in random((1, 16, 16), (1, 16, 3)))
    module = tf.Module()
    module.outside, module.inside = tf.constant(outside), tf.Variable(inside)
    inputs = tf.TensorSpec((None, 16), tf.float32)
    served = tf.function(lambda x: {"y": x @ module.outside @ module.inside}, input_signature=[inputs])
    tf.saved_model.save(module, str(tmp_path / "served"), signatures=served)
    export(tmp_path / "served", tmp_path / "m.onnx")
    (x,) = random((2, 16))
    (found,) = by_onnxruntime(tmp_path / "m.onnx", x)
    np.testing.assert_allclose(found, x @ outside @ inside, rtol=1e-4)


def test_a_loop_is_not_calibrated_and_the_way_that_is_shown_works(tmp_path: Path) -> None:
    place, model = saved("3", "lstm", tmp_path)
    inputs = random((60, 6, 3))
    np.savez(tmp_path / "data.npz", x=inputs[0])
    words = {"int8": True, "input": ["1,6,3"]}
    with pytest.raises(WorkError, match=r"cannot calibrate .* it has a loop") as caught:
        export(place, tmp_path / "m.tflite", data=str(tmp_path / "data.npz"), **words)
    assert "leave out" in caught.value.hint
    assert not (tmp_path / "m.tflite").exists()
    export(place, tmp_path / "m.tflite", **words)
    one = [inputs[0][:1]]
    found = next(iter(by_tflite(tmp_path / "m.tflite", {model.inputs[0].name: one[0]}).values()))
    np.testing.assert_allclose(found, answers(model, one)[0], atol=0.05)


def test_a_notebook_and_a_program_without_a_console_see_no_warning_of_a_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither has a stream that is the file descriptor.
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        api.export(FIXTURES / "digits_cnn.h5", tmp_path / "digits.tflite")
    assert not seen
    assert (tmp_path / "digits.tflite").stat().st_size > 0
