"""Small Keras models on disk, the same in both Kerases, and what they are trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.formats.registry import open_model
from prunectl.training.backend import LoadOptions, TrainOptions
from prunectl.training.data.source import Batch
from prunectl.training.keras.backend import ignore_warnings
from prunectl.training.keras.model import KerasTrainable, load_trainable
from tests.contract import Array
from tests.networks import keras, tf_keras

EXAMPLES, FEATURES, CLASSES = 12, 6, 4
Files = Callable[[Callable[[], Any], Callable[[Any], Any]], Path]

both = pytest.mark.parametrize("k", [pytest.param(tf_keras, id="tf_keras"), pytest.param(keras, id="keras")])
kinds = pytest.mark.parametrize(
    ("k", "suffix"),
    [
        pytest.param(tf_keras, ".h5", id="tf_keras-h5"),
        pytest.param(tf_keras, ".keras", id="tf_keras-archive"),
        pytest.param(tf_keras, "", id="tf_keras-folder"),
        pytest.param(keras, ".h5", id="keras-h5"),
        pytest.param(keras, ".keras", id="keras-archive"),
    ],
)


def dense(k: Any, **compiling: Any) -> Any:
    """Two layers and a softmax."""
    k.utils.set_random_seed(0)
    model = k.Sequential(
        [
            k.layers.Input((FEATURES,)),
            k.layers.Dense(8, activation="relu", name="first"),
            k.layers.Dense(CLASSES, activation="softmax", name="second"),
        ]
    )
    if compiling:
        model.compile(**compiling)
    return model


def compiled(k: Any) -> Any:
    """The same, compiled."""
    return dense(k, optimizer="adam", loss="sparse_categorical_crossentropy")


def random_parts(k: Any) -> Any:
    """A model with everything in it that training leaves a trace in."""
    k.utils.set_random_seed(0)
    model = k.Sequential(
        [
            k.layers.Input((FEATURES,)),
            k.layers.Dense(8, name="first"),
            k.layers.BatchNormalization(name="norm"),
            k.layers.Dropout(0.4),
            k.layers.Dense(CLASSES, activation="softmax", name="second"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    return model


def batches(count: int = 4, seed: int = 0) -> list[Batch]:
    """Batches with numbers of classes."""
    random = np.random.default_rng(seed)
    return [
        Batch(
            random.standard_normal((EXAMPLES, FEATURES)).astype(np.float32),
            random.integers(0, CLASSES, EXAMPLES).astype(np.int64),
        )
        for _ in range(count)
    ]


def shorter(batch: Batch, examples: int = 5) -> Batch:
    """The first examples of a batch, as the last one of an epoch may be."""
    return Batch(batch.x[:examples], batch.y[:examples])  # type: ignore[index]


def saved(model: Any, path: Path, *, is_traced: bool = False) -> Path:
    """Save a model by its suffix; into a folder without the graphs of its layers, for Keras builds them anew."""
    with ignore_warnings():
        if path.suffix:
            model.save(path)
        else:
            model.save(path, save_format="tf", save_traces=is_traced)
    return path


def opened(path: Path, **origin: Any) -> KerasTrainable:
    """Open a file for training."""
    network = load_trainable(open_model(path), LoadOptions(**origin))
    assert isinstance(network, KerasTrainable)
    return network


def prepared(path: Path, example: Batch | None = None, **means: Any) -> KerasTrainable:
    """Open a file and prepare it."""
    network = opened(path)
    network.prepare(TrainOptions(example=example if example is not None else batches(1)[0], **means))
    return network


def kernels(network: KerasTrainable) -> dict[str, Array]:
    """The kernels of a network, by their names in the file."""
    return {name: array for name, array in network.tensors().items() if "kernel" in name}


def half(arrays: dict[str, Array]) -> dict[str, Array]:
    """Masks that keep the larger half of each."""
    return {name: np.abs(array) > np.median(np.abs(array)) for name, array in arrays.items()}


def lost_zeros(network: KerasTrainable, masks: dict[str, Array]) -> int:
    """How many weights that are masked are not zero."""
    return sum(int(np.count_nonzero(array[~masks[name]])) for name, array in network.weights(masks).items())


def train(network: KerasTrainable, given: list[Batch], rate: Callable[[int], float] = lambda _: 1.0) -> None:
    """Train on batches, one after the other."""
    for at, batch in enumerate(given):
        network.step(batch, rate(at))
