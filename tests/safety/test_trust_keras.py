"""Code that a Keras file names does not run without --trust, whatever the trick and whatever the command."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prunectl.errors import UntrustedError, UsageError
from prunectl.formats import trust
from prunectl.formats.pure_names import CLASSES, FUNCTIONS_OF_TENSORFLOW
from prunectl.formats.registry import open_model
from prunectl.training.backend import TrainOptions
from tests.networks import keras, tf_keras
from tests.running import FIXTURES
from tests.safety.cost import assert_refused_cheaply, cost
from tests.training.keras import nets
from tests.training.keras.nets import both

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
FEATURES, UNITS = 6, 4
Config = Mapping[str, Any]


def wrapped(function: str, kind: str = "TFOpLambda") -> dict[str, Any]:
    """A layer of Keras 2 around a function of TensorFlow."""
    return {"class_name": kind, "config": {"name": "deed", "dtype": "float32", "function": function}}


def functional(*layers: Config) -> dict[str, Any]:
    """A model of an input, two dense layers and others, which hang on nothing."""
    x = {
        "class_name": "InputLayer",
        "config": {"batch_input_shape": [None, FEATURES], "dtype": "float32", "name": "x"},
        "name": "x",
        "inbound_nodes": [],
    }
    dense = [
        {
            "class_name": "Dense",
            "config": {"name": name, "units": UNITS, "activation": activation},
            "name": name,
            "inbound_nodes": [[[before, 0, 0, {}]]],
        }
        for before, name, activation in (("x", "hidden", "relu"), ("hidden", "dense", "softmax"))
    ]
    inside = {
        "name": "model",
        "layers": [x, *layers, *dense],
        "input_layers": [["x", 0, 0]],
        "output_layers": [["dense", 0, 0]],
    }
    return {"class_name": "Functional", "config": inside}


def h5(path: Path, config: Config, training: Config | None = None) -> Path:
    """A file as Keras 2 writes it, without Keras."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = "2.13.1", "tensorflow"
        file.attrs["model_config"] = json.dumps(config)
        if training is not None:
            file.attrs["training_config"] = json.dumps(training)
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [b"hidden", b"dense"]
        for name, rows in (("hidden", FEATURES), ("dense", UNITS)):
            group = weights.create_group(name)
            group.attrs["weight_names"] = [f"{name}/kernel:0".encode(), f"{name}/bias:0".encode()]
            group[f"{name}/kernel:0"] = np.ones((rows, UNITS), np.float32)
            group[f"{name}/bias:0"] = np.zeros(UNITS, np.float32)
    return path


def archive(path: Path, change: Any) -> Path:
    """The fixture of Keras 3 with another configuration."""
    with zipfile.ZipFile(FIXTURES / "digits_cnn.keras") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                change(config["config"]["layers"])
                content = json.dumps(config).encode()
            new.writestr(name, content)
    return path


def writing(canary: Path) -> dict[str, Any]:
    """A layer that writes a file while the model is rebuilt."""
    deed = {"inbound_nodes": [["_CONSTANT_VALUE", -1, str(canary), {"contents": "sings"}]], "name": "deed"}
    return {**wrapped("compat.v1.write_file"), **deed}


def test_a_function_that_the_file_names_is_refused_before_keras_is_imported(tmp_path: Path) -> None:
    path = h5(tmp_path / "m.h5", functional(writing(tmp_path / "canary")))
    found = cost("export", path, "-o", tmp_path / "out.onnx", scratch=tmp_path / "scratch")
    assert "compat.v1.write_file of TFOpLambda deed" in found.outcome.err
    assert_refused_cheaply(found)


def of_other_module(name: str, module: str, kind: str = "function") -> Any:
    return {"class_name": kind, "config": name, "module": module, "registered_name": name}


