"""What the weights of whole models meet: layers within layers, cells, own code, other backends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from prunectl.training.backend import LayerInput, SlidingWindow, WeightUse
from tests import forked
from tests.contract import Array
from tests.networks import keras
from tests.training.keras import nets, on_sights
from tests.training.keras.nets import both, kinds
from tests.training.keras.sights_by_hand import TOLERANCE, looked_at, multiplied, numbers, slid
from tests.training.keras.test_processes import command, outcome, silent

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@both
def test_both_directions_and_layers_within_layers_are_shown(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    model = k().Sequential(
        [
            layers.Input((5, 3)),
            # With gates of another kind, Keras 2 does not trace what a GPU would do, which takes seconds.
            layers.Bidirectional(layers.LSTM(4, recurrent_activation="hard_sigmoid", return_sequences=True)),
            layers.TimeDistributed(layers.Dense(2, use_bias=False)),
        ]
    )
    nets.saved(model, tmp_path / "model.keras")
    x = numbers(2, 5, 3)
    found, weights = looked_at(tmp_path / "model.keras", x)
    assert {sight.name for sight in found} == {name for name, one in weights.items() if one.ndim == 2}
    forward, backward = (sight.inputs.reshape(5, 2, 3) for sight in found if sight.inputs.shape == (10, 3))
    np.testing.assert_array_equal(forward, x.swapaxes(0, 1))
    np.testing.assert_array_equal(backward, forward[::-1])
    name = found[-1].name
    parts = np.concatenate([sight.inputs.reshape(-1, 8) for sight in found if sight.name == name])
    made = (parts @ weights[name]).reshape(5, 2, 2).swapaxes(0, 1)
    theirs = np.asarray(model(x))
    is_by_example = len([sight for sight in found if sight.name == name]) == 1
    np.testing.assert_allclose(
        (parts @ weights[name]).reshape(2, 5, 2) if is_by_example else made, theirs, rtol=1e-4, atol=TOLERANCE
    )


@both
def test_masks_reach_layers_within_layers_while_they_are_looked_at(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    model = k().Sequential(
        [
            layers.Input((4, 5)),
            layers.Embedding(6, 3, mask_zero=True),
            layers.TimeDistributed(layers.LSTM(2, recurrent_activation="hard_sigmoid", name="inner"), name="outer"),
            layers.Dense(7, name="last"),
        ]
    )
    nets.saved(model, tmp_path / "model.keras")
    x = np.random.default_rng(0).integers(0, 4, (2, 4, 5)).astype(np.float32)
    found, weights = looked_at(tmp_path / "model.keras", x)
    (seen,) = [sight.inputs for sight in found if weights[sight.name].shape == (2, 7)]
    before = k().Model(model.inputs, model.get_layer("outer").output)
    np.testing.assert_allclose(seen, np.asarray(before(x)), rtol=1e-4, atol=TOLERANCE)
    kernel = np.concatenate([sight.inputs for sight in found if weights[sight.name].shape == (3, 8)])
    assert len(kernel) == np.count_nonzero(x)


@both
def test_cells_on_one_another_and_states_from_elsewhere_are_shown(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    x, state = layers.Input((5, 3)), layers.Input((4,))
    first = layers.SimpleRNN(4, return_sequences=True, name="first")(x, initial_state=[state])
    cells = [layers.SimpleRNNCell(2, name="lower"), layers.GRUCell(3, name="upper")]
    model = k().Model([x, state], layers.RNN(cells, name="second")(first))
    nets.saved(model, tmp_path / "model.keras")
    given = (numbers(2, 5, 3), numbers(2, 4, seed=1))
    found, weights = looked_at(tmp_path / "model.keras", given)
    assert len(found) == 6
    between = np.asarray(k().Model(model.inputs, model.get_layer("first").output)(list(given)))
    shown = [sight.inputs.reshape(5, 2, -1).swapaxes(0, 1) for sight in found]
    np.testing.assert_array_equal(shown[0], given[0])
    np.testing.assert_array_equal(shown[1][:, 0], given[1])
    np.testing.assert_allclose(shown[2], between, rtol=1e-4, atol=TOLERANCE)
    np.testing.assert_allclose(shown[4][:, :-1], shown[3][:, 1:], rtol=1e-4, atol=TOLERANCE)
    assert {sight.name for sight in found} == {name for name in weights if "kernel" in name}


@both
def test_a_layer_that_keeps_its_state_finds_it_again(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    model = k().Sequential(
        [layers.Input(batch_shape=(2, 5, 3)), layers.LSTM(4, recurrent_activation="hard_sigmoid", stateful=True)]
    )
    nets.saved(model, tmp_path / "model.keras")
    network, shown, x = nets.opened(tmp_path / "model.keras"), list[Array](), numbers(2, 5, 3)
    names = nets.kernels(network)
    for _ in range(2):
        network.observe(names, x, lambda sight: shown.append(sight.inputs.copy()))
    for first, second in zip(shown[:2], shown[2:], strict=True):
        np.testing.assert_array_equal(first, second)


@kinds
def test_a_layer_that_is_used_twice_is_shown_twice(k: Callable[[], Any], suffix: str, tmp_path: Path) -> None:
    layers = k().layers
    inner_in = layers.Input((6,))
    inner = k().Model(inner_in, layers.Dense(6, name="deep", activation="tanh")(inner_in), name="inner")
    left, right = layers.Input((6,), name="left"), layers.Input((6,), name="right")
    shared = layers.Dense(6, name="shared", activation="relu")
    model = k().Model([left, right], layers.Add()([inner(shared(left)), inner(shared(right))]))
    path = nets.saved(model, tmp_path / f"model{suffix}")
    x = (numbers(3, 6), numbers(3, 6, seed=1))
    found, weights = looked_at(path, x)
    (shared_name,) = {sight.name for sight in found if any(np.array_equal(sight.inputs, one) for one in x)}
    kernel, bias = weights[shared_name], weights[shared_name.replace("kernel", "bias")]
    by_layer = [[sight.inputs for sight in found if (sight.name == shared_name) is one] for one in (True, False)]
    assert sorted(map(float, map(np.sum, by_layer[0]))) == pytest.approx(sorted(float(one.sum()) for one in x))
    made = [np.maximum(one @ kernel + bias, 0) for one in by_layer[0]]
    for one in by_layer[1]:
        assert any(np.allclose(one, other, atol=TOLERANCE) for other in made)
    assert len(by_layer[1]) == 2


def of_own_code(k: Any) -> Any:
    """A model that calls its layers from a function that TensorFlow traces."""
    tf = pytest.importorskip("tensorflow")

    class Plain(k.layers.Dense):  # type: ignore[misc]
        """Works as its parent does."""

    class Other(k.layers.Dense):  # type: ignore[misc]
        """Does not."""

        def call(self, x: Any) -> Any:
            return super().call(x * 2)

    class Own(k.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rows = k.layers.Dense(5, activation="relu"), Plain(4)
            self.other, self.steps = Other(3), k.layers.Conv1D(2, 2, groups=2)

        @tf.function  # type: ignore[untyped-decorator]
        def call(self, x: Any) -> Any:
            found = self.other(self.rows(self.first(x)))
            return self.steps(tf.reshape(found[:, :2], (-1, 1, 2)) + tf.zeros((1, 3, 1)))

    model = Own()
    model(numbers(1, 6))
    return model


@both
def test_a_model_of_own_code_is_shown_where_keras_does_the_work(
    k: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("own_code")
    module.build = lambda: of_own_code(k())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_code", module)
    path = tmp_path / "model.weights.h5"
    of_own_code(k()).save_weights(path)
    network, found = nets.opened(path, model="own_code:build"), list[LayerInput]()
    weights, x = network.tensors(), numbers(3, 6)
    network.predict(x)
    network.observe(list(weights), x, found.append)
    assert [sight.inputs.shape for sight in found] == [(3, 6), (3, 5), (3, 2, 3)]
    np.testing.assert_array_equal(found[0].inputs, x)
    assert not pytest.importorskip("tensorflow").config.functions_run_eagerly()


@both
def test_attention_shows_what_its_heads_project(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    x = layers.Input((5, 6))
    model = k().Model(x, layers.MultiHeadAttention(2, 4, name="attention")(x, x))
    nets.saved(model, tmp_path / "model.keras")
    given = numbers(2, 5, 6)
    found, weights = looked_at(tmp_path / "model.keras", given)
    *projections, output = found
    assert len(projections) == 3
    # Its bias is zero before it is trained.
    theirs = np.asarray(model(given))
    np.testing.assert_allclose(multiplied(output, weights[output.name]), theirs, rtol=1e-4, atol=TOLERANCE)
    for sight in projections:
        made = multiplied(sight, weights[sight.name])
        expected = np.einsum("abc,cde->abde", given, weights[sight.name])
        np.testing.assert_allclose(made.reshape(expected.shape), expected, rtol=1e-4, atol=TOLERANCE)


@both
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_shorter_numbers_are_shown_as_longer_ones(k: Callable[[], Any], policy: str, tmp_path: Path) -> None:
    layers = k().layers
    model = k().Sequential(
        [
            layers.Input((5, 3)),
            layers.LSTM(4, recurrent_activation="hard_sigmoid", return_sequences=True, dtype=policy),
            layers.Conv1D(2, 3, dtype=policy),
            layers.Dense(2, dtype=policy),
        ]
    )
    nets.saved(model, tmp_path / "model.keras")
    x = numbers(2, 5, 3)
    found, _ = looked_at(tmp_path / "model.keras", x)
    assert len(found) == 4
    np.testing.assert_allclose(found[0].inputs.reshape(5, 2, 3).swapaxes(0, 1), x, rtol=1e-2)


@both
def test_only_what_is_asked_for_is_shown(k: Callable[[], Any], tmp_path: Path) -> None:
    network = nets.opened(nets.saved(nets.dense(k()), tmp_path / "model.keras"))
    (name,) = [one for one in nets.kernels(network) if network.tensors()[one].shape == (8, 4)]
    found = list[str]()
    network.observe([name], numbers(3, 6), lambda sight: found.append(sight.name))
    assert found == [name]


class RefusedError(Exception):
    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)


@both
def test_an_error_of_who_looks_on_comes_through_and_leaves_the_model_whole(
    k: Callable[[], Any], tmp_path: Path
) -> None:
    network = nets.opened(nets.saved(nets.dense(k()), tmp_path / "model.keras"))

    def see(_: LayerInput) -> None:
        raise RefusedError("this", "that")

    with pytest.raises(RefusedError):
        network.observe(list(nets.kernels(network)), numbers(3, 6), see)
    found = list[LayerInput]()
    network.observe(list(nets.kernels(network)), numbers(3, 6), found.append)
    assert len(found) == 2
    network.predict(numbers(3, 6))
    assert len(found) == 2


def of_many_kinds(k: Any) -> Any:
    """A model in which little is in the usual place."""
    k.utils.set_random_seed(0)
    layers = k.layers
    return k.Sequential(
        [
            layers.Input((6, 8)),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
            layers.GRU(8, return_sequences=True, reset_after=False),
            layers.Conv1D(6, 3, strides=2, groups=2, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.SeparableConv1D(4, 3, dilation_rate=1, padding="same"),
            layers.Conv1DTranspose(5, 3, strides=2, padding="same"),
            layers.Flatten(),
            layers.Dense(3, activation="softmax", kernel_regularizer="l2", name="dense"),
        ]
    )


@pytest.mark.parametrize("backend", ["torch"])
def test_another_backend_shows_the_same(backend: str, tmp_path: Path) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    nets.saved(of_many_kinds(keras()), tmp_path / "model.keras")
    theirs = outcome(forked.run(command("on_sights", tmp_path), env=silent(KERAS_BACKEND=backend)))
    ours: dict[str, Any] = json.loads(json.dumps(on_sights.main(tmp_path)))
    assert (theirs["backend"], ours["backend"]) == (backend, "tensorflow")
    assert theirs["is_same"]
    assert ours["is_same"]
    assert len(ours["sights"]) == 12
    for (name, inputs, use), (their_name, their_inputs, their_use) in zip(
        ours["sights"], theirs["sights"], strict=True
    ):
        assert (name, use) == (their_name, their_use)
        np.testing.assert_allclose(their_inputs, inputs, rtol=1e-3, atol=1e-4)
    for name, slope in ours["gradients"].items():
        np.testing.assert_allclose(theirs["gradients"][name], slope, rtol=1e-3, atol=1e-4)
    assert theirs["evaluated"] == pytest.approx(ours["evaluated"], rel=1e-3)


def told(said: dict[str, Any]) -> WeightUse:
    """What was written as JSON."""
    window = said.pop("window")
    return WeightUse(**said, window=SlidingWindow(**window) if window is not None else None)


def test_channels_may_come_first(tmp_path: Path) -> None:
    if find_spec("torch") is None:
        pytest.skip("TensorFlow has such convolutions on other devices alone")
    layers = keras().layers
    words = {"data_format": "channels_first", "padding": "same", "use_bias": False}
    model = keras().Sequential(
        [
            layers.Input((6, 8)),
            layers.Conv1D(4, 3, strides=2, **words),
            layers.DepthwiseConv1D(2, depth_multiplier=2, **words),
            layers.Conv1DTranspose(3, 3, strides=2, **words),
            layers.Flatten(),
            layers.Dense(3, name="dense"),
        ]
    )
    nets.saved(model, tmp_path / "model.keras")
    said = outcome(forked.run(command("on_sights", tmp_path), env=silent(KERAS_BACKEND="torch")))
    weights = nets.opened(tmp_path / "model.keras").tensors()
    shown = [LayerInput(name, np.asarray(inputs, np.float32), told(use)) for name, inputs, use in said["sights"]]
    assert len(shown) == 4
    np.testing.assert_array_equal(shown[0].inputs, on_sights.batch().x)
    for one, following in pairwise(shown):
        made = slid(one, weights[one.name])
        np.testing.assert_allclose(made.reshape(following.inputs.shape), following.inputs, rtol=1e-3, atol=1e-4)
