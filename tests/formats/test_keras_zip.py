"""`.keras` archives, written by Keras 3 and by tf_keras."""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import prunectl
from prunectl.errors import InputError
from prunectl.formats.registry import open_model
from tests.contract import Array, FormatContract, read_all
from tests.networks import keras, small_keras, tf_keras
from tests.running import here

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def rezip(path: Path, method: int, changes: dict[str, bytes | None] | None = None) -> None:
    """Write an archive again with another method, with some entries changed or left out."""
    with zipfile.ZipFile(path) as archive:
        entries: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    entries |= changes or {}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            if data is not None:
                archive.writestr(name, data)


class TestKeras3(FormatContract):
    format = "keras"
    name = "model.keras"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        small_keras(keras(), arrays).save(path)

    def read_back(self, path: Path) -> dict[str, Array]:
        model = keras().models.load_model(path)
        return {weight.path.removeprefix(f"{model.name}/"): np.asarray(weight) for weight in model.weights}


class TestKeras2(FormatContract):
    format = "keras"
    name = "model.keras"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        small_keras(tf_keras(), arrays).save(path)

    def read_back(self, path: Path) -> dict[str, Array]:
        return {weight.name.removesuffix(":0"): weight.numpy() for weight in tf_keras().models.load_model(path).weights}


class TestDeflated(TestKeras3):
    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        super().write(path, arrays)
        rezip(path, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_weights_of_a_quantised_model_have_the_names_of_keras_and_are_not_pruned(mode: str, tmp_path: Path) -> None:
    layers = keras().layers
    x = inputs = keras().Input((8,))
    x = layers.Embedding(64, 32, name="table")(x)
    x = layers.MultiHeadAttention(4, 8, name="attention")(x, x)
    x = layers.EinsumDense("abc,cd->abd", (8, 16), bias_axes="d", name="einsum")(x)
    x = layers.Dense(8, name="wide", use_bias=False)(layers.Flatten()(x))
    model = keras().Model(inputs, layers.Dense(5, name="last")(x))
    model.quantize(mode)
    model.save(tmp_path / "m.keras")
    model.save(tmp_path / "m.h5")
    model.save_weights(tmp_path / "m.weights.h5")
    expected = {weight.path: np.asarray(weight) for weight in model.weights}
    for name in ("m.keras", "m.h5", "m.weights.h5"):
        read = read_all(tmp_path / name)
        assert read.keys() == expected.keys()
        for weight, array in expected.items():
            np.testing.assert_array_equal(read[weight], array)
        done = here("prune", tmp_path / name, "-s", "50%", "-o", tmp_path / f"out-{name}")
        assert (done.code, "quantised to int8: prune before quantising" in " ".join(done.err.split())) == (2, True)
    importlib.import_module("tensorflow").train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    assert not any(tensor.is_prunable for tensor in open_model(tmp_path / "checkpoint.index").tensors)


def test_low_rank_factors_are_no_kernels(tmp_path: Path) -> None:
    model = keras().Sequential([keras().Input((8,)), keras().layers.Dense(6, name="wide")])
    model.layers[0].enable_lora(2)
    model.save(tmp_path / "m.h5")
    importlib.import_module("tensorflow").train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    for name in ("m.h5", "checkpoint.index"):
        tensors = open_model(tmp_path / name).tensors
        assert {tensor.shape for tensor in tensors if tensor.is_prunable} == {(8, 6)}
        assert {tensor.role for tensor in tensors if "lora" in tensor.name} == {"other"}


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_the_weights_of_a_model_in_four_bits_are_told_with_and_without_a_bias(mode: str, tmp_path: Path) -> None:
    policy = f"{mode}/4/128_from_float32"
    dense = [
        keras().layers.Dense(width, use_bias=has_bias, name=name, dtype=policy)
        for width, has_bias, name in ((32, False, "wide"), (8, True, "last"))
    ]
    model = keras().Sequential([keras().Input((16,)), *dense], name="sequential")
    for layer in dense:
        setattr(layer, f"is_{mode}_calibrated", True)
    model.save(tmp_path / "m.keras")
    # Keras does not save what it names kernel_zero.
    kept = (weight for weight in model.weights if weight.name != "kernel_zero")
    expected = {weight.path.removeprefix("sequential/"): tuple(weight.shape) for weight in kept}
    assert {tensor.name: tensor.shape for tensor in open_model(tmp_path / "m.keras").tensors} == expected
    done = here("prune", tmp_path / "m.keras", "-s", "50%", "-o", tmp_path / "out.keras")
    assert (done.code, "quantised to uint8" in done.err) == (2, True)


def test_a_deflated_archive_says_so_and_gives_no_extent(tmp_path: Path) -> None:
    small_keras(keras(), {}).save(tmp_path / "m.keras")
    rezip(tmp_path / "m.keras", zipfile.ZIP_DEFLATED)
    model = open_model(tmp_path / "m.keras")
    assert model.about.is_compressed
    assert all(tensor.storage.extent is None for tensor in model.tensors)


def test_a_bfloat16_model_keeps_its_type(tmp_path: Path) -> None:
    k = keras()
    model = k.Sequential(
        [k.Input((4,)), k.layers.Dense(3, dtype=k.dtype_policies.DTypePolicy("bfloat16"), name="only")]
    )
    model.save(tmp_path / "m.keras")
    tensors = open_model(tmp_path / "m.keras").tensors
    assert {tensor.dtype.name for tensor in tensors} == {"bfloat16"}
    kernel = read_all(tmp_path / "m.keras")["only/kernel"]
    np.testing.assert_array_equal(kernel.astype(np.float32), np.asarray(model.layers[0].kernel).astype(np.float32))


def test_layers_of_one_class_are_told_apart_by_their_names(tmp_path: Path) -> None:
    k = tf_keras()
    layers = [k.layers.Dense(2, name=name) for name in ("zeta", "alpha", "head")]
    k.Sequential([k.layers.Input((2,)), *layers]).save(tmp_path / "m.keras")
    kernels = [tensor.layer for tensor in open_model(tmp_path / "m.keras").tensors if tensor.role == "kernel"]
    assert sorted(kernels) == ["alpha", "head", "zeta"]
    arrays = read_all(tmp_path / "m.keras")
    for layer in layers:
        np.testing.assert_array_equal(arrays[f"{layer.name}/kernel"], layer.kernel.numpy())


def test_the_optimizer_and_the_loss_are_told(tmp_path: Path) -> None:
    model = small_keras(keras(), {})
    model.compile("sgd", "mse")
    model.save(tmp_path / "m.keras")
    about = open_model(tmp_path / "m.keras").about
    assert (about.producer, about.optimizer, about.training) == (f"keras {keras().__version__}", "SGD", ("loss mse",))


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("config.json", b'{"config": ' * 100_000, "nested too deep"),
        ("config.json", b"[1]", "not a JSON object"),
        ("metadata.json", b"{", "not JSON"),
        ("model.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(2000), "truncated or damaged"),
        ("model.weights.h5", b"", "truncated or damaged"),
        ("model.weights.h5", None, "architecture of a Keras model, but no weights"),
    ],
)
def test_an_archive_with_a_broken_part_is_refused(
    tmp_path: Path, name: str, data: bytes | None, complaint: str
) -> None:
    path = tmp_path / "m.keras"
    small_keras(keras(), {}).save(path)
    rezip(path, zipfile.ZIP_STORED, {name: data})
    with pytest.raises(InputError, match=complaint):
        open_model(path)