@pytest.mark.parametrize(
    "evil",
    [
        pytest.param(of_other_module("system", "os"), id="os.system"),
        pytest.param(
            {"class_name": "TFSMLayer", "module": "keras.layers", "config": {"filepath": "/m"}}, id="TFSMLayer"
        ),
    ],
)
def test_nobody_looks_for_what_an_archive_names(evil: Any, tmp_path: Path) -> None:
    def change(layers: list[dict[str, Any]]) -> None:
        layers[1]["config"]["kernel_initializer"] = evil

    path = archive(tmp_path / "m.keras", change)
    found = cost("export", path, "-o", tmp_path / "out.onnx", scratch=tmp_path / "scratch")
    assert "holds code" in found.outcome.err
    assert_refused_cheaply(found)


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (wrapped("io.write_file"), "operation io.write_file of TFOpLambda deed"),
        (wrapped("compat.v1.gfile.Copy"), "operation compat.v1.gfile.Copy of TFOpLambda deed"),
        (wrapped("load_library"), "operation load_library of TFOpLambda deed"),
        (wrapped("print"), "operation print of TFOpLambda deed"),
        (wrapped("numpy_function"), "operation numpy_function of TFOpLambda deed"),
        (wrapped("raw_ops.WriteFile"), "operation raw_ops.WriteFile of TFOpLambda deed"),
        (wrapped("raw_ops.PrintV2"), "operation raw_ops.PrintV2 of TFOpLambda deed"),
        (wrapped("random.fixed_unigram_candidate_sampler"), "operation random.fixed_unigram_candidate_sampler of TFOp"),
        (wrapped("keras.utils.get_file"), "operation keras.utils.get_file of TFOpLambda deed"),
        (wrapped("keras.models.load_model"), "operation keras.models.load_model of TFOpLambda deed"),
        (wrapped("compat.v1.compat.v1.reshape"), "operation compat.v1.compat.v1.reshape"),
        (wrapped(""), "operation  of TFOpLambda deed"),
        (wrapped("io.write_file", "SlicingOpLambda"), "operation io.write_file of SlicingOpLambda deed"),
        ({"class_name": "TFOpLambda", "config": {"function": ["math.add"]}}, "operation  of TFOpLambda"),
        (
            {"class_name": "ClassMethod", "config": {"cls_symbol": "data.Dataset", "method_name": "from_generator"}},
            "operation data.Dataset.from_generator of ClassMethod",
        ),
        ({"class_name": "InstanceMethod", "config": {"attr_name": "__reduce__"}}, "operation __reduce__ of Instance"),
        ({"class_name": "InstanceProperty", "config": {"attr_name": "graph"}}, "operation graph of InstanceProperty"),
        (
            {"class_name": "TensorFlowOpLayer", "config": {"name": "a", "node_def": {"op": "WriteFile"}}},
            "operation WriteFile of TensorFlowOpLayer a",
        ),
        (
            {
                "class_name": "TensorFlowOpLayer",
                "config": {"name": "a", "node_def": "\n\x01n\x12\x04Relu\x12\x06PyFunc"},
            },
            "operation PyFunc of TensorFlowOpLayer a",
        ),
        ({"class_name": "TensorFlowOpLayer", "config": {"name": "a", "node_def": "\x12\x50"}}, "a damaged node"),
        ({"class_name": "TensorFlowOpLayer", "config": {"name": "a"}}, "operation  of TensorFlowOpLayer a"),
        ({"class_name": "Lambda", "config": {"name": "l"}}, "Lambda layer l"),
        ({"class_name": "__lambda__", "config": {"value": ["4wAAAA=="]}}, "a function"),
        ({"class_name": "TorchModuleWrapper", "module": "keras.layers", "config": {"name": "t"}}, "TorchModuleWrapper"),
        ({"class_name": "JaxLayer", "module": "keras.layers", "config": {"name": "j"}}, "JaxLayer layer j"),
        (of_other_module("system", "os"), "custom function system"),
        (of_other_module("get_file", "keras.utils"), "custom function get_file"),
        (of_other_module("get_file", "keras.activations"), "custom function get_file"),
        (of_other_module("relu", "keras.src.utils.file_utils"), "custom function relu"),
        (of_other_module("relu", "kerasx.activations"), "custom function relu"),
        (of_other_module("Dense", "os", "Dense"), "custom class Dense"),
        ({"class_name": "Dense", "module": "keras.utils", "config": {}}, "custom class Dense"),
        ({"class_name": "Dense", "module": ["keras.layers"], "config": {}}, "custom class Dense"),
        ({"class_name": "Constant", "module": "tensorflow.python.ops.script_ops"}, "custom class Constant"),
        ({"class_name": "gfile", "module": "tensorflow.python.ops.init_ops_v2"}, "custom class gfile"),
        ({"class_name": "Popen", "module": "subprocess", "config": {"args": "true"}}, "custom class Popen"),
        ({"class_name": "get_file", "module": "keras.utils", "config": {}}, "custom class get_file"),
        ({"class_name": "deserialize_keras_object", "config": {}}, "custom class deserialize_keras_object"),
        ({"class_name": "Mine>Net", "config": {}}, "custom class Net"),
        ({"class_name": "Dense", "registered_name": "Mine>Dense", "config": {}}, "custom class Dense"),
        (
            {"class_name": "__typespec__", "spec_name": "Evil", "module": "os", "config": []},
            "custom class __typespec__",
        ),
        (
            {"class_name": "__typespec__", "type_spec": "TensorSpec", "spec_name": "Lambda", "module": "tensorflow"},
            "custom class __typespec__",
        ),
        (
            {"class_name": "__typespec__", "spec_name": "TensorSpec", "module": "evil", "config": []},
            "custom class __typespec__",
        ),
        (
            {"class_name": "__typespec__", "spec_name": "TensorSpec", "registered_name": "zz", "config": []},
            "custom class __typespec__",
        ),
        (
            {"class_name": "Dense", "module": "keras.src.layers.core.lambda_layer", "registered_name": "Lambda"},
            "custom class Dense",
        ),
        (
            {"class_name": "function", "config": "relu", "module": "keras.activations", "registered_name": "get_file"},
            "custom function relu",
        ),
        (
            {"class_name": "StringLookup", "config": {"name": "s", "vocabulary": "/etc/passwd"}},
            "file /etc/passwd of StringLookup s",
        ),
        (
            {"class_name": "TextVectorization", "config": {"name": "v", "vocabulary": "https://x/v.txt"}},
            "file https://x/v.txt of TextVectorization v",
        ),
    ],
)
@pytest.mark.parametrize("place", ["layer", "setting", "wrapper", "cell", "nested", "argument"])
def test_whatever_is_not_allowed_is_named_wherever_it_hides(place: str, evil: Any, named: str) -> None:
    places: dict[str, Any] = {
        "layer": functional(evil),
        "setting": functional({"class_name": "Dense", "config": {"a": [{"b": evil}]}}),
        "wrapper": functional({"class_name": "TimeDistributed", "config": {"layer": evil}}),
        "cell": functional(
            {"class_name": "RNN", "config": {"cell": {"class_name": "StackedRNNCells", "config": {"cells": [evil]}}}}
        ),
        "nested": functional(functional(functional(evil))),
        "argument": functional({"class_name": "Add", "config": {}, "inbound_nodes": [["x", 0, 0, {"y": evil}]]}),
    }
    facts = trust.facts_in(places[place])
    assert facts
    assert named in facts[0].words


