"""Keras HDF5 files, written by Keras 3, by tf_keras and by h5py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prunectl.errors import InputError, WorkError
from prunectl.formats import sandbox
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.keras import hdf5
from prunectl.formats.registry import open_model
from tests.contract import Array, FormatContract, raw
from tests.networks import keras, small_keras, tf_keras
from tests.pruning import reference
from tests.running import FIXTURES

CHUNKED = FIXTURES / "chunked_and_gzipped.h5"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def by_name(model: ModelFile) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in model.tensors}


def keras_1(path: Path, arrays: dict[str, Array], **how: Any) -> Path:
    """Write what Keras 1 wrote: weights-only, flat names."""
    with h5py.File(path, "w") as file:
        layers = dict.fromkeys(name.rsplit("_", 1)[0] for name in arrays)
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer in layers:
            group = file.create_group(layer)
            mine = [name for name in arrays if name.rsplit("_", 1)[0] == layer]
            group.attrs["weight_names"] = [name.encode() for name in mine]
            for name in mine:
                group.create_dataset(name, data=arrays[name], **how)
    return path


class TestKeras2H5(FormatContract):
    format = "keras-h5"
    name = "model.h5"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        small_keras(tf_keras(), arrays).save(path)

    def read_back(self, path: Path) -> dict[str, Array]:
        return {weight.name: weight.numpy() for weight in tf_keras().models.load_model(path).weights}


class TestKeras3H5(FormatContract):
    format = "keras-h5"
    name = "model.h5"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        small_keras(keras(), arrays).save(path)

    def read_back(self, path: Path) -> dict[str, Array]:
        return {weight.path: np.asarray(weight) for weight in keras().models.load_model(path).weights}


class TestKeras3Weights(FormatContract):
    format = "keras-h5"
    name = "model.weights.h5"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        small_keras(keras(), arrays).save_weights(path)

    def read_back(self, path: Path) -> dict[str, Array]:
        model = small_keras(keras(), {})
        model.load_weights(path)
        return {weight.path.removeprefix(f"{model.name}/"): np.asarray(weight) for weight in model.weights}


class TestChunkedAndGzipped(FormatContract):
    format = "keras-h5"
    name = "model.h5"

    def write(self, path: Path, arrays: dict[str, Array]) -> None:
        renamed = {name.replace(".weight", "_W").replace(".bias", "_b"): array for name, array in arrays.items()}
        kernels = {name: array.T if name.endswith("_W") else array for name, array in renamed.items()}
        keras_1(path, kernels, chunks=True, compression="gzip", shuffle=True)

    def read_back(self, path: Path) -> dict[str, Array]:
        found: dict[str, Array] = {}
        with h5py.File(path) as file:
            for group in file.values():
                found |= {name: dataset[()] for name, dataset in group.items()}
        return found


def test_a_whole_model_says_who_wrote_it_and_how_it_was_trained(tmp_path: Path) -> None:
    model = small_keras(tf_keras(), {})
    model.compile("adam", "mse", metrics=["mae"], run_eagerly=True)
    model.fit(np.zeros((2, 5)), np.zeros((2, 3)), verbose=0)
    model.save(tmp_path / "m.h5")
    about = open_model(tmp_path / "m.h5").about
    assert about.producer == f"keras {tf_keras().__version__} on tensorflow"
    assert about.optimizer == "Adam"
    assert about.training == ("loss mse", "metrics mae")


def test_the_state_of_the_optimizer_is_told_from_the_weights(tmp_path: Path) -> None:
    model = small_keras(tf_keras(), {})
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(np.zeros((2, 5)), np.zeros((2, 3)), verbose=0)
    model.save(tmp_path / "m.h5")
    tensors = open_model(tmp_path / "m.h5").tensors
    assert sum(tensor.role == "optimizer" for tensor in tensors) == 2 * 4 + 1
    assert sum(tensor.role == "kernel" for tensor in tensors) == 2


def test_every_kind_of_layer_says_where_its_outputs_and_inputs_are(tmp_path: Path) -> None:
    k = keras()
    inputs = k.Input((8, 8, 3))
    x = k.layers.Conv2D(4, 3, name="conv")(inputs)
    x = k.layers.DepthwiseConv2D(1, name="single")(x)
    x = k.layers.DepthwiseConv2D(3, depth_multiplier=2, name="double")(x)
    x = k.layers.Conv2DTranspose(5, 2, name="transposed")(x)
    x = k.layers.BatchNormalization(scale=False, name="norm")(x)
    x = k.layers.Reshape((25, 5))(x)
    x = k.layers.LSTM(6, name="lstm")(x)
    k.Model(inputs, k.layers.Dense(2, name="head")(x)).save(tmp_path / "m.h5")
    tensors = by_name(open_model(tmp_path / "m.h5"))
    axes = {
        name: (tensor.kind, tensor.shape[tensor.out_axis], tensor.shape[tensor.reduction_axis or 0])
        for name, tensor in tensors.items()
        if tensor.out_axis is not None
    }
    assert axes == {
        "conv/kernel": ("Conv2D", 4, 3),
        # Its outputs sum over the window alone: N:M, which runs over inputs, prunes none of it.
        "single/kernel": ("DepthwiseConv2D", 4, 1),
        "transposed/kernel": ("Conv2DTranspose", 5, 8),
        "lstm/lstm_cell/kernel": ("LSTM", 24, 5),
        "lstm/lstm_cell/recurrent_kernel": ("LSTM", 24, 6),
        "head/kernel": ("Dense", 2, 6),
    }
    # Outputs of one channel lie along both of the last axes.
    assert (tensors["double/kernel"].role, tensors["double/kernel"].reduction_axis) == ("kernel", None)
    assert tensors["norm/moving_mean"].role == "state"
    assert tensors["norm/beta"].role == "norm"
    assert tensors["lstm/lstm_cell/recurrent_kernel"].role == "recurrent"


@pytest.mark.parametrize(("multiplier", "axis"), [(1, 3), (4, None)])
def test_a_depthwise_kernel_is_known_in_a_file_of_weights_alone(
    multiplier: int, axis: int | None, tmp_path: Path
) -> None:
    k = keras()
    k.Sequential([k.Input((4, 4, 4)), k.layers.DepthwiseConv2D(3, depth_multiplier=multiplier)]).save_weights(
        tmp_path / "m.weights.h5"
    )
    (kernel,) = (tensor for tensor in open_model(tmp_path / "m.weights.h5").tensors if tensor.is_prunable)
    assert kernel.reduction_axis == axis


def test_a_model_wrapped_by_tfmot_says_its_wrappers_and_schedule(tmp_path: Path) -> None:
    sparsity = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
    schedule = sparsity.PolynomialDecay(0.5, 0.8, 0, 1000)
    sparsity.prune_low_magnitude(small_keras(tf_keras(), {}), pruning_schedule=schedule).save(tmp_path / "m.h5")
    model = open_model(tmp_path / "m.h5")
    assert [(wrapper.kind, wrapper.layer) for wrapper in model.about.wrappers] == [
        ("tfmot", "first"),
        ("tfmot", "second"),
    ]
    assert {wrapper.schedule for wrapper in model.about.wrappers} == {"PolynomialDecay(0.5 -> 0.8, steps 0-1000)"}
    roles = {tensor.name: (tensor.layer, tensor.role) for tensor in model.tensors}
    assert roles["prune_low_magnitude_first/mask:0"] == ("first", "mask")
    assert roles["prune_low_magnitude_first/pruning_step:0"] == ("first", "schedule")
    assert roles["first/kernel:0"] == ("first", "kernel")


def test_a_lambda_layer_is_reported_as_code(tmp_path: Path) -> None:
    k = keras()
    k.Sequential([k.Input((3,)), k.layers.Lambda(lambda x: x * 2, name="double"), k.layers.Dense(1)]).save(
        tmp_path / "m.h5"
    )
    assert open_model(tmp_path / "m.h5").about.code == ("Lambda layer double",)


def test_a_nested_model_names_the_inner_layer(tmp_path: Path) -> None:
    k = tf_keras()
    inner = k.Sequential([k.layers.Input((4,)), k.layers.Dense(3, name="deep")], name="inner")
    k.Sequential([k.layers.Input((4,)), inner, k.layers.Dense(2, name="head")]).save(tmp_path / "m.h5")
    assert {tensor.layer for tensor in open_model(tmp_path / "m.h5").tensors} == {"deep", "head"}


def test_a_layer_with_slashes_in_its_name_keeps_all_of_it(tmp_path: Path) -> None:
    k = tf_keras()
    names = ["Conv", "block/squeeze/Conv", "block/expand/Conv"]
    inner = k.Sequential([k.layers.Input((4,)), *(k.layers.Dense(4, name=name) for name in names)], name="inner")
    model = k.Sequential([k.layers.Input((4,)), inner, k.layers.Dense(2, name="head/Conv")])
    model.save(tmp_path / "m.h5")
    model.save_weights(tmp_path / "weights.h5")
    for name in ("m.h5", "weights.h5"):
        assert {tensor.layer for tensor in open_model(tmp_path / name).tensors} == {*names, "head/Conv"}


def test_a_part_of_a_layer_is_not_taken_for_another_layer_of_that_name(tmp_path: Path) -> None:
    k = tf_keras()
    inputs = k.Input((4, 8))
    x = k.layers.Dense(8, name="query")(inputs)
    k.Model(inputs, k.layers.MultiHeadAttention(2, 4, name="attention")(x, x)).save(tmp_path / "m.h5")
    layers = {tensor.name: tensor.layer for tensor in open_model(tmp_path / "m.h5").tensors}
    assert layers["attention/query/kernel:0"] == "attention"
    assert layers["query/kernel:0"] == "query"


def test_weights_alone_name_a_recurrent_layer_without_its_cell(tmp_path: Path) -> None:
    k = tf_keras()
    forward = k.layers.Bidirectional(k.layers.GRU(4, return_sequences=True, name="gru"), name="both")
    k.layers.LSTM(1)  # so that the cell below is not the first of its class
    k.Sequential([k.layers.Input((8, 6)), forward, k.layers.LSTM(2, name="memory")]).save_weights(tmp_path / "m.h5")
    layers = {tensor.layer for tensor in open_model(tmp_path / "m.h5").tensors}
    assert layers == {"both/forward_gru", "both/backward_gru", "memory"}


def test_keras_1_kernels_of_theano_have_their_outputs_first(tmp_path: Path) -> None:
    arrays = {"convolution2d_1_W": np.ones((8, 2, 3, 3), np.float32), "convolution2d_1_b": np.ones(8, np.float32)}
    kernel = open_model(keras_1(tmp_path / "m.h5", arrays)).tensors[0]
    assert (kernel.role, kernel.layer, kernel.out_axis) == ("kernel", "convolution2d_1", 0)


def test_big_endian_numbers_are_read_as_the_numbers_that_they_are(tmp_path: Path) -> None:
    values = np.arange(6, dtype=">f4").reshape(2, 3)
    model = open_model(keras_1(tmp_path / "m.h5", {"dense_1_W": values}))
    assert model.tensors[0].storage.big_endian
    assert model.tensors[0].dtype == np.float32
    np.testing.assert_array_equal(model.read(model.tensors[0]), values)


def test_a_compact_dataset_is_read(tmp_path: Path) -> None:
    path = keras_1(tmp_path / "m.h5", {})
    with h5py.File(path, "a") as file:
        file.attrs["layer_names"] = [b"dense_1"]
        group = file.create_group("dense_1")
        group.attrs["weight_names"] = [b"dense_1_W"]
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((2, 2))
        dataset = h5py.h5d.create(group.id, b"dense_1_W", h5py.h5t.NATIVE_FLOAT, space, creation)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.eye(2, dtype=np.float32))
    model = open_model(path)
    assert model.tensors[0].storage.extent is None
    assert raw(model.read(model.tensors[0])) == raw(np.eye(2, dtype=np.float32))


def test_two_names_of_one_dataset_share_its_storage(tmp_path: Path) -> None:
    path = keras_1(tmp_path / "m.h5", {"dense_1_W": np.ones((2, 2), np.float32)})
    with h5py.File(path, "a") as file:
        file["dense_1/dense_1_U"] = file["dense_1/dense_1_W"]
    one, other = open_model(path).tensors
    assert one.storage.key == other.storage.key


def test_a_weight_that_is_promised_but_missing_is_told(tmp_path: Path) -> None:
    path = keras_1(tmp_path / "m.h5", {"dense_1_W": np.ones((2, 2), np.float32), "dense_1_b": np.ones(2, np.float32)})
    with h5py.File(path, "a") as file:
        del file["dense_1/dense_1_b"]
    assert "dense_1_b is named in it, but missing" in open_model(path).about.notes[0]


def test_more_layers_than_one_attribute_can_name_are_found(tmp_path: Path) -> None:
    path = keras_1(tmp_path / "m.h5", {"a_W": np.ones((2, 2), np.float32), "b_W": np.ones((2, 2), np.float32)})
    with h5py.File(path, "a") as file:
        names = file.attrs["layer_names"]
        del file.attrs["layer_names"]
        file.attrs["layer_names0"], file.attrs["layer_names1"] = names[:1], names[1:]
    assert [tensor.name for tensor in open_model(path).tensors] == ["a_W", "b_W"]


def outside(file: h5py.File) -> None:
    file["dense_1/dense_1_b"] = h5py.ExternalLink("other.h5", "/x")


def dangling(file: h5py.File) -> None:
    file["dense_1/dense_1_b"] = h5py.SoftLink("/nowhere")


def external(file: h5py.File) -> None:
    file["dense_1"].create_dataset("b", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file["dense_1"].create_virtual_dataset("b", layout)


def endless(file: h5py.File) -> None:
    file["dense_1"].create_dataset("b", (1 << 40,), "f4", chunks=(1 << 20,))


def deep(file: h5py.File) -> None:
    group = file["dense_1"]
    for _ in range(300):
        group = group.create_group("g")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (outside, "links to another file, other.h5"),
        (dangling, "links to /nowhere, which is not in the file"),
        (external, "stores its values in another file, /etc/passwd"),
        (virtual, "is assembled from other files"),
        (endless, "claims 4398046511104 bytes, but 0 are stored"),
        (deep, "nested more than 200 deep"),
    ],
)
def test_a_file_that_leads_elsewhere_or_lies_is_refused(tmp_path: Path, spoil: Any, complaint: str) -> None:
    path = keras_1(tmp_path / "m.h5", {"dense_1_W": np.ones((2, 2), np.float32)})
    with h5py.File(path, "a") as file:
        spoil(file)
    with pytest.raises(InputError, match=complaint):
        open_model(path)


def test_groups_that_hold_one_another_are_walked_once(tmp_path: Path) -> None:
    path = keras_1(tmp_path / "m.h5", {"dense_1_W": np.ones((2, 2), np.float32)})
    with h5py.File(path, "a") as file:
        file["dense_1/again"] = file["dense_1"]
    assert len(open_model(path).tensors) == 1


def test_an_hdf5_file_that_keras_did_not_write_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["table"] = np.ones(4)
    with pytest.raises(InputError, match="but not a Keras model"):
        open_model(tmp_path / "m.h5")


def test_a_configuration_nested_a_hundred_thousand_deep_is_refused(tmp_path: Path) -> None:
    path = keras_1(tmp_path / "m.h5", {"dense_1_W": np.ones((2, 2), np.float32)})
    with h5py.File(path, "a", libver="latest") as file:
        file.attrs["model_config"] = '{"config": ' * 100_000
    with pytest.raises(InputError, match="nested too deep"):
        open_model(path)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the children that are made."""
    made, fork = [], sandbox._server.fork

    def counted(module: str) -> Any:
        child = fork(module)
        made.append(child[0])
        return child

    monkeypatch.setattr(sandbox._server, "fork", counted)
    return made


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_file_in_chunks_is_pruned_with_few_children(scope: str, forks: list[int], tmp_path: Path) -> None:
    found, written = reference.prune(CHUNKED, tmp_path / "out", sparsity=0.5, scope=scope)
    assert 1 <= len(forks) <= 3
    before, after = reference.arrays(CHUNKED), reference.arrays(written)
    kernels = {cut.tensor.name: before[cut.tensor.name] for cut in found.plan.cuts}
    marks = (reference.layerwise if scope == "layer" else reference.together)(kernels, 0.5)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], np.where(marks[name], 0, array) if name in marks else array)
    assert {name: tally.dropped for name, tally in found.counts.items()} == {
        name: np.count_nonzero(mark) for name, mark in marks.items()
    }
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [written.name]


