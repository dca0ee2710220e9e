"""Channels cut out of Keras files: what is refused, what is locked, and what else stands in the file."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prunectl.channels import adapter, verify
from prunectl.channels.adapter import open_adapter
from prunectl.channels.groups import channel_groups
from prunectl.channels.keras import adapter as keras_adapter
from prunectl.channels.prune import prune_channels
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest as Asked
from prunectl.training.backend import LoadOptions, TrainOptions
from prunectl.training.finetune import finetune
from prunectl.training.request import FinetuneRequest, KeepWeights
from tests.channels.keras.masked import silence
from tests.channels.keras.nets import LIBRARIES, filled, keras, nested, residual, shared, tf_keras
from tests.channels.keras.test_keras_nets import cut, images, say, short
from tests.running import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = f"{FIXTURES / 'digits.npz'}?limit=100"


def locks(path: Path) -> dict[str, str]:
    return {
        family.name: family.locked_because
        for family in channel_groups(open_model(path)).groups
        if family.locked_because
    }


def saved(model: Any, path: Path) -> Path:
    model.save(path)
    return path


@pytest.mark.parametrize("name", ["digits_cnn.h5", "digits_cnn.keras", "chunked_and_gzipped.h5", "deflated.keras"])
def test_the_digits_network_loses_half_of_its_channels(name: str, tmp_path: Path) -> None:
    path, output = FIXTURES / name, tmp_path / name
    before = path.read_bytes()
    found = cut(path, output)
    assert path.read_bytes() == before
    assert found.dropped * 2 == found.channels
    old, new = open_model(path), open_model(output)
    assert new.about.is_compressed == old.about.is_compressed
    assert (new.about.producer, new.about.training, new.about.optimizer) == (
        old.about.producer,
        old.about.training,
        old.about.optimizer,
    )
    library = tf_keras if "keras 2" in old.about.producer else keras
    assert library.models.load_model(output).count_params() == found.after.params.total


def test_a_sequential_model_that_is_a_bare_list_of_layers_is_cut_as_that_of_today_is(tmp_path: Path) -> None:
    today, old = FIXTURES / "digits_cnn.h5", tmp_path / "old.h5"
    shutil.copy(today, old)
    with h5py.File(old, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        assert config["class_name"] == "Sequential"
        first, *layers = config["config"]["layers"]
        layers[0]["config"]["batch_input_shape"] = first["config"]["batch_input_shape"]
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": layers})
        file.attrs["keras_version"] = "2.0.6"
    cut(today, tmp_path / "small.h5")
    found = cut(old, tmp_path / "small_old.h5")
    assert found.dropped
    wanted = short(open_model(tmp_path / "small.h5").tensors)
    assert short(open_model(tmp_path / "small_old.h5").tensors) == wanted
    loaded = tf_keras.models.load_model(tmp_path / "small_old.h5", compile=False)
    assert loaded.count_params() == found.after.params.total


def test_nothing_but_numbers_of_channels_changes_in_the_configuration(tmp_path: Path) -> None:
    path, output = saved(nested(keras), tmp_path / "net.keras"), tmp_path / "small.keras"
    cut(path, output)
    texts = []
    for file in (path, output):
        with zipfile.ZipFile(file) as archive:
            texts.append(json.loads(archive.read("config.json")))
            kept = archive.read("metadata.json")
    with zipfile.ZipFile(path) as archive:
        assert archive.read("metadata.json") == kept
    differing = dict(_differences(*texts))
    assert {key[-1] for key in differing} <= {"filters", "units", 0, 1, 2, 3}
    assert set(differing.values()) == {(8, 4), (12, 6)}
    again = keras.models.load_model(output)
    assert json.loads(again.to_json())["config"].keys() == texts[1]["config"].keys()


def _differences(one: Any, other: Any, *way: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from _differences(one[key], other[key], *way, key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, *way, number)
    elif one != other:
        yield way, (one, other)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("which", LIBRARIES)
def test_what_the_optimizer_knows_of_a_weight_is_cut_with_it(which: str, suffix: str, tmp_path: Path) -> None:
    library = LIBRARIES[which]
    of = library.layers
    layers = [library.Input((6, 6, 2)), of.Conv2D(6, 3, name="one"), of.BatchNormalization(name="norm"), of.ReLU()]
    layers += [of.Conv2D(4, 1, name="two"), of.Flatten(), of.Dense(3, name="last")]
    model = filled(library.Sequential(layers, name="net"))
    model.compile(library.optimizers.Adam(0.01), library.losses.MeanSquaredError(), run_eagerly=True)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 6, 6, 2)), random.normal(size=(8, 3))
    model.fit(x, y, verbose=0)
    path, output = saved(model, tmp_path / f"net{suffix}"), tmp_path / f"small{suffix}"
    found = cut(path, output)
    small = library.models.load_model(output)
    if which == "three" and suffix == ".h5":
        # Keras 3 writes the state, but does not read it.
        old, new = _slots_in(path, model), _slots_in(output, model)
        small.compile("adam", "mse", run_eagerly=True)
    else:
        old, new = _slots(model), _slots(small)
    assert old.keys() == new.keys()
    assert len(old) == 2 * len(model.trainable_variables)
    gone = {
        (place.tensor.removesuffix(":0"), place.axis): set[int]()
        for loss in found.pruned_groups
        for place in loss.group.axes
    }
    for loss in found.pruned_groups:
        for number in loss.dropped:
            for place, indices in zip(loss.group.axes, loss.group.channel(number), strict=True):
                gone[place.tensor.removesuffix(":0"), place.axis].update(indices)
    for (variable, kind), value in old.items():
        left = value
        for (tensor, axis), indices in gone.items():
            if tensor.split("/")[-2:] == variable.split("/")[-2:]:
                left = np.delete(left, sorted(indices), axis)
        np.testing.assert_array_equal(new[variable, kind], left, f"{variable} {kind}")
    assert np.isfinite(small.fit(x, y, verbose=0).history["loss"][0])


def _slots_in(path: Path, model: Any) -> dict[tuple[str, str], Any]:
    """The same, as it stands in a file of Keras 3."""
    with h5py.File(path) as file:
        # Keras numbers the optimizers of a process.
        slots = next(group for name, group in file["optimizer_weights"].items() if name.startswith("adam"))
        return {
            (one.path, kind): slots[f"{one.path.replace('/', '_')}_{kind}"][()]
            for one in model.trainable_variables
            for kind in ("momentum", "velocity")
        }


def _slots(model: Any) -> dict[tuple[str, str], Any]:
    """What Adam keeps, by the name of the variable and of what it is."""
    optimizer = model.optimizer
    kinds = {"m": optimizer._momentums, "v": optimizer._velocities}
    paths = [getattr(one, "path", one.name).removesuffix(":0") for one in model.trainable_variables]
    named = ["/".join(path.split("/")[-2:]) for path in paths]
    return {
        (name, kind): np.array(slot) for kind, slots in kinds.items() for name, slot in zip(named, slots, strict=True)
    }


def test_the_state_of_an_optimizer_of_strangers_is_left_out_and_said_so(tmp_path: Path) -> None:
    of = tf_keras.layers
    model = tf_keras.Sequential([tf_keras.Input((4,)), of.Dense(6, name="in"), of.Dense(2, name="out")])
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(np.zeros((2, 4)), np.zeros((2, 2)), verbose=0)
    path = saved(model, tmp_path / "net.h5")
    with h5py.File(path, "r+") as file:
        group = file["optimizer_weights"]
        names = [str(name) for name in group.attrs["weight_names"]]
        file.move(f"optimizer_weights/{names[1]}", "optimizer_weights/unheard_of")
        group.attrs["weight_names"] = [names[0], "unheard_of", *names[2:]]
    found = cut(path, tmp_path / "small.h5")
    assert any("optimizer state was left out" in note for note in found.notes)
    again = tf_keras.models.load_model(tmp_path / "small.h5")
    assert again.get_layer("in").kernel.shape == (4, 3)
    again.fit(np.zeros((2, 4)), np.zeros((2, 2)), verbose=0)


def test_a_cut_in_the_wrong_place_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = adapter.delete_indices

    def wrong(array: Any, axes: Any) -> Any:
        return right(array, {axis: (indices + 1) % array.shape[axis] for axis, indices in axes.items()})

    monkeypatch.setattr(keras_adapter, "delete_indices", wrong)
    with pytest.raises(WorkError, match="differ from the original's"):
        cut(FIXTURES / "digits_cnn.keras", tmp_path / "small.keras")
    assert list(tmp_path.iterdir()) == []


def test_a_softmax_at_the_end_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = keras.layers
    layers = [keras.Input((4,)), of.Dense(8, name="in"), of.Dense(3, activation="softmax", name="out")]
    path = saved(filled(keras.Sequential(layers)), tmp_path / "net.keras")
    shown: list[int] = []
    apart = verify.relative_difference

    def looking(one: Any, other: Any) -> float:
        shown.append(bool(np.isclose(np.sum(one), 1)))
        return apart(one, other)

    monkeypatch.setattr(verify, "relative_difference", looking)
    cut(path, tmp_path / "small.keras")
    assert shown == [True, False, False] * (verify.RUNS + 1)  # once more in float64


@pytest.mark.parametrize("which", LIBRARIES)
def test_what_nothing_is_known_of_keeps_its_channels(which: str, tmp_path: Path) -> None:
    of = LIBRARIES[which].layers
    i = LIBRARIES[which].Input((6, 8))
    x = of.Dense(8, name="first")(i)
    x = of.GaussianNoise(0.1)(of.LayerNormalization(name="layer_norm")(x))
    x = of.Dense(6, name="free")(x)
    x = of.Dense(8, name="second")(x)
    y = of.Dot(axes=2, name="all_pairs")([x, x])
    path = saved(LIBRARIES[which].Model(i, of.Dense(2, name="last")(of.Flatten()(y))), tmp_path / "net.keras")
    found = locks(path)
    reasons = {name.split("/")[0]: reason for name, reason in found.items()}
    assert reasons.keys() == {"first", "second", "last"}
    assert "LayerNormalization layer_norm" in reasons["first"]
    assert "Dot all_pairs" in reasons["second"]
    assert reasons["last"] == "last is an output of the network"
    assert short(open_model(path).tensors)["free/kernel"] == (8, 6)


def test_a_layer_that_is_also_used_in_a_way_that_is_not_known_stays(tmp_path: Path) -> None:
    of = keras.layers
    twice = of.Dense(8, name="twice")
    i, j = keras.Input((8,)), keras.Input((8,))
    x = of.Concatenate(axis=0, name="batches")([twice(i), j])
    model = keras.Model([i, j], of.Dense(2, name="last")(twice(x)))
    reasons = locks(saved(model, tmp_path / "net.keras"))
    assert reasons["twice/kernel"]


def test_channels_of_one_input_are_open_to_any_size(tmp_path: Path) -> None:
    of = keras.layers
    i = keras.Input((None, None, 3))
    x = of.Conv2D(8, 3, strides=2, name="one")(i)
    x = of.Conv2D(6, 3, name="two")(of.MaxPooling2D()(x))
    path = saved(filled(keras.Model(i, of.Dense(2)(of.GlobalMaxPooling2D()(x)))), tmp_path / "net.keras")
    found = cut(path, tmp_path / "small.keras")
    assert found.dropped == 7
    small = keras.models.load_model(tmp_path / "small.keras")
    assert small.input_shape == (None, None, None, 3)
    assert small(np.zeros((1, 30, 20, 3))).shape == (1, 2)


def test_weights_alone_say_nothing_of_channels(tmp_path: Path) -> None:
    path = tmp_path / "net.weights.h5"
    residual(keras).save_weights(path)
    with pytest.raises(InputError, match="holds only weights"):
        cut(path, tmp_path / "small.weights.h5")
    with pytest.raises(InputError, match="holds only weights"):
        cut(FIXTURES / "weights_only.h5", tmp_path / "small.h5")


def test_layers_in_wrappers_have_to_come_out_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="inside tfmot wrappers") as caught:
        cut(FIXTURES / "wrapped_by_tfmot.h5", tmp_path / "small.h5")
    assert "prunectl strip" in caught.value.hint


def test_a_model_of_the_users_own_code_is_not_followed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--builder cannot be used with"):
        cut(FIXTURES / "digits_cnn.h5", tmp_path / "small.h5", model="mod:build")


def test_a_lambda_is_not_run_unless_it_is_trusted(tmp_path: Path) -> None:
    of = keras.layers
    layers = [keras.Input((4,)), of.Dense(8), of.Dense(4), of.Lambda(lambda value: value * 2, output_shape=(4,))]
    path = saved(keras.Sequential(layers), tmp_path / "net.keras")
    with pytest.raises(InputError, match="holds code") as refused:
        cut(path, tmp_path / "small.keras")
    assert refused.value.hint == "if you trust its author, add --trust"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("which", "is_said", "is_graph"),
    [("two", True, True), ("three", True, False), ("two", False, False), ("three", False, True)],
)
def test_a_lambda_locks_only_the_channels_that_meet_it(
    which: str, is_said: bool, is_graph: bool, tmp_path: Path
) -> None:
    library, asked = LIBRARIES[which], Asked(sparsity=0.5, pattern="channel")
    of = library.layers
    said = {"output_shape": (8, 8, 8)} if is_said else {}
    layers = [
        library.Input((8, 8, 3)),
        of.Lambda(lambda value: value / 255.0, **({"output_shape": (8, 8, 3)} if is_said else {})),
        of.Conv2D(6, 3, padding="same", name="free"),
        of.Conv2D(8, 3, padding="same", name="locked"),
        of.Lambda(lambda value: value * 2, name="twice", **said),
        of.Conv2D(4, 3, name="behind"),
        of.Flatten(),
        of.Dense(2, name="out"),
    ]
    model = library.Sequential(layers)
    if is_graph:
        value = model.inputs[0]
        for layer in model.layers:
            value = layer(value)
        model = library.Model(model.inputs[0], value)
    path = saved(filled(model), tmp_path / ("net.h5" if library is tf_keras else "net.keras"))
    held = locks(path)
    assert "twice" in held["locked/kernel:0" if "locked/kernel:0" in held else "locked/kernel"]
    assert not any(name.startswith(("free", "behind")) for name in held)
    output = tmp_path / f"small{path.suffix}"
    prune_channels(path, asked, Destination(output), is_trusted=True)
    shapes = {
        tensor.name.removesuffix(":0").rpartition("/")[0]: tensor.shape
        for tensor in open_model(output).tensors
        if tensor.role == "kernel"
    }
    assert [shape[-1] for shape in shapes.values()] == [3, 8, 2, 2]


def test_a_lambda_that_changes_the_shape_without_saying_so_locks_what_is_behind_it(tmp_path: Path) -> None:
    of = tf_keras.layers
    layers = [
        tf_keras.Input((8, 8, 3)),
        of.Conv2D(6, 3, name="free"),
        of.Conv2D(8, 3, name="locked"),
        of.Lambda(lambda value: value[:, ::2, ::2, :4]),
        of.Flatten(),
        of.Dense(6, name="behind"),
        of.Dense(2, name="out"),
    ]
    path = saved(filled(tf_keras.Sequential(layers)), tmp_path / "net.h5")
    output = tmp_path / "small.h5"
    prune_channels(path, Asked(sparsity=0.5, pattern="channel"), Destination(output), is_trusted=True)
    kernels = [tensor.shape[-1] for tensor in open_model(output).tensors if tensor.role == "kernel"]
    assert kernels == [3, 8, 6, 2]


def test_what_is_left_can_be_fine_tuned(tmp_path: Path) -> None:
    output = tmp_path / "small.keras"
    cut(FIXTURES / "digits_cnn.keras", output)
    shapes = {tensor.name: tensor.shape for tensor in open_model(output).tensors}
    request = FinetuneRequest(
        DATA, means=TrainOptions(lr=0.002, device="cpu"), origin=LoadOptions(), epochs=1, keep=KeepWeights.LAST
    )
    done = finetune(output, request, Destination(tmp_path / "tuned.keras"))
    assert done is not None
    assert {tensor.name: tensor.shape for tensor in open_model(tmp_path / "tuned.keras").tensors} == shapes


def test_a_class_of_the_users_own_is_not_taken_for_the_one_of_that_name(tmp_path: Path) -> None:
    path = saved(nested(keras), tmp_path / "net.keras")
    other = tmp_path / "other.keras"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w") as changed:
        for name in archive.namelist():
            text = archive.read(name)
            changed.writestr(
                name, text.replace(b'"keras.layers", "class_name": "ReLU"', b'"mine", "class_name": "ReLU"')
            )
    assert "stem/kernel" not in locks(path)
    assert locks(other)["stem/kernel"] == "ReLU stem_relu"


def test_a_first_value_of_a_maximum_for_each_channel_locks_the_channels(tmp_path: Path) -> None:
    i = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, name="free")(i)
    x = keras.ops.max(keras.layers.Conv2D(8, 3, name="locked")(x), axis=(1, 2), initial=[0.0] * 8)
    path = saved(filled(keras.Model(i, keras.layers.Dense(4, name="out")(x))), tmp_path / "net.keras")
    held = locks(path)
    assert "max" in held["locked/kernel"].lower()
    assert not any(name.startswith("free") for name in held)


@pytest.mark.parametrize("suffix", [".keras", ""], ids=["archive", "folder"])
def test_emptied_filters_go_without_a_trace(suffix: str, tmp_path: Path) -> None:
    of = tf_keras.layers
    layers = [tf_keras.Input((6, 6, 2)), of.Conv2D(6, 3, activation="relu", name="one")]
    layers += [of.Conv2D(4, 3, use_bias=False, name="two"), of.BatchNormalization(name="norm"), of.ReLU()]
    layers += [of.Flatten(), of.Dense(5, activation="tanh", name="wide"), of.Dense(3, name="last")]
    model = filled(tf_keras.Sequential(layers, name="net"))
    for name, dead in (("one", [1, 4]), ("wide", [0])):
        kernel, bias = (np.array(weight) for weight in model.get_layer(name).weights)
        kernel[..., dead] = 0
        model.get_layer(name).set_weights([kernel, bias])
    path, output = saved(model, tmp_path / f"net{suffix}"), tmp_path / f"small{suffix}"
    found = prune_channels(path, Asked(pattern="channel"), Destination(output), dead=True)
    assert found.dropped == 3
    small = tf_keras.models.load_model(output)
    assert [layer.units for layer in small.layers if hasattr(layer, "units")] == [4, 3]
    given = images(model)
    np.testing.assert_allclose(say(small, given), say(model, given), rtol=1e-4, atol=1e-5)


def test_a_saved_model_is_written_anew(tmp_path: Path) -> None:
    path, output = FIXTURES / "digits_cnn_savedmodel", tmp_path / "small"
    found = cut(path, output)
    assert "without optimizer state" in found.notes[0]
    new = {tensor.name: tensor.shape for tensor in open_model(output).tensors}
    assert new["layer_with_weights-2/kernel"] == (128, 16)
    model, small = (tf_keras.models.load_model(one) for one in (path, output))
    given = images(model)
    wanted, said = say(silence(model, found), given), say(small, given)
    np.testing.assert_allclose(said[0], wanted[0], rtol=1e-4, atol=1e-6)


def test_a_saved_model_that_keras_cannot_write_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not describe its Keras layers"):
        cut(FIXTURES / "every_variable_twice", tmp_path / "small")
    tensorflow = pytest.importorskip("tensorflow")
    model = tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(3), tf_keras.layers.Dense(2)])
    served = tensorflow.function(model.call, input_signature=[tensorflow.TensorSpec((None, 4), "float32")])
    model.save(tmp_path / "net", signatures={"mine": served})
    with pytest.raises(InputError, match="would lose its signatures mine"):
        cut(tmp_path / "net", tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("which", LIBRARIES)
def test_what_is_shown_comes_once_for_each_name_as_the_graph_has_it(which: str, tmp_path: Path) -> None:
    source = open_adapter(open_model(saved(shared(LIBRARIES[which]), tmp_path / "net.keras")), LoadOptions())
    assert {name.partition("~")[0] for name in source.observable} == {
        "thin",
        "each_step/timed",
        "line",
        "last",
        "other",
    }
    names = sorted(source.observable, reverse=True)
    made = source.runner(source.with_weights({}), names)(source.random_inputs(np.random.default_rng(0)))
    shapes = [source.graph.shapes[name] for name in names]
    assert [np.shape(one) for one in made[2:]] == shapes
    assert {(1, 6, 12, 12), (12, 10), (1, 8, 12)} <= set(shapes)
