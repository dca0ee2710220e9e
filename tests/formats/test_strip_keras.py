"""Stripping Keras files: what is left equals what tfmot and Keras themselves make of the model."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import prunectl
from prunectl.errors import InputError, PrunectlError, attempt
from prunectl.formats.base import RemovedItem, Role, StripOptions, StripPart
from prunectl.formats.registry import by_name, load, open_model
from tests.contract import Array, raw, read_all
from tests.networks import keras, small_keras, tf_keras
from tests.running import FIXTURES

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]


def strip(path: Path, *parts: StripPart, to_half: bool = False) -> tuple[Path, tuple[RemovedItem, ...]]:
    """Strip some parts, or all of them, into another file of the same kind."""
    model = open_model(path)
    target = path.with_name(f"stripped_{path.name}")
    wish = StripOptions(frozenset(parts or StripPart), to_half=to_half)
    removed: tuple[RemovedItem, ...] = load(by_name(model.format).stripper)(model, wish, {path: target})
    return target, removed


def groups(path: Path) -> set[str]:
    """The paths of all that an HDF5 file holds, alone or in an archive."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            path = Path(archive.extract("model.weights.h5", path.with_suffix(".extracted")))
    found: list[str] = []
    with h5py.File(path) as file:
        file.visit(found.append)
    return set(found)


def bits(weights: list[Any]) -> list[bytes]:
    return [raw(np.asarray(weight)) for weight in weights]


# --- Wrappers of tfmot ---


def tfmot() -> Any:
    return pytest.importorskip("tensorflow_model_optimization").sparsity.keras


def wrapped(layer: Any) -> Any:
    return tfmot().prune_low_magnitude(layer, pruning_schedule=tfmot().PolynomialDecay(0.3, 0.8, 0, 4, frequency=1))


def sequential() -> Any:
    k, constant = tf_keras(), tfmot().ConstantSparsity(0.5, 0)
    model = k.Sequential(
        [
            k.layers.Embedding(9, 6, input_length=7, name="embedded"),
            k.layers.Conv1D(4, 2, name="convolved"),
            k.layers.BatchNormalization(name="normed"),
            k.layers.Flatten(),
            k.layers.Dense(2, name="head"),
        ]
    )
    return tfmot().prune_low_magnitude(model, pruning_schedule=constant)


def branched() -> Any:
    """Two branches through one shared layer, beside plain layers of the same class, and a model in the model."""
    k = tf_keras()
    inputs, shared = k.Input((6, 6, 3)), wrapped(k.layers.Dense(4, name="shared"))
    x = wrapped(k.layers.SeparableConv2D(4, 3, name="separable"))(inputs)
    x = k.layers.Conv2D(4, 1, name="plain_conv")(x)
    x = wrapped(k.layers.Conv2D(4, 3, name="conv"))(x)
    x = k.layers.Add()([shared(x), shared(k.layers.Dense(4, name="plain_dense")(x))])
    inner_inputs = k.Input((2, 2, 4))
    deep = wrapped(k.layers.Conv2DTranspose(4, 2, name="deep"))(inner_inputs)
    inner = k.Model(inner_inputs, k.layers.Dense(4, name="deep_plain")(deep), name="inner")
    flat = k.layers.Flatten()(inner(x))
    return k.Model(inputs, [wrapped(k.layers.Dense(2, name="head"))(flat), flat])


def clones() -> Any:
    """All layers of a model wrapped at once, after they were built."""
    k = tf_keras()
    inner = k.Sequential([k.layers.Input((5,)), k.layers.Dense(5, name="same")], name="inner")
    model = k.Sequential([k.layers.Input((4,)), k.layers.Dense(5, name="first"), inner, k.layers.Dense(5, name="last")])
    return tfmot().prune_low_magnitude(model)


