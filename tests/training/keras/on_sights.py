"""Looks at a Keras 3 model on the backend of the environment, and says in JSON what it saw."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.formats.registry import open_model
from prunectl.training.backend import LayerInput, LoadOptions, TrainOptions
from prunectl.training.data.source import Batch
from prunectl.training.keras.model import KerasTrainable, load_trainable


def batch() -> Batch:
    random = np.random.default_rng(0)
    return Batch(random.standard_normal((4, 6, 8)).astype(np.float32), random.integers(0, 3, 4))


def main(folder: Path) -> dict[str, Any]:
    network = load_trainable(open_model(folder / "model.keras"), LoadOptions())
    assert isinstance(network, KerasTrainable)
    given, found = batch(), list[LayerInput]()
    network.prepare(TrainOptions(example=given, frozen=frozenset(one for one in network.tensors() if "dense" in one)))
    before = {name: one.tobytes() for name, one in network.tensors().items()}
    network.observe(list(before), given.x, found.append)
    slopes = network.gradients(list(before), given)
    logs = dict(network.evaluate([given]))
    return {
        "backend": importlib.import_module("keras").backend.backend(),
        "sights": [[one.name, one.inputs.tolist(), asdict(one.use)] for one in found],
        "gradients": {name: one.tolist() for name, one in slopes.items()},
        "is_same": before == {name: one.tobytes() for name, one in network.tensors().items()},
        "evaluated": logs,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
