"""The scripts that a user would write: load, count zeros, zip for the size. Beside `prunectl size`."""

from __future__ import annotations

import json

from benchmarks.timing import PRUNECTL, PYTHON, cost, show

_SIZE = """
import gzip, json, sys
data = open(path, "rb").read()
print(json.dumps([total, zeros, len(gzip.compress(data, 6, mtime=0))]))
"""
_KERAS = """
import sys, numpy as np, {module} as keras
path = sys.argv[1]
arrays = keras.models.load_model(path, compile=False).get_weights()
total, zeros = sum(a.size for a in arrays), sum(int((a == 0).sum()) for a in arrays)
"""
_TORCH = """
import sys, torch
path = sys.argv[1]
tensors = torch.load(path, weights_only=True).values()
total, zeros = sum(t.numel() for t in tensors), sum(int((t == 0).sum()) for t in tensors)
"""
_ONNX = """
import sys, onnx, numpy as np
from onnx import numpy_helper
path = sys.argv[1]
arrays = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
total, zeros = sum(a.size for a in arrays), sum(int((a == 0).sum()) for a in arrays)
"""
_SAFETENSORS = """
import sys, numpy as np
from safetensors.numpy import load_file
path = sys.argv[1]
arrays = list(load_file(path).values())
total, zeros = sum(a.size for a in arrays), sum(int((a == 0).sum()) for a in arrays)
"""
SCRIPTS = (
    ("Keras 2", "fixtures/digits_cnn.h5", _KERAS.format(module="tf_keras")),
    ("Keras 3", "fixtures/digits_cnn.keras", _KERAS.format(module="keras")),
    ("PyTorch", "fixtures/digits_cnn.pt", _TORCH),
    ("onnx", "fixtures/digits_cnn.onnx", _ONNX),
    ("safetensors", "fixtures/digits_cnn.safetensors", _SAFETENSORS),
)


def run() -> None:
    """Print both side by side; they must agree on what they counted."""
    rows = []
    for name, path, script in SCRIPTS:
        theirs = cost([PYTHON, "-c", script + _SIZE, path], runs=5)
        ours = cost([PRUNECTL, "size", "--json", path], runs=5)
        total, zeros, compressed = json.loads(theirs.out)
        (model,) = json.loads(ours.out)["models"]
        found = (model["params"]["total"], model["params"]["zero"], model["bytes"]["compressed"])
        if found != (total, zeros, compressed):
            raise RuntimeError(f"{path}: {found} is not {(total, zeros, compressed)}")
        rows.append(
            (
                f"`{path}`",
                f"{name}: {theirs.seconds:.2f} s, {theirs.peak_bytes / 1e6:.0f} MB",
                f"{ours.seconds:.2f} s, {ours.peak_bytes / 1e6:.0f} MB",
                f"{theirs.seconds / ours.seconds:.1f}x",
            )
        )
    show("`prunectl size` beside the script that it replaces (goal: 5x)", ("file", "script", "prunectl", "ratio"), rows)