@pytest.mark.parametrize(
    "harmless",
    [
        wrapped("nn.relu"),
        wrapped("compat.v1.nn.relu"),
        wrapped("__operators__.getitem", "SlicingOpLambda"),
        wrapped("raw_ops.AddV2"),
        {"class_name": "TensorFlowOpLayer", "config": {"node_def": {"op": "AddV2"}}},
        {"class_name": "TensorFlowOpLayer", "config": {"node_def": "\n\x01n\x12\x04Relu"}},
        {"class_name": "ClassMethod", "config": {"cls_symbol": "RaggedTensor", "method_name": "from_tensor"}},
        {"class_name": "InstanceMethod", "config": {"attr_name": "to_tensor"}},
        {"class_name": "Dense", "module": "keras.layers", "config": {}, "registered_name": None},
        {"class_name": "Functional", "module": "keras.src.engine.functional", "config": {}},
        {"class_name": "Functional", "module": "tf_keras.src.engine.functional", "config": {}},
        {"class_name": "Constant", "module": "tensorflow.python.ops.init_ops_v2", "config": {"value": 0}},
        {"class_name": "Custom>Adam", "config": {"learning_rate": 0.1}},
        {"class_name": "function", "config": "relu", "module": "builtins", "registered_name": "relu"},
        {"class_name": "StringLookup", "config": {"vocabulary": ["a", "b"]}},
        {"class_name": "__tuple__", "items": [1, 2]},
        {"class_name": "TypeSpec", "type_spec": "tf.TensorSpec", "serialized": []},
    ],
)
def test_what_reckons_needs_no_trust(harmless: Any) -> None:
    assert trust.facts_in(functional(harmless)) == ()


