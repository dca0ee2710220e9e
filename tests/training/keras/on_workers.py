"""Trains a model beside another process, and says in JSON what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.formats.registry import open_model
from prunectl.training.backend import GradientStatistic, LoadOptions, TrainOptions
from prunectl.training.keras.model import load_trainable
from tests.training.keras.on_backend import batches


def main(path: Path) -> dict[str, Any]:
    network = load_trainable(open_model(path), LoadOptions())
    metrics = ("accuracy", "tests.training.keras.customs:spread")
    means = TrainOptions(example=batches(1, 0)[0], optimizer="sgd:momentum=0.9,learning_rate=0.1", metrics=metrics)
    network.prepare(means)
    names = [name for name in network.tensors() if "kernel" in name]
    masks = {name: np.abs(one) > np.median(np.abs(one)) for name, one in network.weights(names).items()}
    network.track_gradients(GradientStatistic.GRADIENT, names)
    network.mask(masks)
    for batch in batches(4, 1):
        network.step(batch, 1.0)
    return {
        "ranks": network.ranks,
        "is_chief": network.is_chief,
        "lost": sum(int(np.count_nonzero(one[~masks[name]])) for name, one in network.weights(names).items()),
        "tensors": {name: one.tolist() for name, one in network.tensors().items()},
        "evidence": {name: one.tolist() for name, one in network.gradient_statistics().items()},
        "logs": dict(network.logs()),
        "evaluated": dict(network.evaluate(batches(2, 7))),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
