"""How a model is trained where the user says so, where its file does, and where nobody does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import UsageError
from prunectl.training.data.source import Batch
from prunectl.training.distillation import compare_answers
from prunectl.training.keras.model import KerasTrainable
from tests.contract import Array
from tests.networks import keras, tf_keras
from tests.running import FIXTURES
from tests.training.keras import nets
from tests.training.keras.nets import both

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
HERE = "tests.training.keras.customs"
LABELS = np.arange(nets.EXAMPLES) % nets.CLASSES
BITS = LABELS % 2


def ending(width: int, activation: str, k: Any, **compiling: Any) -> Any:
    k.utils.set_random_seed(0)
    layer = k.layers.Dense(width, activation=activation)
    model = k.Sequential([k.layers.Input((nets.FEATURES,)), layer])
    if compiling:
        model.compile(**compiling)
    return model


@cache
def dense_to(width: int, activation: str) -> Callable[[Any], Any]:
    """What makes a network of one layer, the same each time, for its file to be found again."""
    return partial(ending, width, activation)


def batch(y: Array) -> Batch:
    return Batch(nets.batches(1)[0].x, y)


def loss_of(network: KerasTrainable, given: Batch) -> float:
    return network.evaluate([given])["loss"]


def cross_entropy(logits: Array, labels: Array) -> float:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return float(-(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))[np.arange(len(labels)), labels].mean())


def binary(logits: Array, bits: Array) -> float:
    logits = logits.astype(np.float64).reshape(-1)
    return float((np.logaddexp(0.0, logits) - logits * bits).mean())


@both
@pytest.mark.parametrize("activation", ["softmax", "linear"])
@pytest.mark.parametrize("form", ["numbers", "one-hot"])
def test_labels_are_compared_by_cross_entropy_whatever_the_model_ends_with(
    form: str, activation: str, k: Any, file_of: nets.Files
) -> None:
    y = LABELS if form == "numbers" else np.eye(nets.CLASSES, dtype=np.int64)[LABELS]
    network = nets.prepared(file_of(k, dense_to(nets.CLASSES, activation)), batch(y))
    kernel, bias = network.tensors().values()
    logits = np.asarray(batch(y).x) @ kernel + bias
    found = network.evaluate([batch(y)])
    assert found["loss"] == pytest.approx(cross_entropy(logits, LABELS), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == LABELS).mean())
    assert "categorical_crossentropy" in network.notes[0]
    assert ("from logits" in network.notes[0]) == (activation == "linear")


@both
@pytest.mark.parametrize("activation", ["sigmoid", "linear"])
def test_a_single_output_says_yes_or_no(activation: str, k: Any, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, dense_to(1, activation)), batch(BITS))
    kernel, bias = network.tensors().values()
    logits = np.asarray(batch(BITS).x) @ kernel + bias
    found = network.evaluate([batch(BITS)])
    assert found["loss"] == pytest.approx(binary(logits, BITS), rel=1e-4)
    assert found["accuracy"] == pytest.approx(((logits.reshape(-1) > 0) == BITS).mean())


@both
def test_numbers_are_compared_by_squares(k: Any, file_of: nets.Files) -> None:
    y = np.random.default_rng(0).standard_normal((nets.EXAMPLES, 3)).astype(np.float32)
    network = nets.prepared(file_of(k, dense_to(3, "linear")), batch(y))
    rest = np.asarray(network.predict(batch(y).x)) - y
    found = network.evaluate([batch(y)])
    assert found == {
        "loss": pytest.approx(np.square(rest).mean(), rel=1e-5),
        "mae": pytest.approx(np.abs(rest).mean(), rel=1e-5),
    }


@both
def test_what_the_file_says_is_taken(k: Any, tmp_path: Path) -> None:
    source = k()
    compiling = {
        "optimizer": source.optimizers.SGD(0.25, momentum=0.5, nesterov=True),
        "loss": source.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy", source.metrics.SparseTopKCategoricalAccuracy(2, name="best_two")],
    }
    for name in ("model.keras", "model.h5"):
        network = nets.prepared(
            nets.saved(ending(nets.CLASSES, "linear", source, **compiling), tmp_path / name), batch(LABELS)
        )
        assert network.evaluate([batch(LABELS)]).keys() == {"loss", "accuracy", "best_two"}
        settings = network._model.optimizer.get_config()
        assert (type(network._model.optimizer).__name__, settings["momentum"], settings["nesterov"]) == (
            "SGD",
            0.5,
            True,
        )
        assert float(settings["learning_rate"]) == 0.25
        assert network.notes == ()


@both
def test_targets_of_another_form_than_the_file_was_trained_on_are_taken(k: Any, tmp_path: Path) -> None:
    model = ending(nets.CLASSES, "softmax", k(), optimizer="adam", loss="categorical_crossentropy")
    path = nets.saved(model, tmp_path / "model.keras")
    network = nets.prepared(path, batch(LABELS))
    assert "numbers of classes" in network.notes[0]
    hot = nets.prepared(path, batch(np.eye(nets.CLASSES, dtype=np.float32)[LABELS]))
    assert hot.notes == ()
    assert network.evaluate([batch(LABELS)]).keys() == {"loss", "accuracy"}
    assert loss_of(network, batch(LABELS)) == pytest.approx(
        loss_of(hot, batch(np.eye(nets.CLASSES, dtype=np.float32)[LABELS])), rel=1e-5
    )


@both
@pytest.mark.parametrize("name", ["mse", "mae", "kl", "hinge", "huber", "mean_squared_error", f"{HERE}:cubes"])
def test_losses_have_names(name: str, k: Any, file_of: nets.Files) -> None:
    y = np.random.default_rng(0).random((nets.EXAMPLES, 3)).astype(np.float32)
    network = nets.prepared(file_of(k, dense_to(3, "sigmoid")), batch(y), loss=name)
    p, q = y.astype(np.float64), np.asarray(network.predict(batch(y).x)).astype(np.float64)
    expected = {
        "mse": np.square(p - q),
        "mean_squared_error": np.square(p - q),
        "mae": np.abs(p - q),
        "kl": 3 * p * np.log(p / q),
        "hinge": np.maximum(1 - p * q, 0),
        "huber": 0.5 * np.square(p - q),
        f"{HERE}:cubes": (p - q) ** 4,
    }[name]
    assert loss_of(network, batch(y)) == pytest.approx(expected.mean(), rel=1e-4)


@both
@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_kl_compares_probabilities_whatever_the_model_ends_in(activation: str, k: Any, file_of: nets.Files) -> None:
    y = np.random.default_rng(0).dirichlet(np.ones(3), nets.EXAMPLES).astype(np.float32)
    network = nets.prepared(file_of(k, dense_to(3, activation)), batch(y), loss="kl")
    out = np.asarray(network.predict(batch(y).x)).astype(np.float64)
    shares = out if activation == "softmax" else np.exp(out) / np.exp(out).sum(1, keepdims=True)
    assert loss_of(network, batch(y)) == pytest.approx((y * np.log(y / shares)).sum(1).mean(), rel=1e-3)


@both
@pytest.mark.parametrize("low", [0, -1])
def test_hinge_takes_targets_of_zero_and_one_for_signs(low: int, k: Any, file_of: nets.Files) -> None:
    y = np.where(BITS > 0, 1, low).astype(np.float32)[:, None]
    network = nets.prepared(file_of(k, dense_to(1, "linear")), batch(y), loss="hinge")
    out = np.asarray(network.predict(batch(y).x)).astype(np.float64)
    expected = np.maximum(0, 1 - out * np.where(BITS > 0, 1, -1)[:, None]).mean()
    assert loss_of(network, batch(y)) == pytest.approx(expected, rel=1e-4)


@both
def test_each_output_has_the_loss_that_fits_it(k: Any, tmp_path: Path) -> None:
    source = k()
    x = source.layers.Input((nets.FEATURES,))
    outputs = [source.layers.Dense(4, activation="softmax", name="a")(x), source.layers.Dense(2, name="b")(x)]
    path = nets.saved(source.Model(x, outputs), tmp_path / "model.keras")
    given = Batch(nets.batches(1)[0].x, (LABELS, np.zeros((nets.EXAMPLES, 2), np.float32)))
    network = nets.prepared(path, given)
    first, second = network.predict(given.x)
    expected = -np.log(first[np.arange(nets.EXAMPLES), LABELS]).mean() + np.square(second).mean()
    found = network.evaluate([given])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert {"a_accuracy", "b_mae"} <= found.keys()
    nets.train(network, [given] * 2)
    with pytest.raises(UsageError, match="2 outputs"):
        nets.prepared(path, batch(LABELS))


@both
def test_inputs_and_outputs_that_have_names_are_given_by_name(k: Any, tmp_path: Path) -> None:
    source = k()
    x, z = source.layers.Input((6,), name="x"), source.layers.Input((2,), name="z")
    both_of_them = source.layers.Concatenate()([x, z])
    model = source.Model({"x": x, "z": z}, {"out": source.layers.Dense(3, name="out")(both_of_them)})
    random = np.random.default_rng(0)
    given = Batch(
        (random.random((5, 6)).astype(np.float32), random.random((5, 2)).astype(np.float32)),
        random.random((5, 3)).astype(np.float32),
    )
    network = nets.prepared(nets.saved(model, tmp_path / "model.keras"), given)
    nets.train(network, [given] * 2)
    assert np.shape(network.predict(given.x)) == (5, 3)


@both
def test_the_gradient_is_clipped_by_its_norm(k: Any, file_of: nets.Files) -> None:
    y = np.full((nets.EXAMPLES, 3), 100.0, np.float32)
    network = nets.prepared(file_of(k, dense_to(3, "linear")), batch(y), optimizer="sgd", lr=1.0, clip=0.5)
    before = network.tensors()
    network.step(batch(y), 1.0)
    moved = [after - before[name] for name, after in network.tensors().items()]
    assert np.sqrt(sum(np.square(one).sum() for one in moved)) == pytest.approx(0.5, rel=1e-4)


@both
@pytest.mark.parametrize(
    ("means", "message", "meant"),
    [
        ({"optimizer": "adm"}, "adm is not a known optimizer", "adam"),
        ({"optimizer": "sgd:momentm=0.9"}, "no setting momentm", "momentum"),
        ({"optimizer": "sgd:momentum"}, "is not a setting", ""),
        ({"optimizer": "sgd:momentum=7"}, "does not accept these settings", ""),
        ({"loss": "cross-entrpy"}, "not a known loss", "cross-entropy"),
        ({"loss": "tests.nothing_there:loss"}, "no module", ""),
        ({"metrics": ("acuracy",)}, "not a known metric", "accuracy"),
        ({"precision": "bf16"}, "set their own precision", ""),
        ({"device": "gpu"}, "no GPU", ""),
        ({"device": "tpu"}, "no device", ""),
        ({"frozen": frozenset({"third/kernel"})}, "cannot be frozen", ""),
    ],
)
def test_what_does_not_exist_is_refused_with_what_was_meant(
    means: dict[str, Any], message: str, meant: str, k: Any, file_of: nets.Files
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        nets.prepared(file_of(k, nets.dense), **means)
    assert not meant or meant in caught.value.did_you_mean


def test_freezing_everything_leaves_nothing_to_train(file_of: nets.Files) -> None:
    path = file_of(keras, nets.dense)
    with pytest.raises(UsageError, match="nothing to train: every weight is frozen"):
        nets.prepared(path, frozen=frozenset(nets.opened(path).tensors()))


@both
def test_metrics_have_names(k: Any, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, nets.dense), metrics=("top2", "accuracy"))
    given = nets.batches(1)[0]
    found = network.evaluate([given])
    order = np.argsort(-np.asarray(network.predict(given.x)), axis=1)
    labels = np.asarray(given.y)[:, None]
    assert found.keys() == {"loss", "accuracy", "top2"}
    assert found["top2"] == pytest.approx((order[:, :2] == labels).any(1).mean())
    assert found["accuracy"] == pytest.approx((order[:, :1] == labels).any(1).mean())


@both
def test_a_loss_of_the_users_with_labels_is_judged_by_accuracy(k: Any, file_of: nets.Files, tmp_path: Path) -> None:
    home = k().__name__
    (tmp_path / "own.py").write_text(
        f"import {home} as k\ndef loss(y, out):\n    return k.losses.sparse_categorical_crossentropy(y, out)\n"
    )
    path = file_of(k, nets.dense)
    found = nets.prepared(path, loss=f"{tmp_path / 'own.py'}:loss").evaluate([nets.batches(1)[0]])
    named = nets.prepared(path, metrics=("accuracy",)).evaluate([nets.batches(1)[0]])
    assert found.keys() == {"loss", "accuracy"}
    assert found == pytest.approx(named, rel=1e-5)


def test_a_metric_that_does_not_fit_the_targets_is_refused(file_of: nets.Files) -> None:
    path = file_of(keras, nets.dense)
    with pytest.raises(UsageError, match="mae does not fit outputs of 4 and targets of one number"):
        nets.prepared(path, metrics=("mae",))
    network = nets.prepared(path, metrics=("categorical_crossentropy",))
    with pytest.raises(UsageError, match="cannot evaluate"):
        network.evaluate([nets.batches(1)[0]])
    with pytest.raises(UsageError, match="first batch"):
        network.step(nets.batches(1)[0], 1.0)


@both
def test_a_rate_that_follows_a_schedule_goes_on_following_it(k: Any, tmp_path: Path) -> None:
    source = k()
    rates = source.optimizers.schedules.ExponentialDecay(0.5, decay_steps=1, decay_rate=0.5)
    model = nets.dense(source, optimizer=source.optimizers.SGD(rates), loss="sparse_categorical_crossentropy")
    network = nets.prepared(nets.saved(model, tmp_path / "model.keras"))
    nets.train(network, nets.batches())
    for one in nets.batches():
        model.train_on_batch(one.x, one.y)
    for mine, theirs in zip(network._model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert "schedule" in network.notes[0]


def test_the_settings_of_an_optimizer_of_long_ago_are_understood(tmp_path: Path) -> None:
    k = tf_keras()
    old = k.optimizers.legacy.SGD(learning_rate=0.5, momentum=0.5, decay=0.25)
    model = nets.dense(k, optimizer=old, loss="sparse_categorical_crossentropy")
    network = nets.prepared(nets.saved(model, tmp_path / "model.h5"))
    nets.train(network, nets.batches())
    for one in nets.batches():
        model.train_on_batch(one.x, one.y)
    for mine, theirs in zip(network._model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["digits_cnn.keras", "digits_cnn.h5", "digits_cnn_savedmodel"])
def test_a_trained_network_goes_on_as_good_as_its_file_says(name: str) -> None:
    with np.load(FIXTURES / "digits.npz") as held:
        x, y = (held[key] for key in held.files[:2])
    x = x.reshape(-1, 8, 8, 1).astype(np.float32)
    given = Batch(x[:200], y[:200].astype(np.int64))
    network = nets.prepared(FIXTURES / name, given)
    assert network.evaluate([given])["accuracy"] > 0.9


@both
def test_one_number_for_a_batch_counts_for_each_of_its_examples(k: Any, file_of: nets.Files) -> None:
    network = nets.prepared(file_of(k, dense_to(3, "linear")), batch(LABELS % 3), metrics=(f"{HERE}:spread",))
    x = batch(LABELS).x * np.linspace(1, 9, nets.EXAMPLES, dtype=np.float32)[:, None]
    parts = [Batch(x[:10], LABELS[:10] % 3), Batch(x[10:], LABELS[10:] % 3)]
    expected = np.square(np.asarray(network.predict(x)).astype(np.float64)).mean()
    assert network.evaluate(parts)["spread"] == pytest.approx(expected, rel=1e-4)


F1 = """
def graph_f1(y, out):
    y, out = OPS.cast(y, "float32"), OPS.cast(out > 0, "float32")
    return 2 * OPS.sum(y * out) / (OPS.sum(y) + OPS.sum(out))


