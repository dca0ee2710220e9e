"""What the weights of a layer meet, against what the layer itself makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.keras import nets
from tests.training.keras.nets import both
from tests.training.keras.sights_by_hand import TOLERANCE, alone, looked_at, multiplied, numbers, slid

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
Layer = Callable[[Any], Any]

PRODUCTS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "dense": (lambda k: k.layers.Dense(4, use_bias=False), (6,)),
    "dense over steps": (lambda k: k.layers.Dense(4, use_bias=False), (3, 6)),
    "einsum": (lambda k: k.layers.EinsumDense("abc,cd->abd", (None, 4)), (3, 6)),
    "einsum with dots": (lambda k: k.layers.EinsumDense("...x,xy->...y", 4), (3, 6)),
    "einsum turned": (lambda k: k.layers.EinsumDense("abc,db->acd", (6, 4)), (3, 6)),
    "einsum of heads": (lambda k: k.layers.EinsumDense("abc,chd->abhd", (None, 2, 5)), (3, 6)),
    "einsum in groups": (lambda k: k.layers.EinsumDense("abhc,chd->abhd", (None, 2, 5)), (3, 2, 6)),
}


@both
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_what_is_shown(k: Callable[[], Any], name: str, tmp_path: Path) -> None:
    build, shape = PRODUCTS[name]
    model = alone(k(), build(k()), shape, tmp_path / "model.keras")
    x = numbers(2, *shape)
    (sight,), weights = looked_at(tmp_path / "model.keras", x)
    found = multiplied(sight, weights[sight.name])
    theirs = np.asarray(model(x))
    np.testing.assert_allclose(found.reshape(theirs.shape), theirs, rtol=1e-4, atol=TOLERANCE)


WINDOWS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "1d valid": (lambda k: k.layers.Conv1D(4, 3, use_bias=False), (9, 2)),
    "1d same strides": (lambda k: k.layers.Conv1D(4, 4, strides=3, padding="same", use_bias=False), (10, 2)),
    "1d causal": (lambda k: k.layers.Conv1D(4, 3, dilation_rate=2, padding="causal", use_bias=False), (9, 2)),
    "2d groups": (lambda k: k.layers.Conv2D(6, (3, 2), groups=2, padding="same", use_bias=False), (5, 6, 4)),
    "2d strides": (lambda k: k.layers.Conv2D(4, (3, 2), strides=2, padding="same", use_bias=False), (5, 6, 3)),
    "2d dilated": (lambda k: k.layers.Conv2D(4, 3, dilation_rate=(1, 2), padding="same", use_bias=False), (5, 6, 3)),
    "3d": (lambda k: k.layers.Conv3D(3, 2, strides=(1, 2, 1), padding="same", use_bias=False), (3, 4, 3, 2)),
    "1d depthwise": (lambda k: k.layers.DepthwiseConv1D(3, depth_multiplier=2, use_bias=False), (7, 3)),
    "2d depthwise": (
        lambda k: k.layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2, use_bias=False),
        (6, 5, 3),
    ),
    "1d transposed": (lambda k: k.layers.Conv1DTranspose(4, 3, strides=2, padding="same", use_bias=False), (5, 2)),
    "1d transposed apart": (lambda k: k.layers.Conv1DTranspose(4, 2, strides=3, use_bias=False), (5, 2)),
    "1d transposed apart, same": (
        lambda k: k.layers.Conv1DTranspose(4, 2, strides=3, padding="same", use_bias=False),
        (5, 2),
    ),
    "2d transposed": (lambda k: k.layers.Conv2DTranspose(4, (4, 3), strides=2, use_bias=False), (3, 4, 2)),
    "2d transposed and more": (
        lambda k: k.layers.Conv2DTranspose(4, 5, strides=3, padding="same", output_padding=2, use_bias=False),
        (3, 4, 2),
    ),
    "2d transposed and dilated": (
        lambda k: k.layers.Conv2DTranspose(4, 3, dilation_rate=2, padding="same", use_bias=False),
        (5, 6, 2),
    ),
    "3d transposed": (
        lambda k: k.layers.Conv3DTranspose(2, 3, strides=2, padding="same", use_bias=False),
        (2, 3, 2, 2),
    ),
}


@both
@pytest.mark.parametrize("name", WINDOWS)
def test_a_convolution_is_that_of_what_is_shown(k: Callable[[], Any], name: str, tmp_path: Path) -> None:
    build, shape = WINDOWS[name]
    model = alone(k(), build(k()), shape, tmp_path / "model.keras")
    x = numbers(2, *shape)
    try:
        model.predict_on_batch(x)
    except Exception as error:
        # TensorFlow takes it on some processors only.
        if "do not yet support dilation" not in str(error):
            raise
        pytest.skip("TensorFlow cannot do it on this processor")
    (sight,), weights = looked_at(tmp_path / "model.keras", x)
    found = np.moveaxis(slid(sight, weights[sight.name]), 1, -1)
    np.testing.assert_allclose(found, np.asarray(model(x)), rtol=1e-4, atol=TOLERANCE)


SEPARABLE: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "1d": (lambda k: k.layers.SeparableConv1D(4, 3, strides=2, padding="same", use_bias=False), (8, 3)),
    "2d": (lambda k: k.layers.SeparableConv2D(4, 3, depth_multiplier=2, padding="same", use_bias=False), (5, 6, 3)),
    "2d dilated": (lambda k: k.layers.SeparableConv2D(4, 2, dilation_rate=2, use_bias=False), (5, 6, 3)),
}


@both
@pytest.mark.parametrize("name", SEPARABLE)
def test_a_separable_convolution_shows_both_steps(k: Callable[[], Any], name: str, tmp_path: Path) -> None:
    build, shape = SEPARABLE[name]
    model = alone(k(), build(k()), shape, tmp_path / "model.keras")
    x = numbers(2, *shape)
    (first, second), weights = looked_at(tmp_path / "model.keras", x)
    np.testing.assert_allclose(slid(first, weights[first.name]), second.inputs, rtol=1e-4, atol=TOLERANCE)
    found = np.moveaxis(slid(second, weights[second.name]), 1, -1)
    np.testing.assert_allclose(found, np.asarray(model(x)), rtol=1e-4, atol=TOLERANCE)


GATES = {"recurrent_activation": "hard_sigmoid"}
"""With gates of their own kind, Keras 2 does not trace what a GPU would do, which takes seconds."""
RECURRENT: dict[str, Layer] = {
    "simple": lambda k: k.layers.SimpleRNN(4, return_sequences=True),
    "lstm": lambda k: k.layers.LSTM(4, return_sequences=True),
    "lstm backwards": lambda k: k.layers.LSTM(4, return_sequences=True, go_backwards=True, **GATES),
    "gru": lambda k: k.layers.GRU(4, return_sequences=True),
    "old gru": lambda k: k.layers.GRU(4, return_sequences=True, reset_after=False),
    "cell": lambda k: k.layers.RNN(k.layers.LSTMCell(4), return_sequences=True),
}


@both
@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_layer_shows_inputs_and_states_of_every_step(
    k: Callable[[], Any], name: str, tmp_path: Path
) -> None:
    model = alone(k(), RECURRENT[name](k()), (5, 3), tmp_path / "model.keras")
    x = numbers(2, 5, 3)
    found, _ = looked_at(tmp_path / "model.keras", x)
    by_part = {(sight.name.rpartition("/")[2], sight.use.outputs): sight for sight in found}
    outputs = np.asarray(model(x))
    states = np.concatenate([np.zeros((2, 1, 4), np.float32), outputs[:, :-1]], axis=1)
    kernel, *others = [sight.inputs.reshape(5, 2, -1).swapaxes(0, 1) for sight in by_part.values()]
    np.testing.assert_array_equal(kernel, x[:, ::-1] if "backwards" in name else x)
    np.testing.assert_allclose(others[0], states, rtol=1e-4, atol=TOLERANCE)
    assert len(others) == (2 if name == "old gru" else 1)


@both
def test_a_gru_that_resets_first_shows_the_state_that_is_reset(k: Callable[[], Any], tmp_path: Path) -> None:
    model = alone(k(), k().layers.GRU(4, return_sequences=True, reset_after=False), (5, 3), tmp_path / "model.keras")
    x = numbers(2, 5, 3)
    found, weights = looked_at(tmp_path / "model.keras", x)
    through_kernel, gates, candidate = (multiplied(sight, weights[sight.name]) for sight in found)
    update, reset = np.split(1 / (1 + np.exp(-(through_kernel[:, :8] + gates))), 2, axis=1)
    state = found[1].inputs
    np.testing.assert_allclose(found[2].inputs, reset * state, rtol=1e-4, atol=TOLERANCE)
    made = update * state + (1 - update) * np.tanh(through_kernel[:, 8:] + candidate)
    np.testing.assert_allclose(made.reshape(5, 2, 4).swapaxes(0, 1), np.asarray(model(x)), rtol=1e-4, atol=TOLERANCE)


@both
def test_steps_that_are_masked_are_not_shown(k: Callable[[], Any], tmp_path: Path) -> None:
    layers = k().layers
    model = k().Sequential([layers.Input((5, 3)), layers.Masking(), layers.LSTM(4, return_sequences=True, **GATES)])
    nets.saved(model, tmp_path / "model.keras")
    x = numbers(2, 5, 3)
    x[0, 1] = x[1, 3:] = 0
    (kernel, state), _ = looked_at(tmp_path / "model.keras", x)
    order = [(step, example) for step in range(5) for example in range(2) if x[example, step].any()]
    np.testing.assert_array_equal(kernel.inputs, [x[example, step] for step, example in order])
    outputs = np.asarray(model(x))
    before = [outputs[example, step - 1] if step else np.zeros(4) for step, example in order]
    np.testing.assert_allclose(state.inputs, before, rtol=1e-4, atol=TOLERANCE)
