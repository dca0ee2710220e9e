"""What a step does, against Keras itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.training.backend import TrainOptions
from prunectl.training.data.source import Batch
from prunectl.training.keras.model import KerasTrainable
from tests.contract import raw
from tests.networks import keras, tf_keras
from tests.training.keras import nets
from tests.training.keras.nets import both

# TensorFlow under Keras 3 has not caught up with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


# Archives are what the other tests here train from.
@pytest.mark.parametrize(("k", "suffix"), [(tf_keras, ".h5"), (tf_keras, ""), (keras, ".h5")])
def test_without_masks_it_trains_like_keras_itself_to_the_bit(k: Any, suffix: str, tmp_path: Path) -> None:
    network = nets.prepared(nets.saved(nets.compiled(k()), tmp_path / f"model{suffix}"))
    nets.train(network, uneven())
    assert len(network.tensors()) == 4
    assert [raw(mine) for mine in _in_order(network)] == trained_by_keras(k)


def uneven() -> list[Batch]:
    *batches, last = nets.batches()
    return [*batches, nets.shorter(last)]


@cache
def trained_by_keras(k: Any) -> list[bytes]:
    model = nets.compiled(k())
    for batch in uneven():
        model.train_on_batch(batch.x, batch.y)
    return [raw(np.asarray(array)) for array in model.get_weights()]


@both
@pytest.mark.parametrize("examples", [None, nets.EXAMPLES], ids=["any-size", "one-size"])
def test_a_step_is_traced_once(examples: int | None, k: Any, tmp_path: Path) -> None:
    of = k().layers
    model = k().Sequential([of.Input((nets.FEATURES,), batch_size=examples), of.Dense(nets.CLASSES)])
    network = nets.prepared(nets.saved(model, tmp_path / "model.keras"))
    traced: list[str] = []
    for step in ("train_step", "test_step"):
        setattr(network._model, step, _counted(getattr(network._model, step), traced))
    batches = uneven() if examples is None else nets.batches()
    nets.train(network, batches)
    network.evaluate(batches)
    assert traced == ["train_step", "test_step"]


def _counted(step: Any, calls: list[str]) -> Any:
    def counting(data: Any) -> Any:
        calls.append(step.__name__)
        return step(data)

    return counting


@both
def test_a_loss_of_the_users_may_ask_a_batch_for_its_size(k: Any, tmp_path: Path) -> None:
    x, labels = nets.batches(1)[0].x, np.eye(nets.CLASSES, dtype=np.float32)[np.arange(nets.EXAMPLES) % nets.CLASSES]
    batch = Batch(x, labels)
    path = nets.saved(nets.dense(k()), tmp_path / "model.keras")
    network = nets.prepared(path, batch, loss="tests.training.keras.customs:squares_by_example", optimizer="sgd")
    expected = np.square(np.asarray(network.predict(x)) - labels).sum() / nets.EXAMPLES
    network.step(batch, 1.0)
    assert network.logs()["loss"] == pytest.approx(expected, rel=1e-5)


@both
def test_masked_training_is_sgd_on_what_is_kept(k: Any, tmp_path: Path) -> None:
    model = nets.dense(k(), optimizer=k().optimizers.SGD(0.1), loss="sparse_categorical_crossentropy")
    network = nets.prepared(nets.saved(model, tmp_path / "model.keras"))
    masks = nets.half(nets.kernels(network))
    network.mask(masks)
    nets.train(network, nets.batches(5))
    by_hand = [np.ones(array.shape, np.bool_) for array in model.get_weights()]
    by_hand[0], by_hand[2] = masks.values()
    for batch in nets.batches(5):
        model.set_weights([np.where(mask, array, 0) for mask, array in zip(by_hand, model.get_weights(), strict=True)])
        model.train_on_batch(batch.x, batch.y)
    expected = [np.where(mask, array, 0) for mask, array in zip(by_hand, model.get_weights(), strict=True)]
    for mine, theirs in zip(_in_order(network), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@both
@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw:weight_decay=0.1,learning_rate=0.05",
        "sgd:momentum=0.9,nesterov=true,weight_decay=0.01",
        "adam:use_ema=true,ema_momentum=0.5,ema_overwrite_frequency=2",
        "adafactor",
    ],
)
def test_masked_weights_are_zero_after_every_step(k: Any, optimizer: str, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, nets.compiled), optimizer=optimizer)
    nets.train(network, nets.batches(3))
    masks = nets.half(nets.kernels(network))
    network.mask(masks)
    assert nets.lost_zeros(network, masks) == 0
    for batch in nets.batches(6, seed=1):
        network.step(batch, 1.0)
        assert nets.lost_zeros(network, masks) == 0
    assert all(np.any(array) for array in nets.kernels(network).values())


@both
def test_weights_that_a_constraint_moves_away_from_zero_are_put_back(k: Any, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, nets.compiled), optimizer="sgd")
    for layer in network._model.layers:
        for one in layer.weights:
            setattr(one, "_constraint" if k is tf_keras else "constraint", lambda weight: weight + 1.0)
    masks = nets.half(nets.kernels(network))
    network.mask(masks)
    nets.train(network, nets.batches())
    assert nets.lost_zeros(network, masks) == 0


@both
def test_a_model_of_mixed_precision_keeps_its_zeros(k: Any, tmp_path: Path) -> None:
    before = k().mixed_precision.global_policy() if k is tf_keras else k().config.dtype_policy()
    setting = k().mixed_precision.set_global_policy if k is tf_keras else k().config.set_dtype_policy
    setting("mixed_float16")
    try:
        path = nets.saved(nets.compiled(k()), tmp_path / "model.keras")
    finally:
        setting(before)
    network = nets.prepared(path, optimizer="adamw:weight_decay=0.1")
    assert hasattr(network._model.optimizer, "inner_optimizer")
    before_training = nets.kernels(network)
    masks = nets.half(before_training)
    network.mask(masks)
    nets.train(network, nets.batches(6))
    assert nets.lost_zeros(network, masks) == 0
    assert all(raw(array) != raw(before_training[name]) for name, array in nets.kernels(network).items())


@both
def test_a_weight_that_comes_back_starts_without_momentum(k: Any, file_of: nets.Files) -> None:
    path = file_of(k, nets.compiled)
    network = nets.prepared(path, optimizer="sgd:learning_rate=0.0001,momentum=0.99")
    nets.train(network, nets.batches(5))
    masks = nets.half(nets.kernels(network))
    network.mask(masks)
    network.mask({name: np.ones_like(mask) for name, mask in masks.items()})
    network.step(Batch(np.zeros((3, nets.FEATURES), np.float32), np.zeros(3, np.int64)), 1.0)
    # No input, no gradient for the first kernel: what moved it is momentum, and what was masked has none.
    name = next(iter(masks))
    first = nets.kernels(network)[name]
    assert np.all(first[~masks[name]] == 0)
    assert np.all(first[masks[name]] != 0)


@both
def test_masks_of_other_tensors_can_be_put_on_later(k: Any, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, nets.compiled), optimizer="sgd")
    masks = nets.half(nets.kernels(network))
    for name, mask in masks.items():
        network.mask({name: mask})
        nets.train(network, nets.batches(2))
    assert nets.lost_zeros(network, masks) == 0


@both
def test_the_rate_is_a_share_of_the_base(k: Any, file_of: nets.Files) -> None:
    path = file_of(k, nets.compiled)
    network, plain = nets.prepared(path, optimizer="sgd", lr=0.5), nets.prepared(path, optimizer="sgd", lr=0.125)
    nets.train(network, nets.batches(), rate=lambda _: 0.25)
    nets.train(plain, nets.batches())
    assert [raw(array) for array in network.tensors().values()] == [raw(array) for array in plain.tensors().values()]


@both
def test_frozen_tensors_stay_to_the_bit_and_the_rest_learns(k: Any, file_of: nets.Files) -> None:
    path = file_of(k, nets.random_parts)
    names = list(nets.opened(path).tensors())
    frozen = frozenset(name for name in names if name.startswith(("first", "norm")))
    network = nets.prepared(path, frozen=frozen, optimizer="adamw:weight_decay=0.1")
    before = network.tensors()
    nets.train(network, nets.batches())
    after = network.tensors()
    assert len(frozen) == 6
    assert {name for name in names if raw(before[name]) != raw(after[name])} == set(names) - frozen
    assert network.recalibrate(nets.batches()) == 0


@both
def test_statistics_alone_can_be_frozen(k: Any, file_of: nets.Files) -> None:
    path = file_of(k, nets.random_parts)
    frozen = frozenset(name for name in nets.opened(path).tensors() if "moving" in name)
    network = nets.prepared(path, frozen=frozen, optimizer="sgd")
    before = network.tensors()
    nets.train(network, nets.batches())
    changed = {name for name, array in network.tensors().items() if raw(array) != raw(before[name])}
    assert len(frozen) == 2
    assert changed == before.keys() - frozen


def judged(k: Any) -> Any:
    return nets.dense(k, loss="sparse_categorical_crossentropy", metrics=["accuracy"])


@both
def test_logs_and_evaluation_are_means_over_examples(k: Any, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, judged), optimizer="sgd", lr=0.0)
    first, second = nets.batches(2)
    short = Batch(second.x[:3], second.y[:3])  # type: ignore[index]
    nets.train(network, [first, short])
    expected = _by_hand(network, [first, short])
    evaluated = network.evaluate([first, short])
    logs = network.logs()
    for found in (evaluated, logs):
        assert found.keys() == {"loss", "accuracy"}
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-6)
    assert network.logs() == {}


@both
def test_evaluation_changes_nothing(k: Any, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, nets.random_parts), optimizer="sgd")
    nets.train(network, nets.batches(2))
    before = [raw(array) for array in network.tensors().values()]
    first = network.evaluate(nets.batches())
    assert network.evaluate(nets.batches()) == first
    assert [raw(array) for array in network.tensors().values()] == before


def test_the_file_is_not_touched(file_of: nets.Files) -> None:
    path = file_of(keras, nets.compiled)
    before = path.read_bytes()
    network = nets.prepared(path)
    nets.train(network, nets.batches())
    assert path.read_bytes() == before


def test_a_network_is_prepared_again_with_other_means(file_of: nets.Files) -> None:
    path = file_of(tf_keras, nets.compiled)
    network = nets.prepared(path)
    network.prepare(TrainOptions(example=nets.batches(1)[0], optimizer="sgd", lr=0.0))
    before = [raw(array) for array in network.tensors().values()]
    nets.train(network, nets.batches())
    assert [raw(array) for array in network.tensors().values()] == before


def _in_order(network: KerasTrainable) -> list[Any]:
    by_identity = {id(variable): name for name, variable in network._variables.items()}
    return [network.tensors()[by_identity[id(variable)]] for variable in network._model.weights]


def _by_hand(network: KerasTrainable, batches: list[Batch]) -> dict[str, float]:
    probabilities = np.concatenate([np.asarray(network.predict(batch.x)) for batch in batches])
    labels = np.concatenate([np.asarray(batch.y) for batch in batches])
    picked = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return {"loss": float(-np.log(picked).mean()), "accuracy": float((probabilities.argmax(1) == labels).mean())}
