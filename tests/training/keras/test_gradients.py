"""Gradients of the mean loss, against those that TensorFlow takes by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import UsageError
from prunectl.training.backend import DifferentiableModel, GradientStatistic
from prunectl.training.data.source import Batch
from tests.contract import Array
from tests.training.keras import nets
from tests.training.keras.nets import both

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def by_hand(model: Any, loss: Callable[[Any], Any], x: Any) -> list[Array]:
    """Gradients of all weights that a model trains, in their order."""
    tf = pytest.importorskip("tensorflow")
    with tf.GradientTape() as tape:
        total = loss(model(x, training=False))
    return [np.asarray(tf.convert_to_tensor(one)) for one in tape.gradient(total, model.trainable_variables)]


def matched(found: dict[str, Array], expected: list[Array]) -> None:
    """Compare, by shapes, which are all different."""
    by_shape = {one.shape: one for one in expected}
    assert len(by_shape) == len(expected)
    for one in found.values():
        np.testing.assert_allclose(one, by_shape[one.shape], rtol=1e-4, atol=1e-6)
    assert len(found) == len(expected)


@both
def test_a_gradient_is_that_of_the_mean_loss(k: Callable[[], Any], file_of: nets.Files) -> None:
    network, (batch,) = nets.prepared(file_of(k, nets.dense)), nets.batches(1)
    model = nets.dense(k())
    graded: DifferentiableModel = network
    found = graded.gradients(list(network.tensors()), batch)
    expected = by_hand(model, lambda out: _mean(_cross(k(), batch.y, out)), batch.x)
    matched(found, expected)
    assert all(one.dtype == np.float32 for one in found.values())


def _cross(k: Any, y: Any, out: Any) -> Any:
    return k.losses.sparse_categorical_crossentropy(y, out)


def _mean(found: Any) -> Any:
    tf = pytest.importorskip("tensorflow")
    return tf.reduce_mean(found)


@both
def test_nothing_is_changed(k: Callable[[], Any], file_of: nets.Files) -> None:
    path = file_of(k, nets.random_parts)
    given = nets.batches(4)
    networks = [nets.prepared(path, optimizer="sgd") for _ in range(2)]
    for one in networks:
        one.reseed(3)
        one.track_gradients(GradientStatistic.GRADIENT, list(nets.kernels(one)))
        nets.train(one, given[:2])
    looking, other = networks
    before, logs = looking.tensors(), looking.gradient_statistics()
    first = looking.gradients(list(before), given[2])
    looking.observe(list(before), given[2].x, lambda _: None)
    again = looking.gradients(list(before), given[2])
    for name, value in looking.tensors().items():
        np.testing.assert_array_equal(value, before[name])
        np.testing.assert_array_equal(first[name], again[name])
    for name, value in looking.gradient_statistics().items():
        np.testing.assert_array_equal(value, logs[name])
    for one in networks:
        nets.train(one, given[2:])
    assert dict(looking.logs()) == dict(other.logs())
    for name, value in looking.tensors().items():
        np.testing.assert_array_equal(value, other.tensors()[name])


@both
def test_losses_count_by_their_weights_and_what_is_not_reached_has_none(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    k().utils.set_random_seed(0)
    x = layers.Input((6,))
    first, second = layers.Dense(3, name="first")(x), layers.Dense(2, name="second", kernel_regularizer="l2")(x)
    model = k().Model(x, [first, second])
    model.compile(optimizer="sgd", loss=["mse", "mae"], loss_weights=[0.25, 0.5])
    path = nets.saved(model, tmp_path / "model.keras")
    random = np.random.default_rng(0)
    batch = Batch(
        random.standard_normal((5, 6)).astype(np.float32),
        tuple(random.standard_normal((5, width)).astype(np.float32) for width in (3, 2)),
    )
    network = nets.prepared(path, batch)
    found = network.gradients(list(network.tensors()), batch)
    assert isinstance(batch.y, tuple)
    y = batch.y
    kernel = model.get_layer("second").kernel

    def loss(out: Any) -> Any:
        tf = pytest.importorskip("tensorflow")
        penalty = 0.01 * tf.reduce_sum(tf.square(tf.convert_to_tensor(kernel)))
        return 0.25 * _mean((out[0] - y[0]) ** 2) + 0.5 * _mean(abs(out[1] - y[1])) + penalty

    matched(found, by_hand(model, loss, batch.x))
    other = nets.prepared(path, batch)
    for one in (network, other):
        one.step(batch, 1.0)
    network.gradients(list(network.tensors()), batch)
    assert dict(network.logs()) == dict(other.logs())


@both
def test_frozen_weights_statistics_and_embeddings_have_gradients_too(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    k().utils.set_random_seed(0)
    x = layers.Input((3,), dtype="int32")
    found = layers.Flatten()(layers.Embedding(7, 5, name="rows")(x))
    model = k().Model(x, layers.Dense(2, name="dense")(layers.BatchNormalization()(found)))
    model.compile(optimizer="sgd", loss="mse")
    path = nets.saved(model, tmp_path / "model.keras")
    batch = Batch(np.array([[0, 1, 1], [2, 0, 5]]), np.ones((2, 2), np.float32))
    plain = nets.prepared(path, batch)
    names = list(plain.tensors())
    slopes = plain.gradients(names, batch)
    (rows,) = [one for one in slopes.values() if one.shape == (7, 5)]
    # Rows that occur.
    assert [bool(one.any()) for one in rows] == [True, True, True, False, False, True, False]
    frozen = nets.prepared(path, batch, frozen=frozenset(one for one in names if "rows" in one))
    for name, slope in frozen.gradients(names, batch).items():
        np.testing.assert_array_equal(slope, slopes[name])
        assert "seed" in name or slope.any()


@both
def test_targets_that_are_missing_or_do_not_fit_are_said(k: Callable[[], Any], file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, nets.dense))
    names, (batch,) = list(network.tensors()), nets.batches(1)
    with pytest.raises(UsageError, match="no targets"):
        network.gradients(names, Batch(batch.x))
    with pytest.raises(UsageError, match="cannot compute gradients"):
        network.gradients(names, Batch(batch.x, np.ones((5, 3), np.int64)))


@both
def test_gradients_too_small_for_short_numbers_are_seen(k: Callable[[], Any], tmp_path: Path) -> None:
    found = []
    for policy in ("mixed_float16", "float32"):
        k().utils.set_random_seed(0)
        layers = k().layers
        model = k().Sequential(
            [layers.Input((6,)), layers.Dense(8, dtype=policy), layers.Dense(4, dtype=policy), layers.Rescaling(1e-5)]
        )
        path, (batch,) = nets.saved(model, tmp_path / f"{policy}.keras"), nets.batches(1)
        batch = Batch(batch.x, np.ones((len(batch.x), 4), np.float32))
        network = nets.prepared(path, batch, loss="mse")
        found.append(network.gradients(list(network.tensors()), batch))
    for shorter, longer in zip(found[0].values(), found[1].values(), strict=True):
        assert np.abs(longer).max() < 2.0**-14
        np.testing.assert_allclose(shorter, longer, rtol=0.02, atol=0.02 * np.abs(longer).max())
