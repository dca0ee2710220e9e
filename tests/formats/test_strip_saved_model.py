"""Stripping SavedModels: what is left loads everywhere, and predicts what it did, to the bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError, MissingExtraError, UntrustedError, UsageError, WorkError
from prunectl.formats.base import StripOptions, StripPart
from prunectl.formats.registry import open_model
from prunectl.formats.tensorflow.bundle import read_bundle
from prunectl.formats.tensorflow.leveldb import masked_crc
from prunectl.formats.tensorflow.strip import verify
from prunectl.pruning.destination import Destination
from prunectl.pruning.strip import Stripped
from prunectl.pruning.strip import strip as run
from tests.contract import Array, raw
from tests.networks import small_keras, tf_keras
from tests.running import FIXTURES

tf: Any = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.filterwarnings("ignore")


def strip(path: Path, *parts: StripPart, to_half: bool = False) -> tuple[Path, Stripped]:
    """Strip some parts, or all of them, into another folder."""
    target = path.with_name(f"stripped_{path.name}")
    wish = StripOptions(frozenset(parts or StripPart), to_half=to_half)
    return target, run(path, wish, Destination(target), is_packed=False)


def bits(weights: Any) -> list[bytes]:
    return [raw(np.asarray(weight)) for weight in weights]


def served(path: Path, x: Array, *, is_v1: bool = False) -> list[bytes]:
    """What the serving signature answers, in the order of its names."""
    if not is_v1:
        loaded = tf.saved_model.load(str(path))
        serve = loaded.signatures["serving_default"]
        (name,) = serve.structured_input_signature[1]
        found = serve(**{name: tf.constant(x)})
        return bits(found[name] for name in sorted(found))
    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        meta = v1.saved_model.load(session, ["serve"], str(path)).signature_def["serving_default"]
        (given,) = meta.inputs.values()
        names = [meta.outputs[name].name for name in sorted(meta.outputs)]
        return bits(session.run(names, {given.name: x}))


X = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)


def trained(optimizer: Any = "adam") -> Any:
    model = small_keras(tf_keras(), {})
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True)
    model.fit(X, np.ones((4, 3)), epochs=3, verbose=0)
    return model


@pytest.fixture(scope="module", params=["new", "legacy"])
def saved_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    path = tmp_path_factory.mktemp("trained") / "m"
    model = trained(tf_keras().optimizers.legacy.Adam() if request.param == "legacy" else "adam")
    model.save(path, save_format="tf")
    return model, path


@pytest.fixture
def saved(saved_once: tuple[Any, Path], tmp_path: Path) -> tuple[Any, Path]:
    """A model, and a copy of its folder that a test may change."""
    model, path = saved_once
    return model, Path(shutil.copytree(path, tmp_path / "m"))


def test_a_trained_model_loads_everywhere_and_predicts_the_same(saved: tuple[Any, Path]) -> None:
    model, path = saved
    target, _ = strip(path)
    assert served(target, X) == served(path, X)
    assert served(target, X, is_v1=True) == served(path, X, is_v1=True)
    again = tf_keras().models.load_model(target)
    assert bits(again.get_weights()) == bits(model.get_weights())
    assert not again._is_compiled
    assert (target / "saved_model.pb").read_bytes() == (path / "saved_model.pb").read_bytes()


def test_the_bytes_that_are_said_to_go_are_gone(saved: tuple[Any, Path]) -> None:
    _, path = saved
    target, found = strip(path)
    shard, metadata = Path("variables/variables.data-00000-of-00001"), Path("keras_metadata.pb")
    gone = {
        part: sum(thing.bytes for thing in found.removed if (thing.name == "training_config") is part)
        for part in (True, False)
    }
    assert gone[True] == (path / metadata).stat().st_size - (target / metadata).stat().st_size > 0
    assert gone[False] == (path / shard).stat().st_size - (target / shard).stat().st_size > 0
    state = [tensor for tensor in open_model(target).tensors if tensor.role == "optimizer" and tensor.shape]
    assert {tensor.storage.key for tensor in state} == {state[0].storage.key}
    assert not any(open_model(target).read(tensor).any() for tensor in state)
    rest = max(tensor.nbytes for tensor in state)
    assert any(f"are {rest} bytes of zeros" in note for note in open_model(target).about.notes)


def test_without_its_state_a_compiled_model_goes_on_from_the_start(saved: tuple[Any, Path]) -> None:
    model, path = saved
    target, found = strip(path, StripPart.OPTIMIZER)
    assert {thing.part for thing in found.removed} == {StripPart.OPTIMIZER}
    again = tf_keras().models.load_model(target)
    assert bits(again.get_weights()) == bits(model.get_weights())
    assert int(again.optimizer.iterations) == 0
    assert float(again.optimizer.learning_rate) == pytest.approx(0.001)
    fresh = small_keras(tf_keras(), {})
    fresh.set_weights(model.get_weights())
    fresh.compile(type(model.optimizer)(), "mse")
    for one in (again, fresh):
        one.run_eagerly = True
        one.fit(X, np.ones((4, 3)), verbose=0, shuffle=False)
    for one, other in zip(again.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_without_its_training_configuration_the_state_stays(saved: tuple[Any, Path]) -> None:
    _, path = saved
    target, found = strip(path, StripPart.TRAINING)
    assert {thing.name for thing in found.removed if thing.bytes} >= {"training_config"}
    assert not tf_keras().models.load_model(target)._is_compiled
    moments = [tensor for tensor in open_model(path).tensors if tensor.role == "optimizer" and tensor.shape]
    kept = {tensor.name: tensor for tensor in open_model(target).tensors}
    assert all(raw(open_model(target).read(kept[old.name])) == raw(open_model(path).read(old)) for old in moments)


def test_the_same_folder_is_stripped_to_the_same_bytes(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = saved
    target, _ = strip(path)
    before = {file.name: file.read_bytes() for file in target.rglob("*") if file.is_file()}
    again, found = strip(target)
    assert {file.name: file.read_bytes() for file in again.rglob("*") if file.is_file()} == before
    assert found.removed == ()


def test_a_signature_that_trains_keeps_its_optimizer(tmp_path: Path) -> None:
    class Trainer(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(tf.ones((3, 4)), name="dense/kernel")
            self.optimizer = tf_keras().optimizers.legacy.Adam()
            self.optimizer.apply_gradients([(tf.ones((3, 4)), self.w)])

        @tf.function(input_signature=[tf.TensorSpec((3, 4), tf.float32)])
        def step(self, x: Any) -> Any:
            self.optimizer.apply_gradients([(x, self.w)])
            return {"w": self.w + 0.0}

    module = Trainer()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.step)
    _, found = strip(tmp_path / "m")
    assert found.removed == ()


def test_a_model_of_tensorflow_1_is_served_as_before(tmp_path: Path) -> None:
    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 5])
        y = x @ v1.get_variable("dense/kernel", [5, 5]) @ v1.get_variable("head/kernel", [5, 2])
        v1.train.AdamOptimizer().minimize(v1.reduce_sum(y), global_step=v1.train.get_or_create_global_step())
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(tmp_path / "m"), {"x": x}, {"y": y})
    target, found = strip(tmp_path / "m")
    assert sum(thing.bytes for thing in found.removed) == 4 * (25 + 10 + 10)
    assert served(target, X, is_v1=True) == served(tmp_path / "m", X, is_v1=True)


def test_zeros_that_are_shared_are_only_believed_where_the_checksums_say_zeros(saved: tuple[Any, Path]) -> None:
    _, path = saved
    target, _ = strip(path)
    index = target / "variables" / "variables.index"
    bundle = read_bundle(index)
    leader = next(iter(bundle.shared.values()))
    assert all(bundle.entries[key].offset == leader.offset for key in bundle.shared)
    data = bytearray(index.read_bytes())
    at = leader.crc_at
    data[at] ^= 1
    block = leader.block
    data[block.crc_at : block.crc_at + 4] = masked_crc(bytes(data[block.begin : block.crc_at])).to_bytes(4, "little")
    index.write_bytes(data)
    with pytest.raises(InputError, match="overlaps another tensor"):
        open_model(target)


def test_sixteen_bits_are_refused(saved: tuple[Any, Path]) -> None:
    with pytest.raises(UsageError, match="its graph fixes the type of every variable"):
        strip(saved[1], to_half=True)


def test_an_export_of_keras_3_stays_as_it_is_and_says_what_it_holds_twice(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURES / "every_variable_twice", tmp_path / "m"))
    target, found = strip(path)
    assert found.removed == ()
    assert "holds some variables twice" in found.after.about.notes[0]
    assert {file.name: file.read_bytes() for file in target.rglob("*.*") if file.is_file()} == {
        file.name: file.read_bytes() for file in path.rglob("*.*") if file.is_file()
    }


# --- Wrappers of tfmot ---


def tfmot() -> Any:
    return pytest.importorskip("tensorflow_model_optimization").sparsity.keras


def wrapped(layer: Any) -> Any:
    return tfmot().prune_low_magnitude(layer, pruning_schedule=tfmot().ConstantSparsity(0.5, 0, frequency=1))


def plain_network() -> Any:
    """All layers of a model wrapped, the last one among them."""
    return wrapped(small_keras(tf_keras(), {}))


def branched() -> Any:
    k = tf_keras()
    inputs, shared = k.Input((5,), name="given"), wrapped(k.layers.Dense(5, name="shared"))
    x = k.layers.BatchNormalization(name="norm")(shared(shared(inputs)))
    inner_inputs = k.Input((5,))
    inner = k.Model(inner_inputs, wrapped(k.layers.Dense(4, name="deep"))(inner_inputs), name="inner")
    y = wrapped(k.layers.SimpleRNN(3, name="rnn"))(k.layers.Reshape((1, 4))(inner(x)))
    return k.Model(inputs, [wrapped(k.layers.Dense(2, name="head"))(y), x * 2.0 + 1.0])


def pruned(model: Any) -> Any:
    """A compiled model with random masks, which have not been applied to the weights yet."""
    random = np.random.default_rng(0)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    for weight in model.weights:
        if weight.dtype.is_floating:
            weight.assign(random.standard_normal(weight.shape))
    for weight, mask, _ in masks_of(model):
        mask.assign(random.random(mask.shape) < 0.5)
        weight.assign(np.where(mask.numpy() == 0, np.resize([-1.0, np.nan, np.inf], weight.shape), weight.numpy()))
    return model


def masks_of(model: Any) -> list[Any]:
    return [entry for layer in model.submodules for entry in getattr(layer, "pruning_vars", ())]


def reference(model: Any) -> Any:
    for weight, mask, _ in masks_of(model):
        weight.assign(np.where(mask.numpy() == 0, 0, weight.numpy()))
    return tfmot().strip_pruning(model)


def save(model: Any, path: Path, **signatures: Any) -> Path:
    """Save a model without the graphs of its layers, which say nothing of what most tests ask, and take long."""
    model.save(path, save_format="tf", save_traces=False, **signatures)
    return path


def served_by_default(model: Any) -> Any:
    """What Keras lets a model of one input serve where it writes the graphs of its layers."""
    (given,) = model.inputs

    @tf.function(input_signature=[tf.TensorSpec(given.shape, given.dtype, name=given.name)])
    def serving_default(given: Any) -> Any:
        return dict(zip(model.output_names, model(given), strict=True))

    return {"serving_default": serving_default}


@pytest.fixture
def _rebuilding(request: pytest.FixtureRequest) -> None:
    """Rebuild one model as it is done for users."""
    if request.node.callspec.params["make"] is not plain_network:
        request.getfixturevalue("_forked_rebuilding")


@pytest.mark.usefixtures("_rebuilding")
@pytest.mark.parametrize("make", [plain_network, branched])
def test_a_pruned_model_is_what_tfmot_strips_it_to(make: Any, tmp_path: Path) -> None:
    model = pruned(make())
    if make is plain_network:
        model.save(tmp_path / "m", save_format="tf")
    else:
        save(model, tmp_path / "m", signatures=served_by_default(model))
    (tmp_path / "m" / "readme.txt").write_text("kept")
    target, found = strip(tmp_path / "m")
    expected = reference(model)
    again = tf_keras().models.load_model(target)
    assert bits(again.get_weights()) == bits(expected.get_weights())
    assert [layer.name for layer in again.layers] == [layer.name for layer in expected.layers]
    assert again.optimizer is None
    for one, other in zip(tf.nest.flatten(again(X)), tf.nest.flatten(expected(X)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    old, new = (tf.saved_model.load(str(path)).signatures["serving_default"] for path in (tmp_path / "m", target))
    assert new.structured_input_signature[1].keys() == old.structured_input_signature[1].keys()
    assert new.structured_outputs == old.structured_outputs
    parts = {thing.part for thing in found.removed}
    assert parts == {StripPart.MASKS, StripPart.WRAPPERS, StripPart.OPTIMIZER, StripPart.TRAINING}
    assert (target / "readme.txt").read_text() == "kept"
    assert not open_model(target).about.wrappers


@pytest.mark.usefixtures("_forked_rebuilding")
def test_variables_that_have_other_numbers_without_the_masks_are_held_against_their_own(tmp_path: Path) -> None:
    k = tf_keras()
    inner = k.Sequential([k.layers.Input((5,)), wrapped(k.layers.Dense(4)), k.layers.Dense(3)])
    model = pruned(k.Sequential([k.layers.Input((5,)), inner]))
    model.save(tmp_path / "m", save_format="tf")
    target, _ = strip(tmp_path / "m")
    reader = tf.train.load_checkpoint(str(target / "variables" / "variables"))
    found = [reader.get_tensor(f"variables/{number}/.ATTRIBUTES/VARIABLE_VALUE") for number in range(4)]
    expected = [np.where(inner.layers[0].pruning_vars[0][1] == 0, 0, inner.layers[0].layer.kernel)]
    expected += [inner.layers[0].layer.bias, inner.layers[1].kernel, inner.layers[1].bias]
    assert bits(found) == bits(expected)


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tfmot()
    path = tmp_path_factory.mktemp("pruned") / "m"
    pruned(plain_network()).save(path, save_format="tf")
    return path


def test_wrappers_do_not_go_alone(pruned_folder: Path) -> None:
    with pytest.raises(UsageError, match="also removes optimizer, training") as caught:
        strip(pruned_folder, StripPart.MASKS)
    assert caught.value.hint == "write --only masks,wrappers,optimizer,training"


def test_the_optimizer_may_go_alone(pruned_folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(pruned_folder, tmp_path / "m"))
    target, found = strip(path, StripPart.OPTIMIZER, StripPart.TRAINING)
    assert {thing.part for thing in found.removed} == {StripPart.OPTIMIZER, StripPart.TRAINING}
    assert open_model(target).about.wrappers == open_model(path).about.wrappers
    assert served(target, X) == served(path, X)


def test_a_lambda_layer_is_named_and_nothing_is_rebuilt(tmp_path: Path) -> None:
    k = tf_keras()
    model = k.Sequential([k.Input((5,)), k.layers.Lambda(lambda x: x, name="same"), wrapped(k.layers.Dense(2))])
    save(model, tmp_path / "m")
    with pytest.raises(UntrustedError, match="could run code: Lambda layer same") as caught:
        strip(tmp_path / "m")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "stripped_m").exists()


def test_a_class_that_keras_does_not_know_is_named(tmp_path: Path) -> None:
    k = tf_keras()

    class Homemade(k.layers.Layer):  # type: ignore[misc, name-defined]
        def call(self, x: Any) -> Any:
            return x

    model = k.Sequential([k.Input((5,)), Homemade(), wrapped(k.layers.Dense(2))])
    save(model, tmp_path / "m")
    with pytest.raises(UntrustedError, match="custom class Homemade"):
        strip(tmp_path / "m")


@pytest.mark.usefixtures("_forked_rebuilding")
def test_a_pruned_layer_inside_another_wrapper_is_refused(tmp_path: Path) -> None:
    k = tf_keras()
    model = k.Sequential([k.Input((3, 5)), k.layers.TimeDistributed(wrapped(k.layers.Dense(2, name="deep")))])
    save(model, tmp_path / "m")
    with pytest.raises(InputError, match="prune_low_magnitude_deep is inside another wrapper") as caught:
        strip(tmp_path / "m")
    assert "--only optimizer,training" in caught.value.hint


def test_files_that_the_graph_reads_would_be_lost(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("one")
    model = pruned(plain_network())
    model.words = tf.saved_model.Asset(str(tmp_path / "words.txt"))
    save(model, tmp_path / "m")
    with pytest.raises(InputError, match="would lose the files that its graph reads"):
        strip(tmp_path / "m")


def test_another_signature_would_be_lost(tmp_path: Path) -> None:
    model = pruned(plain_network())
    serve = tf.function(lambda x: {"y": model(x)}).get_concrete_function(tf.TensorSpec((None, 5), tf.float32))
    save(model, tmp_path / "m", signatures={"serving_default": serve, "other": serve})
    with pytest.raises(InputError, match="would lose its signatures other"):
        strip(tmp_path / "m")


@pytest.mark.usefixtures("_forked_rebuilding")
def test_a_signature_of_the_users_own_is_refused(tmp_path: Path) -> None:
    model = pruned(plain_network())
    serve = tf.function(lambda x: {"y": model(x)}).get_concrete_function(tf.TensorSpec((None, 5), tf.float32))
    save(model, tmp_path / "m", signatures={"serving_default": serve})
    with pytest.raises(InputError, match="its serving_default was not written by Keras"):
        strip(tmp_path / "m")


def test_a_missing_framework_is_named_with_its_package(pruned_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_model_optimization", None)
    with pytest.raises(MissingExtraError) as caught:
        strip(pruned_folder)
    assert (caught.value.exit_code, "pip install tensorflow-model-optimization" in caught.value.hint) == (4, True)


def test_keras_that_gives_up_is_told(pruned_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout=b"")
    monkeypatch.setattr("prunectl.formats.tensorflow.strip.subprocess.run", lambda *_, **__: done)
    with pytest.raises(WorkError, match="the Keras process ended without an answer"):
        strip(pruned_folder)


@pytest.mark.usefixtures("_forked_rebuilding")
def test_a_rebuilt_model_with_another_number_is_not_handed_out(
    pruned_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(pruned_folder, tmp_path / "m"))
    target, _ = strip(path)
    bundle = read_bundle(target / "variables" / "variables.index")
    extent = bundle.extent(max(bundle.numbers(), key=lambda entry: entry.nbytes))
    data = bytearray(extent.path.read_bytes())
    data[extent.offset + 3] ^= 1
    extent.path.write_bytes(data)
    with pytest.raises(WorkError, match="has different values in the output"):
        verify(open_model(path), target)