def test_an_unknown_layer_is_a_fact_and_not_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    small_keras(keras(), {}).save(path)
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    config["config"]["layers"][1] |= {"module": "mycompany.layers", "class_name": "Magic"}
    rezip(path, zipfile.ZIP_STORED, {"config.json": json.dumps(config).encode()})
    assert open_model(path).about.code == ("custom class Magic",)


def test_weights_inside_a_layer_belong_to_the_layer_that_the_configuration_knows(tmp_path: Path) -> None:
    for k in (keras(), tf_keras()):
        layers = k.layers
        inputs = k.Input((8, 6))
        x = layers.LSTM(5, return_sequences=True, name="memory")(inputs)
        x = layers.Bidirectional(layers.GRU(4, return_sequences=True), name="both")(x)
        x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        x = layers.TimeDistributed(layers.Dense(3, name="inner"), name="everywhere")(x)
        inner = k.Sequential([layers.Input((8, 3)), layers.LSTM(2, name="deep")], name="sub")
        k.Model(inputs, inner(x)).save(tmp_path / "m.keras")
        found = {tensor.layer for tensor in open_model(tmp_path / "m.keras").tensors}
        assert found == {"memory", "both", "attention", "everywhere", "deep"}


def test_weights_that_have_only_numbers_get_the_names_of_their_layers(tmp_path: Path) -> None:
    k = keras()
    layers = k.layers
    scaled = layers.Normalization(name="scaled")
    scaled.adapt(np.ones((2, 8, 6), np.float32))
    inputs = k.Input((8, 6))
    x = layers.BatchNormalization(scale=False, name="centered")(scaled(inputs))
    x = layers.LayerNormalization(center=False, name="stretched")(x)
    x = layers.PReLU(name="bent")(x)
    x = layers.RMSNormalization(name="even")(x)
    x = layers.SpectralNormalization(layers.Dense(3, name="inside"), name="bounded")(x)
    cells = [layers.LSTMCell(3, name="first_cell"), layers.GRUCell(3, name="second_cell")]
    k.Model(inputs, layers.RNN(cells, name="stack")(x)).save(tmp_path / "m.keras")
    roles = {tensor.name: str(tensor.role) for tensor in open_model(tmp_path / "m.keras").tensors}
    assert {name: role for name, role in roles.items() if not name.startswith("stack/")} == {
        "scaled/mean": "state",
        "scaled/variance": "state",
        "scaled/count": "state",
        "centered/beta": "norm",
        "centered/moving_mean": "state",
        "centered/moving_variance": "state",
        "stretched/gamma": "norm",
        "bent/alpha": "other",
        "even/scale": "norm",
        "bounded/copy": "other",
        "bounded/vector_u": "state",
        "bounded/inside/kernel": "kernel",
        "bounded/inside/bias": "bias",
    }
    assert sorted(role for name, role in roles.items() if name.startswith("stack/")) == [
        *("bias", "bias", "kernel", "kernel", "recurrent", "recurrent"),
    ]


