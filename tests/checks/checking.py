"""Runs the command inside this process, in a folder with small models of known sizes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.running import Outcome, here

WEIGHT = np.array([[0, 0, 1 + row, 2 + column] * 2 for row, column in ((0, 0), (1, 5), (2, 3), (3, 1))], np.float32)
"""Half of it zeros, two in every four along the inputs."""
BIAS = np.zeros(4, np.float32)
MODEL = save({"fc.weight": WEIGHT, "fc.bias": BIAS})
RAW = len(MODEL)
GZIP = len(gzip.compress(MODEL, 6, mtime=0))
PARAMS = WEIGHT.size + BIAS.size


def prunectl(folder: Path, *words: str | Path) -> Outcome:
    """Run a command in a folder."""
    return here(*words, cwd=folder)


def put(folder: Path, toml: str = "", **models: bytes) -> Path:
    """Write a file of budgets, and models beside it."""
    (folder / "prunectl.toml").write_text(toml)
    for name, content in models.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return folder


def baseline(folder: Path, **gzips: int) -> None:
    """Write what models were, by hand."""
    models = {
        f"{name}.safetensors": {"raw": 0, "gzip": size, "params": 0, "prunable_zero": 0, "reason": "by hand"}
        for name, size in gzips.items()
    }
    (folder / "prunectl-baseline.json").write_text(json.dumps({"schema": "prunectl.baseline/1", "models": models}))


def gates(found: Outcome) -> list[dict[str, Any]]:
    """Return the gates of a JSON envelope."""
    told: list[dict[str, Any]] = found.json["gates"]
    return told
