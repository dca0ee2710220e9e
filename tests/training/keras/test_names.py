"""Every variable goes by the name of its tensor in the file, whatever the model looks like."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.channels.prune import prune_channels
from prunectl.errors import UsageError
from prunectl.formats.base import Role
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.training.keras import variable_names
from tests.contract import raw
from tests.networks import keras, tf_keras
from tests.running import FIXTURES, here
from tests.training.keras import nets
from tests.training.keras.nets import both

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def recurrent(k: Any) -> Any:
    inner = k.layers.Bidirectional(k.layers.SimpleRNN(3, name="rnn"), name="both_ways")
    return k.Sequential([k.layers.Input((5, 4)), inner, k.layers.Dense(2, name="out")])


def shared(k: Any) -> Any:
    left, right = k.layers.Input((6,), name="left"), k.layers.Input((6,), name="right")
    dense = k.layers.Dense(4, name="dense")
    both_of_them = k.layers.Concatenate()([dense(left), dense(right)])
    outputs = [k.layers.Dense(3, name="a")(both_of_them), k.layers.Dense(1, name="b")(both_of_them)]
    return k.Model([left, right], outputs)


def nested(k: Any) -> Any:
    block = k.Sequential(
        [k.layers.Input((6,)), k.layers.Dense(6, name="dense"), k.layers.BatchNormalization(name="norm")], name="block"
    )
    deeper = k.Sequential([k.layers.Input((6,)), block, k.layers.Dense(6, name="middle")], name="deeper")
    return k.Sequential([k.layers.Input((6,)), deeper, k.layers.Dense(6, name="last")])


def images(k: Any) -> Any:
    layers = k.layers
    return k.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.DepthwiseConv2D(3, name="deep"),
            layers.SeparableConv2D(5, 3, name="apart"),
            layers.Conv2DTranspose(2, 3, name="back"),
            layers.LayerNormalization(name="norm"),
            layers.Flatten(),
            layers.Dense(2, name="out"),
        ]
    )


def words(k: Any) -> Any:
    tokens = k.layers.Input((7,), dtype="int32", name="tokens")
    found = k.layers.Embedding(20, 8, name="words")(tokens)
    seen = k.layers.MultiHeadAttention(2, 4, name="look")(found, found)
    return k.Model(tokens, k.layers.Dense(3, name="out")(k.layers.GlobalAveragePooling1D()(seen)))


@pytest.mark.parametrize("build", [recurrent, shared, nested, images, words])
@nets.kinds
def test_each_tensor_of_the_file_is_a_variable_with_its_numbers(
    build: Callable[[Any], Any], k: Any, suffix: str, tmp_path: Path
) -> None:
    model = build(k())
    path = nets.saved(model, tmp_path / f"model{suffix}")
    file = open_model(path)
    held = {tensor.name: file.read(tensor) for tensor in file.tensors if tensor.role is not Role.OPTIMIZER}
    found = nets.opened(path).tensors()
    assert found.keys() == held.keys()
    assert len(found) == len(model.weights)
    assert all(raw(found[name]) == raw(held[name]) for name in held)


@both
def test_equal_numbers_are_told_apart(k: Any, tmp_path: Path) -> None:
    model = k().Sequential([k().layers.Input((4,)), *(k().layers.Dense(4, name=f"d{at}") for at in range(12))])
    model.set_weights([np.zeros_like(array) for array in model.get_weights()])
    network = nets.opened(nets.saved(model, tmp_path / "model.keras"))
    by_layer = {f"d{at}": at for at in range(12)}
    for name, at in by_layer.items():
        network.assign({one: np.full((4, 4), at) for one in network.tensors() if one.startswith(f"{name}/kernel")})
    kernels = [np.asarray(array) for array in network._model.get_weights()[::2]]
    assert [float(array[0, 0]) for array in kernels] == list(range(12))
    assert not any(np.any(array) for array in network._model.get_weights()[1::2])


@both
def test_more_tensors_than_a_type_can_count_take_more_rounds(
    k: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variable_names, "_BASES", {"float32": 3})
    layers = [k().layers.Dense(2, name=f"layer{at}") for at in range(8)]
    model = k().Sequential([k().layers.Input((2,)), *layers])
    network = nets.opened(nets.saved(model, tmp_path / "model.keras"))
    assert len(network.tensors()) == 16
    by_identity = {id(variable): name for name, variable in network._variables.items()}
    found = [by_identity[id(one)].split("/")[0] for one in network._model.weights[::2]]
    assert found == [f"layer{at}" for at in range(8)]


def test_numbers_of_16_bits_are_told_apart(tmp_path: Path) -> None:
    layers = [keras().layers.Dense(2, name=f"layer{at}", dtype="bfloat16") for at in range(3)]
    path = nets.saved(keras().Sequential([keras().layers.Input((2,)), *layers]), tmp_path / "model.keras")
    file = open_model(path)
    found = nets.opened(path).tensors()
    assert {name: raw(one) for name, one in found.items()} == {one.name: raw(file.read(one)) for one in file.tensors}


@pytest.mark.parametrize(
    "name", ["chunked_and_gzipped.h5", "deflated.keras", "digits_cnn_savedmodel", "recurrent.keras"]
)
def test_fixtures_are_opened_however_their_bytes_lie(name: str) -> None:
    file = open_model(FIXTURES / name)
    found = nets.opened(FIXTURES / name).tensors()
    wanted = {tensor.name: file.read(tensor) for tensor in file.tensors if tensor.role is not Role.OPTIMIZER}
    assert {one: raw(array) for one, array in found.items()} == {one: raw(array) for one, array in wanted.items()}


@pytest.mark.parametrize("name", ["digits_cnn.h5", "digits_cnn.keras", "digits_cnn_savedmodel"])
def test_a_model_in_a_folder_whose_name_is_no_text_is_opened_though_frameworks_take_text_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"o\xff")
    (odd / "temporary").mkdir(parents=True)
    copy = shutil.copytree if (FIXTURES / name).is_dir() else shutil.copy
    copy(FIXTURES / name, odd / name)
    monkeypatch.setattr(tempfile, "tempdir", str(odd / "temporary"))
    found, file = nets.opened(odd / name).tensors(), open_model(FIXTURES / name)
    wanted = {tensor.name: raw(file.read(tensor)) for tensor in file.tensors if tensor.role is not Role.OPTIMIZER}
    assert {one: raw(array) for one, array in found.items()} == wanted
    assert os.listdir(odd / "temporary") == []


def test_functions_that_tensorflow_writes_to_a_file_lie_in_a_folder_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"o\xff")
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    shutil.copy(FIXTURES / "digits_cnn.h5", odd)
    done = here("prune", odd / "digits_cnn.h5", "--wrap", "-s", "50%", "-o", tmp_path / "wrapped.h5")
    assert done.code == 0, done.err
    assert os.listdir(odd) == ["digits_cnn.h5"]


@pytest.mark.parametrize(
    ("k", "name"),
    [(tf_keras, "w.h5"), (tf_keras, "m.weights.h5"), (keras, "m.weights.h5")],
    ids=["Keras 2 h5", "Keras 2 weights.h5", "Keras 3 weights.h5"],
)
def test_weights_alone_fill_the_model_that_the_user_builds(k: Any, name: str, tmp_path: Path) -> None:
    library = "keras" if k is keras else "tf_keras"
    (tmp_path / "build.py").write_text(
        f"import {library} as k\n"
        "def net():\n"
        "    dense = [k.layers.Dense(3, name='one'), k.layers.Dense(2, name='two')]\n"
        "    return k.Sequential([k.layers.Input((6,)), *dense])\n"
        "def nothing():\n"
        "    return k.Sequential([k.layers.Dense(3)])\n"
        "number = 3\n"
    )
    source = k()
    model = source.Sequential(
        [source.layers.Input((6,)), source.layers.Dense(3, name="one"), source.layers.Dense(2, name="two")]
    )
    model.save_weights(tmp_path / name)
    file = open_model(tmp_path / name)
    network = nets.opened(tmp_path / name, model=f"{tmp_path}/build.py:net")
    found = network.tensors()
    assert found.keys() == {tensor.name for tensor in file.tensors}
    for mine, theirs in zip(network._model.get_weights(), model.get_weights(), strict=True):
        assert raw(np.asarray(mine)) == raw(np.asarray(theirs))
    with pytest.raises(UsageError, match="without weights"):
        nets.opened(tmp_path / name, model=f"{tmp_path}/build.py:nothing")
    with pytest.raises(UsageError, match="not a function"):
        nets.opened(tmp_path / name, model=f"{tmp_path}/build.py:number")


def test_weights_alone_need_what_builds_the_model() -> None:
    with pytest.raises(UsageError, match="holds only weights, not the network that uses them") as caught:
        nets.opened(FIXTURES / "weights_only.h5")
    assert "--builder" in caught.value.hint


@both
def test_the_signature_names_shapes_and_types(k: Any, tmp_path: Path) -> None:
    found = nets.opened(nets.saved(shared(k()), tmp_path / "model.keras")).signature
    assert [(port.name, port.shape, port.dtype) for port in found.inputs] == [
        ("left", (6,), "float32"),
        ("right", (6,), "float32"),
    ]
    assert [(port.name, port.shape) for port in found.outputs] == [("a", (3,)), ("b", (1,))]
    assert not found.is_channels_first
    plain = nets.opened(nets.saved(nets.dense(k()), tmp_path / "plain.keras")).signature
    assert [(port.name, port.shape) for port in plain.outputs] == [("second", (nets.CLASSES,))]


@both
@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_inputs_and_outputs_of_dictionaries_are_told_apart_in_any_order(name: str, k: Any, tmp_path: Path) -> None:
    source = k()
    dense = source.layers.Dense
    late, early = source.layers.Input((5,), name="late"), source.layers.Input((3,), name="early")
    both_of_them = source.layers.Concatenate()([dense(4)(late), dense(2)(early)])
    outputs = {"wide": dense(4, name="wide")(both_of_them), "one": dense(1, name="one")(both_of_them)}
    model = source.Model({"late": late, "early": early}, outputs)
    path = nets.saved(model, tmp_path / name)
    network = nets.opened(path)
    assert [spec.name for spec in network.signature.inputs] == ["early", "late"]
    random = np.random.default_rng(0)
    given = {"early": random.normal(size=(6, 3)).astype("f"), "late": random.normal(size=(6, 5)).astype("f")}
    answered = model.predict(given, verbose=0)
    assert [spec.name for spec in network.signature.outputs] == ["one", "wide"]
    for found, wanted in zip(network.predict(tuple(given.values())), ("one", "wide"), strict=True):
        np.testing.assert_allclose(found, answered[wanted], rtol=1e-5, atol=1e-6)
    prune_channels(path, PruneRequest(sparsity=0.5, pattern="channel"), Destination(tmp_path / f"small-{name}"))


def test_a_vocabulary_of_keras_2_is_no_weight(tmp_path: Path) -> None:
    of = tf_keras().layers
    tokens = of.IntegerLookup(vocabulary=[3, 5])
    layers = [of.Input((4,), dtype="int64"), tokens, of.Embedding(3, 8), of.Flatten(), of.Dense(2)]
    network = nets.opened(nets.saved(tf_keras().Sequential(layers), tmp_path / "model.keras"))
    assert sorted(array.ndim for array in network.tensors().values()) == [1, 2, 2]
