"""What users bring along: layers, losses, training steps."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from tests.networks import keras, tf_keras


def _scale(k: Any) -> Any:
    class Scale(k.layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.kernel = self.add_weight(shape=(int(shape[-1]),), initializer="ones", name="kernel")

        def call(self, x: Any) -> Any:
            return x * self.kernel

    return Scale


def _own_step(k: Any) -> Any:
    class OwnStep(k.Model):  # type: ignore[misc]
        """Trains without its optimizer: every weight goes to one, masked or not."""

        def train_step(self, data: Any) -> Mapping[str, Any]:
            for variable in self.trainable_variables:
                variable.assign(variable * 0 + 1)
            return {"loss": self.trainable_variables[0][0, 0] * 3.0}

    return OwnStep


def _unseeded(k: Any) -> Any:
    class Unseeded(k.layers.Layer):  # type: ignore[misc]
        """Drops out by the generator that Keras 3 shares among all that have none of their own."""

        def call(self, x: Any, training: bool = False) -> Any:
            return k.random.dropout(x, 0.4) if training else x

    return Unseeded


SCALE = {tf_keras: _scale(tf_keras()), keras: _scale(keras())}
OWN_STEP = {tf_keras: _own_step(tf_keras()), keras: _own_step(keras())}
UNSEEDED = _unseeded(keras())
TWO = {"Scale": SCALE[tf_keras], "OwnStep": OWN_STEP[tf_keras]}
THREE = {"Scale": SCALE[keras], "OwnStep": OWN_STEP[keras], "Unseeded": UNSEEDED}
BOTH_FOR_TWO, BOTH_FOR_THREE = {**TWO, "Unused": SCALE[keras]}, {**THREE, "Unused": SCALE[tf_keras]}
"""Objects of both versions of Keras, of which a file names those of one."""
NO_DICTIONARY = 3


def cubes(y_true: Any, y_pred: Any) -> Any:
    """A loss of no library."""
    difference = y_pred - y_true
    return difference * difference * difference * difference


def squares_by_example(y_true: Any, y_pred: Any) -> Any:
    """A loss that asks a batch how many examples it has while a step is traced."""
    tf = importlib.import_module("tensorflow")
    return tf.reduce_sum((y_pred - y_true) ** 2) / y_pred.shape[0]


def plain_step(model: Any, x: Any, y: Any) -> dict[str, Any]:
    """A step by TensorFlow's tape and the model's optimizer."""
    tf = importlib.import_module("tensorflow")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.keras.losses.sparse_categorical_crossentropy(y, model(x, training=True)))
    model.optimizer.apply_gradients(
        zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
    )
    return {"loss": loss}


def stray_step(model: Any, x: Any, y: Any) -> dict[str, Any]:
    """A step that goes round the optimizer."""
    for variable in model.trainable_variables:
        variable.assign(variable + 1.0)
    return {"loss": float(len(x))}


def wrong_step(model: Any, x: Any, y: Any) -> float:
    return 3.0


def spread(y: Any, out: Any) -> Any:
    """One number for a batch: the mean square of its outputs."""
    del y
    return importlib.import_module("tensorflow").reduce_mean(out**2)
