"""A run that is interrupted and taken up again ends where an unbroken one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError
from prunectl.training.backend import GradientStatistic, TrainOptions
from prunectl.training.keras.model import KerasTrainable
from tests.contract import raw
from tests.training.keras import customs, nets
from tests.training.keras.nets import both, keras

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def state(network: KerasTrainable) -> dict[str, bytes]:
    return {name: raw(array) for name, array in network.tensors().items()}


@both
def test_a_restored_run_ends_with_the_same_bits(k: Any, file_of: nets.Files, tmp_path: Path) -> None:
    path = file_of(k, nets.random_parts)
    given = nets.batches(6)
    whole = nets.prepared(path)
    masks = nets.half(nets.kernels(whole))
    whole.mask(masks)
    names = list(masks)
    whole.track_gradients(GradientStatistic.MOVEMENT, names)
    whole.reseed(1)
    nets.train(whole, given[:3])
    whole.save(tmp_path)
    whole.logs()
    whole.reseed(2)
    nets.train(whole, given[3:])

    again = nets.prepared(path, seed=77)
    nets.train(again, nets.batches(2, seed=9))
    again.track_gradients(GradientStatistic.MOVEMENT, names)
    again.restore(tmp_path)
    again.mask(masks)
    again.reseed(2)
    nets.train(again, given[3:])
    assert state(again) == state(whole)
    assert {name: raw(one) for name, one in again.gradient_statistics().items()} == {
        name: raw(one) for name, one in whole.gradient_statistics().items()
    }
    # Of the batches after the checkpoint alone.
    assert again.logs()["loss"] == pytest.approx(whole.logs()["loss"], rel=1e-6)


@both
def test_the_rate_of_a_restored_run_is_that_of_its_next_step(k: Any, file_of: nets.Files, tmp_path: Path) -> None:
    path = file_of(k, nets.dense)
    whole, again = (nets.prepared(path, optimizer="sgd", lr=0.1) for _ in range(2))
    nets.train(whole, nets.batches(2), rate=lambda _: 0.5)
    whole.save(tmp_path)
    again.restore(tmp_path)
    for network in (whole, again):
        nets.train(network, nets.batches(2, seed=1))
    assert state(again) == state(whole)


@pytest.mark.parametrize("is_within_an_epoch", [True, False])
def test_what_all_layers_share_is_random_as_in_an_unbroken_run(is_within_an_epoch: bool, tmp_path: Path) -> None:
    k = keras()
    layers = [k.layers.Input((6,)), k.layers.Dense(8), customs.UNSEEDED(), k.layers.Dropout(0.4)]
    model = k.Sequential([*layers, k.layers.Dense(4, activation="softmax")])
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    path = nets.saved(model, tmp_path / "model.keras")
    given = nets.batches(6)

    def begun() -> KerasTrainable:
        # As it is in another process.
        k.src.backend.common.global_state.set_global_attribute("global_seed_generator", None)
        network = nets.opened(path, custom_objects="tests.training.keras.customs:THREE")
        network.prepare(TrainOptions(example=given[0]))
        return network

    def went_on(network: KerasTrainable) -> dict[str, bytes]:
        if not is_within_an_epoch:
            network.reseed(2)
        nets.train(network, given[3:])
        return state(network)

    whole = begun()
    whole.reseed(1)
    nets.train(whole, given[:3])
    whole.save(tmp_path)
    expected = went_on(whole)
    again = begun()
    again.restore(tmp_path)
    assert went_on(again) == expected


@both
def test_the_same_seed_drops_out_the_same(k: Any, file_of: nets.Files) -> None:
    path = file_of(k, nets.random_parts)
    start, ends = nets.opened(path).tensors(), []
    first, second = (nets.prepared(path, optimizer="sgd", lr=0.1) for _ in range(2))
    for network, seed in ((first, 5), (second, 5), (second, 6)):
        nets.train(network, nets.batches(2))
        network.assign(start)
        network.reseed(seed)
        nets.train(network, nets.batches(3))
        ends.append(state(network))
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]


def noisy(x: Any) -> Any:
    return x


@both
def test_kernels_are_kept_where_all_that_is_random_has_a_generator(k: Any, tmp_path: Path) -> None:
    layers = k().layers
    hidden = {}
    for name, layer in {
        "dropout": layers.Dropout(0.5),
        "lambda": layers.Lambda(noisy),
        "function": layers.Dense(4, activation=noisy),
    }.items():
        path = nets.saved(k().Sequential([layers.Input((6,)), layer, layers.Dense(2)]), tmp_path / f"{name}.keras")
        options = {"is_trusted": True, "custom_objects": f"{__name__}:NOISY"} if name != "dropout" else {}
        hidden[name] = nets.opened(path, **options)._random.has_hidden_state
    assert hidden == {"dropout": False, "lambda": True, "function": True}


NOISY = {"noisy": noisy}


@both
def test_dropout_differs_from_step_to_step(k: Any, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, nets.random_parts), optimizer="sgd", lr=0.0)
    losses = set()
    for _ in range(3):
        nets.train(network, nets.batches(1))
        losses.add(network.logs()["loss"])
    assert len(losses) == 3


@both
def test_the_checkpoint_of_another_optimizer_is_refused(k: Any, file_of: nets.Files, tmp_path: Path) -> None:
    path = file_of(k, nets.dense)
    nets.prepared(path, optimizer="adam").save(tmp_path)
    with pytest.raises(InputError, match="another"):
        nets.prepared(path, optimizer="sgd").restore(tmp_path)


@both
def test_a_damaged_checkpoint_is_refused(k: Any, file_of: nets.Files, tmp_path: Path) -> None:
    network = nets.prepared(file_of(k, nets.dense))
    (tmp_path / "keras.npz").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(InputError, match="damaged"):
        network.restore(tmp_path)


@both
def test_statistics_are_the_averages_over_batches_and_nothing_else_changes(k: Any, file_of: nets.Files) -> None:
    path = file_of(k, nets.random_parts)
    network = nets.prepared(path)
    before = network.tensors()
    given = nets.batches(3)
    given[2] = type(given[2])(given[2].x[:5], given[2].y[:5])  # type: ignore[index]
    assert network.recalibrate(given) == 1
    after = network.tensors()
    kernel, bias = (
        next(array for name, array in before.items() if f"first/{end}" in name) for end in ("kernel", "bias")
    )
    outputs = [np.asarray(batch.x).astype(np.float64) @ kernel + bias for batch in given]
    counts = [len(one) for one in outputs]
    means = np.average([one.mean(0) for one in outputs], axis=0, weights=counts)
    variances = np.average([one.var(0) for one in outputs], axis=0, weights=counts)
    for name, array in after.items():
        if "moving_mean" in name:
            np.testing.assert_allclose(array, means, rtol=1e-4, atol=1e-6)
        elif "moving_variance" in name:
            np.testing.assert_allclose(array, variances, rtol=1e-4, atol=1e-6)
        else:
            assert raw(array) == raw(before[name])


@both
def test_layer_normalisation_has_no_statistics(k: Any, tmp_path: Path) -> None:
    model = k().Sequential([k().layers.Input((6,)), k().layers.Dense(3), k().layers.LayerNormalization()])
    network = nets.opened(nets.saved(model, tmp_path / "model.keras"))
    before = state(network)
    assert network.recalibrate(nets.batches()) == 0
    assert state(network) == before