def test_damage_inside_a_deflated_archive_is_told_of_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    k = keras()
    k.Sequential([k.layers.Input((2,)), k.layers.Dense(2)]).save(path)
    rezip(path, zipfile.ZIP_DEFLATED, {"model.weights.h5": b"\x89HDF\r\n\x1a\n" + bytes(5000)})
    with pytest.raises(InputError, match=r"m\.keras: its model\.weights\.h5 is truncated or damaged"):
        open_model(path)


def test_two_of_four_zeros_lie_along_what_an_attention_and_an_einsum_sum_over(tmp_path: Path) -> None:
    k = keras()
    inputs = k.Input((3, 8))
    x = k.layers.MultiHeadAttention(2, 6, name="attention")(inputs, inputs)
    x = k.layers.EinsumDense("abc,dec->abde", output_shape=(None, 4, 12), name="apart")(x)
    x = k.layers.EinsumDense("abde,def->abf", output_shape=(None, 5), name="joined")(x)
    k.Model(inputs, x).save(tmp_path / "m.keras")
    prunectl.prune(tmp_path / "m.keras", tmp_path / "out.keras", pattern="2:4")
    dense, pruned = (k.models.load_model(tmp_path / name) for name in ("m.keras", "out.keras"))
    attention = "_query_dense", "_key_dense", "_value_dense"
    axes = {**dict.fromkeys(attention, 0), "apart": 2, "joined": 1}
    for name, axis in axes.items():
        before, after = (
            np.asarray(
                (getattr(model.get_layer("attention"), name) if name in attention else model.get_layer(name)).kernel
            )
            for model in (dense, pruned)
        )
        groups = np.moveaxis(before, axis, -1).reshape(-1, 4)
        rank = np.argsort(np.argsort(np.abs(groups), axis=1), axis=1)
        expected = np.where(rank < 2, np.float32(0), groups)
        np.testing.assert_array_equal(np.moveaxis(after, axis, -1).reshape(-1, 4), expected)


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_the_kernel_that_a_spectral_normalization_stores_twice_is_pruned_once(name: str, tmp_path: Path) -> None:
    k = keras()
    layers = k.layers
    normalized = layers.SpectralNormalization(layers.Conv2D(5, 3))
    model = k.Sequential([layers.Input((6, 6, 2)), normalized, layers.Flatten(), layers.Dense(3)])
    before = np.array(normalized.layer.kernel)
    (model.save_weights if "weights" in name else model.save)(tmp_path / name)
    sparse = tmp_path / f"sparse.{name}"
    assert here("prune", tmp_path / name, "-o", sparse, "-s", "50%").code == 0
    if "weights" in name:
        model.load_weights(sparse)
    else:
        model = k.models.load_model(sparse)
    after = np.array(model.layers[0].layer.kernel)
    assert 0 < np.count_nonzero(after) < 90
    np.testing.assert_array_equal(after, np.where(after == 0, 0, before))
    total = np.count_nonzero(after) + np.count_nonzero(np.array(model.layers[-1].kernel))
    assert total == (90 + 240) / 2
    stored = [tensor for tensor in open_model(sparse).tensors if tensor.shape == after.shape]
    assert [tensor.role for tensor in stored] == ["kernel", "other"]
    for tensor in stored:
        np.testing.assert_array_equal(read_all(sparse)[tensor.name], after)


def test_weights_in_a_wrapper_have_the_names_and_roles_of_their_class(tmp_path: Path) -> None:
    layers = keras().layers
    wrapped = [layers.SeparableConv2D(3, 2, name="split"), layers.BatchNormalization(scale=False, name="norm")]
    wrapped += [layers.Flatten(), layers.Dense(4, name="full")]
    model = keras().Sequential([layers.Input((2, 5, 5, 2)), *map(layers.TimeDistributed, wrapped)])
    model.save(tmp_path / "m.keras")
    found = {"/".join(tensor.name.split("/")[-2:]): tensor for tensor in open_model(tmp_path / "m.keras").tensors}
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "/".join(weight.path.split("/")[-2:]): tuple(weight.shape) for weight in model.weights
    }
    kernels = {name for name, tensor in found.items() if tensor.role == "kernel"}
    assert kernels == {"split/depthwise_kernel", "split/pointwise_kernel", "full/kernel"}
    assert here("inspect", tmp_path / "m.keras").err == ""