def recurrent() -> Any:
    k = tf_keras()
    cells = [k.layers.SimpleRNNCell(4), k.layers.GRUCell(4)]
    # With gates of another kind, Keras does not trace what a GPU would do, which takes seconds.
    gates = {"recurrent_activation": "hard_sigmoid", "return_sequences": True}
    return k.Sequential(
        [
            k.layers.Input((3, 4)),
            wrapped(k.layers.LSTM(4, name="lstm", **gates)),
            wrapped(k.layers.GRU(4, name="gru", **gates)),
            wrapped(k.layers.RNN(cells, name="stacked")),
            wrapped(k.layers.Dense(2, name="head")),
        ]
    )


def attending() -> Any:
    k = tf_keras()
    inputs = k.Input((3, 4))
    attention = k.layers.MultiHeadAttention(2, 2, name="attention")
    attention(inputs, inputs)  # only then does it have kernels, which the wrapper asks for
    x = wrapped(attention)(inputs, value=inputs)
    return k.Model(inputs, wrapped(k.layers.Dense(2, name="head"))(x))


def timed(around: Callable[[Any], Any] = wrapped) -> Any:
    """A pruned layer inside another wrapper, beside an attention that is called with keywords."""
    k = tf_keras()
    inputs = k.Input((3, 4), name="inputs")
    x = k.layers.TimeDistributed(around(k.layers.Dense(4, name="inside")), name="timed")(inputs)
    query = around(k.layers.Dense(4, name="query"))(x)
    y = k.layers.MultiHeadAttention(2, 2, name="attention")(query, value=query, key=x)
    return k.Model(inputs, k.layers.TimeDistributed(k.layers.Dense(2, name="last"), name="head")(y))


