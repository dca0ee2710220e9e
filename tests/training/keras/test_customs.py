"""Code that users bring along runs when they say so, and not before; what it trains keeps its zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prunectl.errors import InputError, UntrustedError, UsageError, WorkError
from prunectl.training.backend import GradientStatistic, TrainOptions
from tests.networks import keras, tf_keras
from tests.running import FIXTURES
from tests.training.keras import customs, nets
from tests.training.keras.nets import both

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
HERE = "tests.training.keras.customs"


def objects(k: Any) -> str:
    return f"{HERE}:{'TWO' if k is tf_keras else 'THREE'}"


def scaled(k: Any) -> Any:
    source = k()
    layers = [source.layers.Input((nets.FEATURES,)), customs.SCALE[k](name="scale"), source.layers.Dense(nets.CLASSES)]
    return source.Sequential(layers)


@both
@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_custom_layer_is_built_from_what_the_user_names(name: str, k: Any, tmp_path: Path) -> None:
    path = nets.saved(scaled(k), tmp_path / name)
    network = nets.opened(path, custom_objects=objects(k))
    assert len(network.tensors()) == 3
    with pytest.raises((UntrustedError, InputError)) as caught:
        nets.opened(path)
    assert "--custom-objects" in caught.value.hint


@both
def test_a_custom_layer_of_the_other_keras_is_refused_with_what_to_import(k: Any, tmp_path: Path) -> None:
    path = nets.saved(scaled(k), tmp_path / "model.h5")
    other, package = (keras, "tf_keras") if k is tf_keras else (tf_keras, "keras")
    with pytest.raises(UsageError, match="Scale in --custom-objects") as caught:
        nets.opened(path, custom_objects=objects(other))
    assert caught.value.hint.startswith(f"import layers from {package}")


@both
def test_custom_layers_of_the_other_keras_that_the_file_does_not_name_may_stand_beside(k: Any, tmp_path: Path) -> None:
    path = nets.saved(scaled(k), tmp_path / "model.h5")
    network = nets.opened(path, custom_objects=f"{HERE}:BOTH_FOR_{'TWO' if k is tf_keras else 'THREE'}")
    assert len(network.tensors()) == 3


def test_custom_objects_are_a_dictionary(file_of: nets.Files) -> None:
    path = file_of(keras, nets.dense)
    with pytest.raises(UsageError, match="is not a dictionary"):
        nets.opened(path, custom_objects=f"{HERE}:NO_DICTIONARY")
    with pytest.raises(UsageError, match="names no function"):
        nets.opened(path, custom_objects="customs")


@both
@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_lambda_runs_only_with_trust(name: str, k: Any, tmp_path: Path) -> None:
    source = k()
    double = source.layers.Lambda(lambda x: x * 2.0, output_shape=(nets.FEATURES,))
    layers = [source.layers.Input((nets.FEATURES,)), double, source.layers.Dense(2)]
    path = nets.saved(source.Sequential(layers), tmp_path / name)
    with pytest.raises(UntrustedError, match="Lambda") as caught:
        nets.opened(path)
    assert "--trust" in caught.value.hint
    assert len(nets.opened(path, is_trusted=True).tensors()) == 2


def test_a_lambda_of_a_fixture_is_refused() -> None:
    with pytest.raises(UntrustedError, match="Lambda"):
        nets.opened(FIXTURES / "lambda_layer.keras")


@both
def test_a_training_step_of_the_model_keeps_the_zeros(k: Any, tmp_path: Path) -> None:
    source = k()
    inputs = source.layers.Input((nets.FEATURES,))
    model = customs.OWN_STEP[k](inputs, source.layers.Dense(3, name="only")(inputs))
    network = nets.opened(nets.saved(model, tmp_path / "model.keras"), custom_objects=objects(k))
    network.prepare(TrainOptions(example=nets.batches(1)[0]))
    masks = nets.half(nets.kernels(network))
    network.mask(masks)
    nets.train(network, nets.batches(2))
    assert nets.lost_zeros(network, masks) == 0
    kernel = next(iter(nets.kernels(network).values()))
    np.testing.assert_array_equal(kernel, next(iter(masks.values())).astype(np.float32))
    assert network.logs() == {"loss": 3.0}
    with pytest.raises(UsageError, match="--distill cannot be used with a custom training step"):
        network.step(nets.batches(1)[0], 1.0, np.zeros((nets.EXAMPLES, 3), np.float32))


@both
def test_the_step_of_a_user_trains_and_keeps_the_zeros(k: Any, file_of: nets.Files) -> None:
    path = file_of(k, nets.dense)
    network = nets.prepared(path, custom_step=f"{HERE}:plain_step", optimizer="sgd", lr=0.5)
    masks = nets.half(nets.kernels(network))
    network.mask(masks)
    network.track_gradients(GradientStatistic.GRADIENT, list(masks))
    batch = nets.batches(1)[0]
    losses = []
    for _ in range(30):
        network.step(batch, 1.0)
        losses.append(network.logs()["loss"])
    assert losses[-1] < losses[0] - 0.2
    assert nets.lost_zeros(network, masks) == 0
    assert all(np.any(one) for one in network.gradient_statistics().values())


@both
def test_a_step_that_goes_round_the_optimizer_keeps_the_zeros_but_gives_no_evidence(
    k: Any, file_of: nets.Files
) -> None:
    path = file_of(k, nets.dense)
    network = nets.prepared(path, custom_step=f"{HERE}:stray_step")
    masks = nets.half(nets.kernels(network))
    network.mask(masks)
    network.track_gradients(GradientStatistic.GRADIENT, list(masks))
    nets.train(network, nets.batches(2))
    assert nets.lost_zeros(network, masks) == 0
    assert network.logs() == {"loss": nets.EXAMPLES}
    with pytest.raises(WorkError, match=r"model\.optimizer"):
        network.gradient_statistics()


def test_a_step_that_returns_no_numbers_is_refused(file_of: nets.Files) -> None:
    path = file_of(keras, nets.dense)
    with pytest.raises(UsageError, match="dictionary"):
        nets.train(nets.prepared(path, custom_step=f"{HERE}:wrong_step"), nets.batches(1))


def test_the_numbers_of_an_older_keras_that_were_turned_round_are_refused(tmp_path: Path) -> None:
    k = tf_keras()
    layers = [k.layers.Input((3, 8, 8)), k.layers.Conv2D(3, 3, data_format="channels_first", name="conv")]
    model = k.Sequential(layers)
    path = nets.saved(model, tmp_path / "model.h5")
    with h5py.File(path, "r+") as file:
        for group in (file, file["model_weights"]):
            del group.attrs["keras_version"]
    with pytest.raises(InputError, match="older Keras") as caught:
        nets.opened(path)
    assert "save it again" in caught.value.hint