def test_a_hostile_name_is_cut(tmp_path: Path) -> None:
    path = h5(tmp_path / "m.h5", functional(wrapped("w" * 50_000)))
    assert_refused_cheaply(cost("export", path, "-o", tmp_path / "o.onnx", scratch=tmp_path / "scratch"))


def test_custom_objects_explain_custom_classes_and_nothing_else(tmp_path: Path) -> None:
    custom = {"class_name": "Mine", "config": {"name": "mine"}}
    model = open_model(h5(tmp_path / "a.h5", functional(custom)))
    trust.check(model, lambda: {"Mine"})
    trust.check(model, lambda: {"package>Mine"})
    with pytest.raises(UntrustedError, match="custom class Mine") as caught:
        trust.check(model, lambda: {"Other"})
    assert "--custom-objects" in caught.value.hint
    model = open_model(h5(tmp_path / "b.h5", functional(custom, wrapped("print"))))

    def imported() -> frozenset[str]:
        raise AssertionError("the user's module is not imported for a file that is refused anyway")

    with pytest.raises(UntrustedError, match="operation print") as caught:
        trust.check(model, imported)
    assert "--trust" in caught.value.hint


def test_what_a_file_was_trained_with_is_not_rebuilt_with_it(tmp_path: Path) -> None:
    loss = {"class_name": "Mine", "module": "mine", "config": {}, "registered_name": "Mine"}
    model = open_model(h5(tmp_path / "m.h5", functional(), {"loss": loss}))
    assert trust.facts_of(model) == ()
    with zipfile.ZipFile(FIXTURES / "digits_cnn.keras") as old, zipfile.ZipFile(tmp_path / "m.keras", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                content = json.dumps({**json.loads(content), "compile_config": {"loss": loss}}).encode()
            new.writestr(name, content)
    assert trust.facts_of(open_model(tmp_path / "m.keras")) == ()


def test_a_loss_in_a_module_that_the_file_names_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tf_keras()
    canary = tmp_path / "canary"
    (tmp_path / "evil_losses.py").write_text(f"open({str(canary)!r}, 'w').close()\n\nclass Loss: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = {"class_name": "Loss", "module": "evil_losses", "config": {}, "registered_name": "Loss"}
    training = {"loss": entry, "metrics": [entry], "optimizer_config": {"class_name": "SGD", "config": {"lr": entry}}}
    network = nets.opened(h5(tmp_path / "m.h5", functional(), training))
    with pytest.raises(UsageError, match="custom class Loss"):
        network.prepare(TrainOptions(example=nets.batches(1)[0]))
    network.prepare(TrainOptions(loss="sparse_categorical_crossentropy", example=nets.batches(1)[0]))
    assert not canary.exists()


def mixed(k: Any) -> Any:
    """A model with whatever functions users call on tensors."""
    x = k.layers.Input((4, 4, 3), name="x")
    if k is tf_keras():
        import tensorflow as tf  # noqa: PLC0415 - which Keras 2 wraps

        y = tf.nn.relu(x) * 2.0 + tf.image.resize(x, (4, 4))
        y = tf.concat([y[:, :, :, :1], tf.cast(tf.clip_by_value(y, 0.0, 1.0), tf.float32)], axis=-1)
        y = tf.reshape(y, (-1, 64)) - tf.reduce_mean(tf.math.square(y), axis=[1, 2, 3], keepdims=False)[:, tf.newaxis]
    else:
        ops = k.ops
        y = ops.relu(x) * 2.0 + ops.image.resize(x, (4, 4))
        y = ops.concatenate([y[..., :1], ops.clip(y, 0.0, 1.0)], axis=-1)
        y = ops.reshape(y, (-1, 64)) - ops.mean(ops.square(y))
    inner = k.Sequential([k.layers.Input((64,)), k.layers.Dense(8, activation=k.activations.gelu), k.layers.ReLU()])
    # Unrolled, as Keras 2 traces what a GPU would do otherwise, and TensorFlow takes a minute over a SavedModel.
    z = k.layers.Bidirectional(k.layers.LSTM(2, unroll=True))(k.layers.Reshape((2, 4))(inner(y)))
    init, regular = k.initializers.HeNormal(seed=1), k.regularizers.L2(0.1)
    out = k.layers.Dense(3, kernel_initializer=init, kernel_regularizer=regular, kernel_constraint="unit_norm")(z)
    return k.Model(x, out)


@both
def test_ordinary_models_need_no_trust(k: Any, tmp_path: Path) -> None:
    for name in ("m.keras", "m.h5", *(("m",) if k is tf_keras else ())):
        path = nets.saved(mixed(k()), tmp_path / name, is_traced=True)
        assert trust.facts_of(open_model(path)) == (), name
    network = nets.opened(tmp_path / "m.keras")
    assert np.shape(network.predict(np.ones((2, 4, 4, 3), np.float32))) == (2, 3)


def test_every_class_and_function_on_the_lists_is_one_that_exists() -> None:
    two, three = tf_keras(), keras()
    from tensorflow.python.util import tf_export  # noqa: PLC0415 - the table that Keras 2 asks

    assert two is not None
    missing = [
        name
        for name in FUNCTIONS_OF_TENSORFLOW
        if not any(callable(tf_export.get_symbol_from_name(way + name)) for way in ("", "compat.v1."))
    ]
    assert missing == []
    assert {name for name in dir(three.layers) if name.startswith(("Conv", "Max", "Random"))} <= CLASSES


def damaged(path: Path, change: Any) -> Path:
    config = functional()
    change(config["config"]["layers"][-1]["config"])
    return h5(path, config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda dense: dense.update(units=9), "has 9 units"),
        (lambda dense: dense.update(units="4"), "does not give the units"),
        (lambda dense: dense.update(name="other"), "holds no weights of Dense other"),
    ],
)
def test_a_damaged_file_is_not_opened_by_tensorflow_to_be_wrapped(change: Any, said: str, tmp_path: Path) -> None:
    path = damaged(tmp_path / "m.h5", change)
    found = cost("prune", path, "-o", tmp_path / "o.h5", "-s", "50%", "--wrap", scratch=tmp_path / "scratch")
    assert said in found.outcome.err
    assert_refused_cheaply(found)
    assert not (tmp_path / "o.h5").exists()


def test_a_file_of_keras_3_is_not_opened_to_be_wrapped(tmp_path: Path) -> None:
    words = ("prune", FIXTURES / "digits_cnn.keras", "-o", tmp_path / "o.keras", "-s", "50%", "--wrap")
    found = cost(*words, scratch=tmp_path / "scratch")
    assert "is a Keras 3 model" in found.outcome.err
    assert_refused_cheaply(found)