def pruned(make: Callable[[], Any]) -> Any:
    """A compiled model with random masks, which have not been applied to the weights yet."""
    model, random = make(), np.random.default_rng(0)
    model.compile("adam", "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        variable.assign(np.full(variable.shape, 3))
    for weight in model.weights:
        if weight.dtype.is_floating:
            weight.assign(random.standard_normal(weight.shape))
    for _, mask, _ in masks_of(model):
        mask.assign(random.random(mask.shape) < 0.5)
    return model


@dataclass(frozen=True)
class PrunedFiles:
    """A pruned model in files, which a test copies, and as tfmot strips it."""

    folder: Path
    optimizer: list[bytes]
    expected: Any

    def copied(self, name: str, folder: Path) -> Path:
        return Path(shutil.copy(self.folder / name, folder))


Shelf = Callable[[Callable[[], Any]], PrunedFiles]


@pytest.fixture(scope="module")
def pruned_files(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Each model is built once, and saved in all ways."""

    @cache
    def files(make: Callable[[], Any]) -> PrunedFiles:
        folder, model = tmp_path_factory.mktemp("pruned"), pruned(make)
        model.save(folder / "m.keras")
        # A pruned layer with several masks cannot be saved as HDF5: they have one name.
        if make not in {recurrent, attending}:
            model.save(folder / "m.h5")
            model.save_weights(folder / "w.h5")
        return PrunedFiles(folder, bits(model.optimizer.variables), reference(model))

    return files


def masks_of(model: Any) -> list[Any]:
    wrappers = [layer for layer in model.submodules if type(layer).__name__ == "PruneLowMagnitude"]
    return [entry for wrapper in wrappers for entry in wrapper.pruning_vars]


def reference(model: Any) -> Any:
    """The model as tfmot strips it, its weights times the masks."""
    for weight, mask, _ in masks_of(model):
        weight.assign(np.where(mask.numpy() == 0, 0, weight.numpy()))
    return tfmot().strip_pruning(model)


def example(model: Any) -> Array:
    return np.random.default_rng(1).integers(0, 9, (2, *model.input_shape[1:])).astype(np.float32)


def outputs(model: Any) -> list[Array]:
    found = model(example(model))
    return [np.asarray(output) for output in (found if isinstance(found, list) else [found])]


CASES = [
    *((make, suffix) for make in (sequential, branched, clones) for suffix in (".h5", ".keras")),
    *((make, ".keras") for make in (recurrent, attending)),
]


@pytest.mark.parametrize(("make", "suffix"), CASES)
def test_a_pruned_model_is_what_tfmot_strips_it_to(
    make: Callable[[], Any],
    suffix: str,
    pruned_files: Shelf,
    tmp_path: Path,
) -> None:
    path = pruned_files(make).copied(f"m{suffix}", tmp_path)
    target, removed = strip(path)
    found, expected = tf_keras().models.load_model(target), pruned_files(make).expected
    assert bits(found.get_weights()) == bits(expected.get_weights())
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    assert json.loads(found.to_json()) == json.loads(expected.to_json())
    assert found.optimizer is None
    for one, other in zip(outputs(found), outputs(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert {thing.part for thing in removed} == {
        StripPart.MASKS,
        StripPart.WRAPPERS,
        StripPart.OPTIMIZER,
        StripPart.TRAINING,
    }
    assert target.stat().st_size < path.stat().st_size - sum(
        thing.bytes for thing in removed if thing.part is StripPart.MASKS
    )
    assert not open_model(target).about.wrappers
    assert not any("prune_low_magnitude" in path for path in groups(target))


@pytest.mark.parametrize("make", [branched, recurrent])
def test_a_weight_that_a_wrapper_holds_twice_counts_and_is_pruned_once(
    make: Callable[[], Any], pruned_files: Shelf, tmp_path: Path
) -> None:
    path, target = pruned_files(make).copied("m.keras", tmp_path), tmp_path / "sparse.keras"
    prunable = sum(row.params for row in prunectl.inspect(path).layers if row.is_prunable)
    prunectl.prune(path, target, sparsity=0.5)
    with tfmot().prune_scope():
        model = tf_keras().models.load_model(target, compile=False)
    masks = masks_of(model)
    weights = {id(weight): weight for weight in model.trainable_weights}.values()
    kernels = [weight.numpy() for weight in weights if len(weight.shape) > 1 and "bias" not in weight.name]
    assert prunable == sum(kernel.size for kernel in kernels)
    assert sum(int(np.count_nonzero(kernel == 0)) for kernel in kernels) == round(0.5 * prunable)
    assert sorted(tensor.shape for tensor in open_model(path).tensors if tensor.role is Role.MASK) == sorted(
        tuple(mask.shape) for _, mask, _ in masks
    )


def test_wrappers_are_known_in_a_file_of_weights_alone(tmp_path: Path) -> None:
    k, path = tf_keras(), tmp_path / "m.weights.h5"
    layers = [k.layers.Input((6, 6, 3)), wrapped(k.layers.SeparableConv2D(4, 3)), wrapped(k.layers.Flatten())]
    k.Sequential(layers).save_weights(path)
    roles = {tensor.name: tensor.role for tensor in open_model(path).tensors}
    assert roles == {
        "prune_low_magnitude/kernel": Role.KERNEL,
        "prune_low_magnitude/weight_1": Role.KERNEL,
        "prune_low_magnitude/weight_2": Role.OTHER,
        "prune_low_magnitude/weight": Role.SCHEDULE,
        "prune_low_magnitude/mask": Role.MASK,
        "prune_low_magnitude/threshold": Role.SCHEDULE,
        "prune_low_magnitude/pruning_step": Role.SCHEDULE,
        "prune_low_magnitude_1/pruning_step": Role.SCHEDULE,
    }
    assert open_model(path).duplicates == {"prune_low_magnitude/weight": "prune_low_magnitude/weight_1"}


def test_a_weight_that_quantization_aware_training_lists_twice_is_pruned_once(tmp_path: Path) -> None:
    k, toolkit = tf_keras(), pytest.importorskip("tensorflow_model_optimization").quantization.keras
    model = toolkit.quantize_model(k.Sequential([k.layers.Dense(8, use_bias=False, input_shape=(6,))]))
    model.save_weights(tmp_path / "m.weights.h5")
    prunectl.prune(tmp_path / "m.weights.h5", tmp_path / "sparse.weights.h5", sparsity=0.5)
    model.load_weights(tmp_path / "sparse.weights.h5")
    assert [np.count_nonzero(weight.numpy() == 0) for weight in model.trainable_weights] == [24]


def test_layers_in_quantization_aware_training_have_the_class_inside_their_wrapper(tmp_path: Path) -> None:
    k, toolkit = tf_keras(), pytest.importorskip("tensorflow_model_optimization").quantization.keras
    layers = [k.layers.DepthwiseConv2D(3, input_shape=(4, 4, 4)), k.layers.Flatten(), k.layers.Dense(8)]
    toolkit.quantize_model(k.Sequential(layers)).save(tmp_path / "m.keras")
    kernels = [tensor for tensor in open_model(tmp_path / "m.keras").tensors if tensor.is_prunable]
    assert [(tensor.kind, tensor.out_axis, tensor.reduction_axis) for tensor in kernels] == [
        ("DepthwiseConv2D", 2, 3),
        ("Dense", 1, 0),
    ]


@pytest.mark.parametrize(("suffix", "selector"), [(".h5", "*kernel*"), (".weights.h5", "")])
def test_a_weight_that_tfmot_takes_from_a_cluster_is_not_pruned(suffix: str, selector: str, tmp_path: Path) -> None:
    k, toolkit = tf_keras(), pytest.importorskip("tensorflow_model_optimization").clustering.keras
    settings = {"number_of_clusters": 4, "cluster_centroids_init": toolkit.CentroidInitialization.LINEAR}
    model = toolkit.cluster_weights(k.Sequential([k.layers.Dense(8, input_shape=(6,))]), **settings)
    (model.save_weights if "weights" in suffix else model.save)(tmp_path / f"m{suffix}")
    with pytest.raises(PrunectlError, match="clustered by tfmot: prune before clustering") as caught:
        prunectl.prune(tmp_path / f"m{suffix}", tmp_path / "o.h5", sparsity=0.5, layers=selector)
    assert "cluster the result" in caught.value.hint


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_pruned_layer_comes_out_of_other_wrappers_too(suffix: str, tmp_path: Path) -> None:
    # tfmot leaves such a layer wrapped: the reference is the model as it was before it was pruned.
    model, plain = pruned(timed), timed(lambda layer: layer)
    model.save(tmp_path / f"m{suffix}")
    for weight, mask, _ in masks_of(model):
        weight.assign(np.where(mask.numpy() == 0, 0, weight.numpy()))
    plain.set_weights(weights_of(model))
    found = tf_keras().models.load_model(strip(tmp_path / f"m{suffix}")[0])
    assert bits(found.get_weights()) == bits(plain.get_weights())
    assert found.get_config()["layers"] == plain.get_config()["layers"]
    for one, other in zip(outputs(found), outputs(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_registered_class_is_found_under_its_whole_name(tmp_path: Path) -> None:
    k, path = tf_keras(), tmp_path / "m.h5"

    @k.utils.register_keras_serializable("mine")
    class Own(k.layers.Dense, tfmot().PrunableLayer):  # type: ignore[misc]
        def get_prunable_weights(self) -> list[Any]:
            return [self.kernel]

    model = k.Sequential([k.layers.Input((8,)), wrapped(Own(4))])
    model.save(path)
    plain = k.models.load_model(strip(path)[0])
    assert type(plain.layers[-1]) is Own
    np.testing.assert_array_equal(plain.predict(np.ones((1, 8)), verbose=0), model.predict(np.ones((1, 8)), verbose=0))


def weights_of(model: Any) -> list[Any]:
    """The weights that a model would have without wrappers."""
    own = ("mask", "threshold", "pruning_step")
    return [weight.numpy() for weight in model.weights if not weight.name.removesuffix(":0").endswith(own)]


def test_a_model_saved_in_the_middle_of_training_is_what_tfmot_strips_it_to(tmp_path: Path) -> None:
    layers = tf_keras().layers
    model = tf_keras().Sequential([layers.Input((4,)), wrapped(layers.Dense(6)), wrapped(layers.Dense(5))])
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(np.ones((4, 4)), np.ones((4, 5)), epochs=2, verbose=0, callbacks=[tfmot().UpdatePruningStep()])
    model.save(tmp_path / "m.h5")
    target, _ = strip(tmp_path / "m.h5")
    assert any(np.any(mask.numpy() == 0) for _, mask, _ in masks_of(model))
    assert bits(tf_keras().models.load_model(target).get_weights()) == bits(reference(model).get_weights())


@pytest.mark.parametrize("make", [sequential, branched, clones])
def test_pruned_weights_alone_load_into_the_plain_model(
    make: Callable[[], Any], pruned_files: Shelf, tmp_path: Path
) -> None:
    target, _ = strip(pruned_files(make).copied("w.h5", tmp_path))
    plain = tf_keras().models.clone_model(expected := pruned_files(make).expected)
    plain.load_weights(target)
    assert bits(plain.get_weights()) == bits(expected.get_weights())
    plain.set_weights([np.zeros_like(weight) for weight in plain.get_weights()])
    plain.load_weights(target, by_name=True)
    assert bits(plain.get_weights()) == bits(expected.get_weights())


@pytest.mark.parametrize(("parts", "suffix"), [((StripPart.MASKS,), ".h5"), ((StripPart.WRAPPERS,), ".keras")])
def test_masks_and_wrappers_go_together_and_the_optimizer_can_stay(
    parts: tuple[StripPart, ...],
    suffix: str,
    pruned_files: Shelf,
    tmp_path: Path,
) -> None:
    files = pruned_files(branched)
    target, removed = strip(files.copied(f"m{suffix}", tmp_path), *parts)
    found = tf_keras().models.load_model(target)
    assert bits(found.get_weights()) == bits(files.expected.get_weights())
    assert found.loss.__name__ == "mean_squared_error" if suffix == ".h5" else found.loss == "mse"
    assert bits(found.optimizer.variables) == files.optimizer
    assert {thing.part for thing in removed} == {StripPart.MASKS, StripPart.WRAPPERS}


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_masked_weight_is_a_plain_zero_whatever_it_was(suffix: str, tmp_path: Path) -> None:
    model = pruned(clones)
    for weight, _, _ in masks_of(model):
        values = np.resize([-1.0, np.nan, -np.inf, np.inf], weight.shape)
        weight.assign(values)
    model.save(tmp_path / f"m{suffix}")
    found = tf_keras().models.load_model(strip(tmp_path / f"m{suffix}")[0])
    assert bits(found.get_weights()) == bits(reference(model).get_weights())


def test_the_fixture_with_wrappers_holds_its_plain_layers_afterwards(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "wrapped_by_tfmot.h5", tmp_path))
    target, removed = strip(path)
    with tfmot().prune_scope():
        model = tf_keras().models.load_model(path, compile=False)
    found = tf_keras().models.load_model(target)
    assert bits(found.get_weights()) == bits(reference(model).get_weights())
    lost = {tensor.name: tensor.storage.stored_bytes for tensor in open_model(path).tensors}
    assert all(thing.bytes == lost[thing.name] for thing in removed if thing.part is StripPart.MASKS)


def test_a_mask_that_fits_no_weight_is_refused(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "wrapped_by_tfmot.h5", tmp_path))
    mask = "model_weights/prune_low_magnitude_fc1/prune_low_magnitude_fc1/mask:0"
    with h5py.File(path, "a") as file:
        del file[mask]
        file[mask] = np.ones((3, 5), np.float32)
    with pytest.raises(
        InputError, match=r"m.*mask:0 has the shape \[3, 5\], but no weight of its layer has this shape"
    ) as caught:
        strip(path)
    assert caught.value.message.startswith(f"the masks of {path} cannot be applied: ")


def test_a_mask_that_is_named_but_missing_is_told_and_the_rest_can_go(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "wrapped_by_tfmot.h5", tmp_path))
    with h5py.File(path, "a") as file:
        del file["model_weights/prune_low_magnitude_fc1/prune_low_magnitude_fc1/mask:0"]
        file.attrs["training_config"] = "{}"
    with pytest.raises(InputError, match="incomplete: it names prune_low_magnitude_fc1/mask:0"):
        strip(path)
    _, removed = strip(path, StripPart.OPTIMIZER, StripPart.TRAINING)
    assert [thing.name for thing in removed] == ["training_config"]


def test_numbered_weights_without_the_classes_of_their_layers_are_refused(tmp_path: Path) -> None:
    clones().save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(InputError, match="does not describe its wrapped layers"):
        strip(tmp_path / "m.weights.h5")


def test_a_name_that_is_taken_is_not_given_back(tmp_path: Path) -> None:
    k = tf_keras()
    layers = [wrapped(k.layers.Dense(2, name="twice")), k.layers.Dense(2, name="twice")]
    k.Sequential([k.layers.Input((2,)), *layers]).save(tmp_path / "m.h5")
    with pytest.raises(InputError, match="two layers named twice"):
        strip(tmp_path / "m.h5")


# --- Optimizers and training ---


LIBRARIES = [(keras, ".h5"), (keras, ".keras"), (tf_keras, ".h5"), (tf_keras, ".keras")]
in_each_library = pytest.mark.parametrize(("library", "suffix"), LIBRARIES)


def network(k: Any) -> Any:
    inner = k.Sequential([k.layers.Input((5,), name="inner_inputs"), k.layers.Dense(300, name="deep")], name="inner")
    norm = k.layers.BatchNormalization(name="norm")
    return k.Sequential(
        [k.layers.Input((5,), name="inputs"), inner, norm, k.layers.Dense(3, name="head")], name="outer"
    )


@cache
def trained(k: Any, _suffix: str) -> Any:
    """A model with an optimizer that has state; a model inside it was compiled by itself.

    One for each suffix: once Keras 3 has saved a model as HDF5, its archive no longer says the learning rate.
    """
    model = network(k)
    model.get_layer("inner").compile("sgd", "mse")
    model.compile(k.optimizers.Adam(0.01), k.losses.MeanSquaredError(), metrics=[k.metrics.RootMeanSquaredError()])
    model.run_eagerly = True  # for four examples no step is worth its graph
    model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0)
    return model


def optimizer_of(model: Any) -> Any:
    """The optimizer of a model; Keras 3 does not even have the attribute where there is none."""
    return getattr(model, "optimizer", None)


def never_compiled(k: Any, model: Any, path: Path) -> Path:
    """Save the model as if it had never been compiled."""
    plain = network(k)
    plain.set_weights(model.get_weights())
    plain.save(path)
    return path


@in_each_library
def test_a_trained_model_comes_out_as_if_it_had_never_been_compiled(
    library: Callable[[], Any], suffix: str, tmp_path: Path
) -> None:
    k = library()
    model, path = trained(k, suffix), tmp_path / f"m{suffix}"
    model.save(path)
    expected = never_compiled(k, model, tmp_path / f"plain{suffix}")
    target, removed = strip(path)
    found = k.models.load_model(target)
    assert bits(found.get_weights()) == bits(model.get_weights())
    assert found.get_config() == k.models.load_model(expected).get_config()
    assert optimizer_of(found) is None
    assert groups(target) == groups(expected)
    assert {name: raw(one) for name, one in read_all(target).items()} == {
        name: raw(one) for name, one in read_all(expected).items()
    }
    state = [tensor for tensor in open_model(path).tensors if tensor.role == "optimizer"]
    gone = {thing.name: thing.bytes for thing in removed}
    assert state
    assert all(gone[tensor.name] == tensor.storage.stored_bytes for tensor in state)


@in_each_library
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
def test_without_the_state_of_its_optimizer_a_model_is_still_compiled(
    library: Callable[[], Any], suffix: str, tmp_path: Path
) -> None:
    k = library()
    model, path = trained(k, suffix), tmp_path / f"m{suffix}"
    model.save(path)
    target, removed = strip(path, StripPart.OPTIMIZER)
    found = k.models.load_model(target)
    assert {thing.part for thing in removed} == {StripPart.OPTIMIZER}
    assert "MeanSquaredError" in str(found.loss) or "mean_squared_error" in str(found.loss)
    assert float(found.optimizer.learning_rate) == pytest.approx(0.01)
    assert int(found.optimizer.iterations) == 0
    found.run_eagerly = True
    found.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0)


@in_each_library
def test_without_its_training_configuration_a_model_loads(
    library: Callable[[], Any], suffix: str, tmp_path: Path
) -> None:
    k = library()
    model, path = trained(k, suffix), tmp_path / f"m{suffix}"
    model.save(path)
    target, removed = strip(path, StripPart.TRAINING)
    assert {thing.part for thing in removed} == {StripPart.TRAINING}
    assert optimizer_of(k.models.load_model(target)) is None
    assert any(tensor.role == "optimizer" for tensor in open_model(target).tensors)


@in_each_library
def test_what_has_nothing_to_strip_is_copied(library: Callable[[], Any], suffix: str, tmp_path: Path) -> None:
    small_keras(library(), {}).save(tmp_path / f"m{suffix}")
    target, removed = strip(tmp_path / f"m{suffix}")
    assert removed == ()
    assert target.read_bytes() == (tmp_path / f"m{suffix}").read_bytes()


@in_each_library
def test_the_same_file_is_stripped_to_the_same_bytes(library: Callable[[], Any], suffix: str, tmp_path: Path) -> None:
    trained(library(), suffix).save(tmp_path / f"m{suffix}")
    first = strip(tmp_path / f"m{suffix}")[0].read_bytes()
    time.sleep(1.01)  # HDF5 and zip write times in seconds
    assert strip(tmp_path / f"m{suffix}")[0].read_bytes() == first


def test_a_deflated_archive_stays_deflated_and_keeps_its_other_entries(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    trained(keras(), ".keras").save(tmp_path / "stored.keras")
    with zipfile.ZipFile(tmp_path / "stored.keras") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("assets/words.txt", "one two")
        new.comment = b"hello"
    target, _ = strip(path)
    assert open_model(target).about.is_compressed
    assert optimizer_of(keras().models.load_model(target)) is None
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        assert archive.comment == b"hello"
        assert archive.read("assets/words.txt") == b"one two"
        assert "compile_config" not in json.loads(archive.read("config.json"))


# --- Halves ---


@in_each_library
def test_halved_weights_load_as_what_they_are_rounded_to(
    library: Callable[[], Any], suffix: str, tmp_path: Path
) -> None:
    k = library()
    model, path = trained(k, suffix), tmp_path / f"m{suffix}"
    model.save(path)
    target, _ = strip(path, to_half=True)
    found = k.models.load_model(target)
    assert bits(found.get_weights()) == bits([w.astype(np.float16).astype(np.float32) for w in model.get_weights()])
    assert {tensor.dtype.name for tensor in open_model(target).tensors} == {"float16"}
    assert target.stat().st_size < strip(path)[0].stat().st_size


def test_masks_are_applied_before_weights_are_halved(tmp_path: Path) -> None:
    model = pruned(clones)
    model.save(tmp_path / "m.h5")
    found = tf_keras().models.load_model(strip(tmp_path / "m.h5", to_half=True)[0])
    halves = [weight.astype(np.float16).astype(np.float32) for weight in reference(model).get_weights()]
    assert bits(found.get_weights()) == bits(halves)


@in_each_library
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
def test_the_optimizer_is_not_halved(library: Callable[[], Any], suffix: str, tmp_path: Path) -> None:
    model = trained(library(), suffix)
    model.save(tmp_path / f"m{suffix}")
    target, _ = strip(tmp_path / f"m{suffix}", StripPart.GRADIENTS, to_half=True)
    found = library().models.load_model(target)
    assert bits(found.optimizer.variables) == bits(
        library().models.load_model(tmp_path / f"m{suffix}").optimizer.variables
    )


@in_each_library
def test_a_number_that_no_half_can_be_is_refused(library: Callable[[], Any], suffix: str, tmp_path: Path) -> None:
    model = small_keras(library(), {})
    model.get_layer("second").set_weights([np.full((6, 3), -70000.0), np.full(3, np.inf)])
    model.save(tmp_path / f"m{suffix}")
    with pytest.raises(InputError, match=r"holds 70000 in \S+, but the largest 16-bit float is 65504") as caught:
        strip(tmp_path / f"m{suffix}", to_half=True)
    assert caught.value.message.startswith(str(tmp_path))


# --- HDF5 beyond what is stripped ---


def test_what_is_not_stripped_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    trained(tf_keras(), ".h5").save(path)
    with h5py.File(path, "a") as file:
        file.attrs["note"] = "ü 中"
        file.create_group("mine").attrs["texts"] = ["one", "three"]
        file.create_dataset("mine/chunked", data=np.eye(40), chunks=(7, 9), compression="gzip", shuffle=True)
        file["mine/tied"] = file["model_weights/head/head/kernel:0"]
        file["mine/soft"] = h5py.SoftLink("/mine/chunked")
    with h5py.File(strip(path)[0]) as new:
        assert new.attrs["note"] == "ü 中"
        assert list(new["mine"].attrs["texts"]) == ["one", "three"]
        assert (new["mine/chunked"].chunks, new["mine/chunked"].compression) == ((7, 9), "gzip")
        assert new["mine/tied"] == new["model_weights/head/head/kernel:0"]
        np.testing.assert_array_equal(new["mine/soft"][()], np.eye(40))


def test_lists_of_names_that_are_split_are_stripped_in_each_part(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "wrapped_by_tfmot.h5", tmp_path))
    with h5py.File(path, "a") as file:
        for group, key in (
            (file["model_weights"], "layer_names"),
            (file["model_weights/prune_low_magnitude_fc1"], "weight_names"),
        ):
            names = group.attrs[key]
            del group.attrs[key]
            group.attrs[f"{key}0"], group.attrs[f"{key}1"] = names[:2], names[2:]
    with tfmot().prune_scope():
        model = tf_keras().models.load_model(path, compile=False)
    found = tf_keras().models.load_model(strip(path)[0])
    assert bits(found.get_weights()) == bits(reference(model).get_weights())


def test_a_scalar_and_an_empty_weight_are_halved_too(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"one"]
        group = file.create_group("one")
        group.attrs["weight_names"] = [b"scalar", b"empty", b"big_endian", b"count"]
        group["scalar"] = np.float32(1.5)
        group["empty"] = np.zeros((0, 3))
        group["big_endian"] = np.arange(3, dtype=">f4")
        group["count"] = np.arange(3)
    found = read_all(strip(path, to_half=True)[0])
    assert {name: (array.dtype.name, array.tolist()) for name, array in found.items()} == {
        "scalar": ("float16", 1.5),
        "empty": ("float16", []),
        "big_endian": ("float16", [0, 1, 2]),
        "count": ("int64", [0, 1, 2]),
    }


@pytest.mark.parametrize("depth", [40, 200, 600, 900])
def test_a_configuration_that_is_nested_without_end_is_refused_or_stripped(depth: int, tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "wrapped_by_tfmot.h5", tmp_path))
    deep = '{"class_name": "TimeDistributed", "config": {"layer": ' * depth + "{}" + "}}" * depth
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["model_config"])
        file.attrs["model_config"] = json.dumps(config).replace('"layers": [', f'"layers": [{deep},', 1)
    outcome = attempt(strip, path)
    if isinstance(outcome, PrunectlError):
        assert outcome.message.startswith(str(path))
    else:
        assert not open_model(outcome[0]).about.wrappers


def test_an_archive_without_a_layer_that_it_names_is_stripped_of_the_rest(tmp_path: Path) -> None:
    pruned(clones).save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    weights = tmp_path / "w.h5"
    weights.write_bytes(contents["model.weights.h5"])
    with h5py.File(weights, "a") as file:
        del file["layers/prune_low_magnitude/layer"]
        del file["layers/prune_low_magnitude_1/vars"]
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for name, data in {**contents, "model.weights.h5": weights.read_bytes()}.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match=r"the masks of .*m\.keras cannot be applied: its mask .* has the shape"):
        strip(tmp_path / "m.keras")