def test_a_dataset_in_chunks_is_decoded_no_more_often_than_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = hdf5.decode

    def counted(place: Any, name: str, *words: Any) -> Any:
        decoded.append(name)
        return decode(place, name, *words)

    monkeypatch.setattr(hdf5, "decode", counted)
    reference.prune(CHUNKED, tmp_path / "out", sparsity=0.5)
    # Counted before and after, each time with a second look at its channels or its norm, and pruned in between.
    assert max(Counter(decoded).values()) <= 6


def test_a_plug_in_scores_what_is_in_chunks_once_and_fails_in_its_own_name(tmp_path: Path) -> None:
    text = "with open(__file__ + '.log', 'a') as log:\n        log.write(f'{w.shape}\\n')\n    return abs(w)"
    (tmp_path / "mine.py").write_text(f"def s(w):\n    {text}\n\ndef bad(w):\n    return w - 9\n")
    found, _ = reference.prune(CHUNKED, tmp_path / "out", sparsity=0.5, strategy=f"{tmp_path / 'mine.py'}:s")
    assert len((tmp_path / "mine.py.log").read_text().splitlines()) == len(found.plan.cuts)
    with pytest.raises(WorkError, match="a negative score"):
        reference.prune(CHUNKED, tmp_path / "bad", sparsity=0.5, strategy=f"{tmp_path / 'mine.py'}:bad")
    assert not list((tmp_path / "bad").iterdir())
