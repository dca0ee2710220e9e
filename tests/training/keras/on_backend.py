"""Trains a Keras 3 model on the backend of the environment, and says in JSON what came of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.formats.registry import open_model
from prunectl.training.backend import GradientStatistic, LoadOptions, TrainableModel, TrainOptions
from prunectl.training.data.source import Batch
from prunectl.training.keras.model import load_trainable


def batches(count: int, seed: int) -> list[Batch]:
    random = np.random.default_rng(seed)
    return [
        Batch(random.standard_normal((12, 6)).astype(np.float32), random.integers(0, 4, 12).astype(np.int64))
        for _ in range(count)
    ]


def fresh(path: Path) -> TrainableModel:
    network = load_trainable(open_model(path), LoadOptions())
    network.prepare(TrainOptions(example=batches(1, 0)[0], optimizer="adamw:weight_decay=0.05,learning_rate=0.01"))
    return network


def main(folder: Path) -> dict[str, Any]:
    path = folder / "model.keras"
    plain = fresh(path)
    for batch in batches(4, 1):
        plain.step(batch, 1.0)
    dense = {name: array.astype(np.float64).tolist() for name, array in plain.tensors().items()}

    network = fresh(path)
    names = [name for name in network.tensors() if "kernel" in name]
    masks = {name: np.abs(one) > np.median(np.abs(one)) for name, one in network.weights(names).items()}
    network.track_gradients(GradientStatistic.SALIENCE, names)
    network.step(batches(1, 5)[0], 0.5)
    network.mask(masks)
    network.reseed(1)
    lost = 0
    for batch in batches(3, 1):
        network.step(batch, 0.5)
        lost += sum(int(np.count_nonzero(one[~masks[name]])) for name, one in network.weights(names).items())
    network.save(folder)
    network.reseed(2)
    for batch in batches(3, 2):
        network.step(batch, 1.0, np.full((12, 4), 0.25, np.float32))
    logs = dict(network.logs())
    again = fresh(path)
    again.track_gradients(GradientStatistic.SALIENCE, names)
    again.restore(folder)
    again.mask(masks)
    again.reseed(2)
    for batch in batches(3, 2):
        again.step(batch, 1.0, np.full((12, 4), 0.25, np.float32))
    return {
        "backend": importlib.import_module("keras").backend.backend(),
        "dense": dense,
        "lost": lost,
        "is_same": all(one.tobytes() == again.tensors()[name].tobytes() for name, one in network.tensors().items()),
        "logs": logs,
        "evaluated": dict(network.evaluate(batches(2, 3))),
        "evidence": {name: float(one.sum()) for name, one in network.gradient_statistics().items()},
        "recalibrated": network.recalibrate(batches(2, 3)),
        "shape": np.asarray(network.predict(batches(1, 3)[0].x)).shape,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
