"""Small models of Keras 2, for tests that wrap them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.networks import tf_keras


def functional(k: Any) -> Any:
    """A shared layer, a nested model, two inputs, and a layer that tfmot does not know."""
    first, second = k.Input((6,), name="one"), k.Input((6,), name="two")
    shared = k.layers.Dense(8, name="shared", activation="relu")
    inner = k.Sequential([k.layers.Input((8,)), k.layers.Dense(5, name="inside")], name="nested")
    joined = k.layers.Concatenate()([inner(shared(first)), inner(shared(second))])
    normed = k.layers.BatchNormalization(name="norm")(joined)
    spread = k.layers.TimeDistributed(k.layers.Dense(4), name="spread")(k.layers.Reshape((2, 5))(normed))
    out = k.layers.Dense(3, name="out", activation="softmax")(k.layers.Flatten()(spread))
    return k.Model([first, second], out)


def convolutional(k: Any) -> Any:
    return k.Sequential(
        [
            k.layers.Input((8, 8, 1)),
            k.layers.Conv2D(8, 3, name="conv", activation="relu"),
            k.layers.Flatten(),
            k.layers.Dense(12, name="hidden", activation="softmax"),
        ]
    )


def flat(k: Any) -> Any:
    return k.Sequential([k.layers.Input((8, 8, 1)), k.layers.Flatten(), k.layers.Dense(6, name="hidden")])


def recurrent(k: Any) -> Any:
    # With gates of another kind, Keras does not trace what a GPU would do, which takes seconds.
    lstm = k.layers.LSTM(6, recurrent_activation="hard_sigmoid", name="lstm")
    return k.Sequential([k.layers.Input((5, 4)), lstm, k.layers.Dense(2, name="out")])


def saved(model: Any, path: Path, *, is_compiled: bool = True, **words: Any) -> Path:
    """Save a model of ours; where the path has no suffix as a SavedModel, whose layers Keras builds anew."""
    tf_keras().utils.set_random_seed(5)
    for weight in model.weights:
        shape = weight.shape
        # Variances are among them.
        weight.assign(np.abs(np.random.default_rng(len(weight.name)).normal(size=shape)).astype(np.float32) + 0.01)
    if is_compiled:
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"], **words)
    model.save(path, **({} if path.suffix else {"save_format": "tf", "save_traces": False}))
    return path
