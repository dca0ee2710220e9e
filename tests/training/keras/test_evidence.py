"""What is gathered about weights, and what a teacher adds to the loss, against formulas in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.training.backend import GradientStatistic
from prunectl.training.data.source import Batch
from tests.contract import Array
from tests.training.keras import nets
from tests.training.keras.nets import both

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def linear(k: Any) -> Any:
    k.utils.set_random_seed(3)
    return k.Sequential([k.layers.Input((6,)), k.layers.Dense(2, name="only")])


def gradient(batch: Batch, kernel: Array, bias: Array) -> Array:
    """Of the mean squared error by the kernel."""
    x = np.asarray(batch.x, np.float64)
    rest = x @ kernel.astype(np.float64) + bias - np.asarray(batch.y)
    return np.asarray(x.T @ rest * 2 / rest.size)


def numbers(count: int) -> list[Batch]:
    random = np.random.default_rng(1)
    return [Batch(*(random.standard_normal((8, n)).astype(np.float32) for n in (6, 2))) for _ in range(count)]


@both
@pytest.mark.parametrize(
    ("statistic", "is_masked"),
    [
        (GradientStatistic.GRADIENT, True),
        (GradientStatistic.SALIENCE, True),
        (GradientStatistic.MOVEMENT, True),
        (GradientStatistic.SALIENCE, False),
    ],
)
def test_evidence_adds_up_what_it_says_also_of_what_is_masked(
    statistic: GradientStatistic, is_masked: bool, k: Any, file_of: nets.Files
) -> None:
    network = nets.prepared(file_of(k, linear), numbers(1)[0], loss="mse", optimizer="sgd", lr=0.05)
    name = next(iter(nets.kernels(network)))
    mask = nets.half(nets.kernels(network))[name]
    if is_masked:
        network.mask({name: mask})
    network.track_gradients(statistic, [name])
    for _ in range(2):
        expected = np.zeros((6, 2))
        for batch in numbers(3):
            kernel, bias = network.tensors().values()
            slope = gradient(batch, kernel, bias)
            expected += {
                GradientStatistic.GRADIENT: slope,
                GradientStatistic.SALIENCE: np.abs(kernel * slope),
                GradientStatistic.MOVEMENT: -kernel * slope,
            }[statistic]
            network.step(batch, 1.0)
        np.testing.assert_allclose(network.gradient_statistics()[name], expected, rtol=1e-4, atol=1e-5)
        network.reset_gradient_statistics()
        assert not np.any(network.gradient_statistics()[name])
    if is_masked:
        assert nets.lost_zeros(network, {name: mask}) == 0


@both
def test_gradients_of_embeddings_are_held_too(k: Any, tmp_path: Path) -> None:
    source = k()
    tokens = source.layers.Input((5,), dtype="int32")
    seen = source.layers.GlobalAveragePooling1D()(source.layers.Embedding(9, 4, name="words")(tokens))
    model = source.Model(tokens, source.layers.Dense(3, activation="softmax")(seen))
    random = np.random.default_rng(0)
    batch = Batch(random.integers(0, 4, (8, 5)).astype(np.int32), random.integers(0, 3, 8))
    network = nets.prepared(nets.saved(model, tmp_path / "model.keras"), batch)
    name = next(name for name in network.tensors() if "embeddings" in name)
    masks = nets.half(network.weights([name]))
    network.mask(masks)
    network.track_gradients(GradientStatistic.GRADIENT, [name])
    before = network.weights([name])[name]
    nets.train(network, [batch] * 4)
    after = network.weights([name])[name]
    assert nets.lost_zeros(network, masks) == 0
    assert np.all(before[:4][masks[name][:4]] != after[:4][masks[name][:4]])
    found = network.gradient_statistics()[name]
    assert np.all(found[:4] != 0)
    assert not np.any(found[4:])


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def divergence(teacher: Array, student: Array, heat: float) -> float:
    them, us = softmax(teacher / heat), softmax(student / heat)
    return float((them * (np.log(them) - np.log(us))).sum(-1).mean()) * heat**2


@both
@pytest.mark.parametrize("ending", ["softmax", "linear"])
def test_a_teacher_is_followed_by_the_formula(ending: str, k: Any, tmp_path: Path) -> None:
    source = k()
    source.utils.set_random_seed(0)
    layer = source.layers.Dense(nets.CLASSES, activation=ending, kernel_regularizer=source.regularizers.L2(0.01))
    model = source.Sequential([source.layers.Input((nets.FEATURES,)), layer])
    path = nets.saved(model, tmp_path / "model.keras")
    batch = nets.batches(1)[0]
    network = nets.prepared(
        path, batch, optimizer="sgd", lr=0.0, teacher_share=0.3, temperature=3.0, loss="cross-entropy"
    )
    teacher = np.random.default_rng(5).standard_normal((nets.EXAMPLES, nets.CLASSES)).astype(np.float32)
    kernel, bias = network.tensors().values()
    student = np.asarray(batch.x) @ kernel + bias
    own = -np.log(softmax(student)[np.arange(nets.EXAMPLES), np.asarray(batch.y)]).mean()
    penalty = 0.01 * np.square(kernel).sum()
    wanted = 0.3 * divergence(teacher, student, 3.0) + 0.7 * own + penalty
    network.step(batch, 1.0, softmax(teacher) if ending == "softmax" else teacher)
    found = network.logs()
    assert found["loss"] == pytest.approx(wanted, rel=1e-4)
    assert found["accuracy"] == pytest.approx((student.argmax(1) == batch.y).mean(), rel=1e-6)
    assert network.evaluate([batch])["loss"] == pytest.approx(own + penalty, rel=1e-4)


@both
def test_a_teacher_of_numbers_is_followed_by_squares(k: Any, file_of: nets.Files) -> None:
    batch = numbers(1)[0]
    network = nets.prepared(file_of(k, linear), batch, loss="mse", teacher_share=0.25)
    teacher_outputs = np.random.default_rng(2).standard_normal((8, 2)).astype(np.float32)
    out = np.asarray(network.predict(batch.x))
    wanted = 0.25 * np.square(teacher_outputs - out).mean() + 0.75 * np.square(np.asarray(batch.y) - out).mean()
    network.step(batch, 1.0, teacher_outputs)
    assert network.logs()["loss"] == pytest.approx(wanted, rel=1e-5)


@both
def test_a_teacher_is_followed_without_targets(k: Any, file_of: nets.Files) -> None:
    batch = numbers(1)[0]
    network = nets.prepared(file_of(k, linear), Batch(batch.x), optimizer="sgd", lr=0.2)
    teacher_outputs = np.asarray(batch.x)[:, :2]
    for _ in range(100):
        network.step(Batch(batch.x), 1.0, teacher_outputs)
    assert float(np.square(np.asarray(network.predict(batch.x)) - teacher_outputs).mean()) < 0.05