class F1:
    def __init__(self):
        self.both = self.each = 0

    def update(self, out, y):
        y, chosen = y.reshape(-1), out.reshape(-1) > 0
        self.both, self.each = self.both + (chosen & (y > 0)).sum(), self.each + chosen.sum() + (y > 0).sum()

    def compute(self):
        return 2 * self.both / self.each
"""


@both
@pytest.mark.parametrize("name", ["graph_f1", "F1"])
def test_what_is_no_mean_of_batches_is_measured_over_all_examples(
    name: str, k: Any, file_of: nets.Files, tmp_path: Path
) -> None:
    library = "import keras\nOPS = keras.ops" if k().__name__ == "keras" else "import tensorflow as tf\nOPS = tf"
    code = F1.replace("OPS.sum", "OPS.reduce_sum") if "tensorflow" in library else F1
    (tmp_path / "own.py").write_text(f"{library}\n{code}")
    bits = (np.arange(nets.EXAMPLES) % 5 == 0).astype(np.int64)
    given = batch(bits[:, None])
    metrics = ("accuracy", f"{tmp_path / 'own.py'}:{name}")
    network = nets.prepared(file_of(k, dense_to(1, "linear")), given, metrics=metrics)
    chosen = np.asarray(network.predict(given.x)).reshape(-1) > 0
    parts = [Batch(given.x[at : at + 7], given.y[at : at + 7]) for at in range(0, nets.EXAMPLES, 7)]
    found = network.evaluate(parts)
    assert found[name] == pytest.approx(2 * (chosen & (bits > 0)).sum() / (chosen.sum() + bits.sum()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(chosen == bits))
    assert network.evaluate(parts) == found
    network.step(parts[0], 1.0)
    assert (name in network.logs()) == (name != "F1")


@both
def test_towards_its_own_answers_nothing_is_dropped_out_or_penalised(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    k().utils.set_random_seed(0)
    parts = [
        layers.Reshape((nets.FEATURES, 1)),
        layers.SimpleRNN(8, dropout=0.5, recurrent_dropout=0.5),
        layers.GaussianNoise(1.0),
        layers.Dense(8, activation="relu", kernel_regularizer="l2", activity_regularizer="l2"),
        k().Sequential([layers.Dropout(0.5), layers.Dense(nets.CLASSES, activation="softmax")]),
    ]
    path = nets.saved(k().Sequential([layers.Input((nets.FEATURES,)), *parts]), tmp_path / "model.keras")
    x = nets.batches(1)[0].x
    network = nets.prepared(path, Batch(x), loss="mse", teacher_share=1.0, temperature=1.0, is_matching=True)
    network.compare(compare_answers(network.predict(x), network.predict(x), network.signature, "")[0])
    network.step(Batch(x), 0.0, network.predict(x))
    assert network.logs()["loss"] == pytest.approx(0.0, abs=1e-6)


@both
def test_towards_its_own_answers_batch_normalisation_takes_the_statistics_of_the_batch(
    k: Callable[[], Any], file_of: nets.Files
) -> None:
    path, x = file_of(k, nets.random_parts), nets.batches(1)[0].x
    network = nets.prepared(path, Batch(x), loss="mse", teacher_share=1.0, temperature=1.0, is_matching=True)
    before = network.tensors()
    network.step(Batch(x), 0.0, network.predict(x))
    moved = {
        name.rpartition("/")[2].partition(":")[0]
        for name, array in network.tensors().items()
        if not np.array_equal(array, before[name])
    }
    assert moved == {"moving_mean", "moving_variance"}
