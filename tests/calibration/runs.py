"""Models with data beside them, pruned by what the data does in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunectl.calibration.prune import prune
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import Pruned
from prunectl.pruning.request import PruneRequest
from tests.contract import Array
from tests.running import FIXTURES

TORCH_NETS = "tests.training.torch.nets"
NETS = "tests.calibration.nets"
DIGITS = f"{FIXTURES / 'digits.npz'}?norm=/16"
KERNELS = ("conv1", "conv2", "fc1", "fc2")
FILES = ("digits_cnn.keras", "digits_cnn.h5", "digits_cnn.pt", "digits_cnn.onnx")


def build_of(file: str) -> str:
    """What builds the model, where a file has weights alone."""
    return f"{FIXTURES / 'digits_torch.py'}:DigitsCNN" if file == "digits_cnn.pt" else ""


def digits(file: str, target: Path, **wish: Any) -> Pruned:
    """Prune the digits network, with a few digits."""
    wish = {"sparsity": 0.5, "data": DIGITS, "samples": 48, "model": build_of(file), **wish}
    return prune(FIXTURES / file, PruneRequest(**wish), Destination(target))


def numbers(path: Path) -> dict[str, Array]:
    """All tensors of a file."""
    model = open_model(path)
    return {tensor.name: np.array(model.read(tensor)) for tensor in model.tensors}


def kernels(path: Path) -> dict[str, Array]:
    """Its kernels, as outputs by inputs by window."""
    found = {}
    for name, array in numbers(path).items():
        if name.endswith(("kernel:0", "/kernel")):
            found[name.split("/")[0]] = np.moveaxis(array, (-1, -2), (0, 1))
        elif name.endswith(".weight"):
            found[name.split(".")[0]] = array
    return found


def saved(module: torch.nn.Module, path: Path) -> Path:
    torch.save(module.state_dict(), path)
    return path


def data(path: Path, **arrays: Array) -> str:
    np.savez(path, **arrays)
    return str(path)


def examples(count: int, *shape: int, seed: int = 0) -> Array:
    """Inputs whose features are neither alike in size nor independent."""
    random = np.random.default_rng(seed)
    size = int(np.prod(shape))
    mixed = random.standard_normal((count, size)) @ random.standard_normal((size, size))
    scaled = mixed * random.uniform(0.1, 3, size) + random.uniform(-1, 1, size)
    return scaled.reshape(count, *shape).astype(np.float32)
