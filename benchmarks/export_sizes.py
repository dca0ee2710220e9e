"""How small does a network of the size of ResNet-18 get, 80 % of its weights zero? Beside what other tools leave."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.nets_torch import ResNet
from benchmarks.timing import PRUNECTL, PYTHON, QUIET, show

SIDE, EXAMPLES = 64, 16
_TITLES = ("what", "raw", "its own gzip", "weights zero", "exit")
_MODEL = ("--builder", "benchmarks.export_sizes:net", "--input", f"x:?,3,{SIDE},{SIDE}")
_DATA = ("--data", "{folder}/data.npz", "--samples", str(EXAMPLES))
_TORCH_WAYS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ONNX", "plain.onnx", _MODEL),
    ("ONNX --pack", "packed.onnx", (*_MODEL, "--pack")),
    ("ONNX --sparse", "sparse.onnx", (*_MODEL, "--sparse")),
    ("ONNX --half", "half.onnx", (*_MODEL, "--half")),
    ("ONNX --bf16", "bf16.onnx", (*_MODEL, "--bf16")),
    ("ONNX --int8 --data", "int8.onnx", (*_MODEL, *_DATA, "--int8")),
    ("ONNX --int8 --data --pack", "int8packed.onnx", (*_MODEL, *_DATA, "--int8", "--pack")),
    ("TorchScript", "plain.torchscript", _MODEL),
    ("TorchScript --int8 --data", "int8.torchscript", (*_MODEL, *_DATA, "--int8")),
    ("TorchScript --int8 --data --pack", "int8packed.torchscript", (*_MODEL, *_DATA, "--int8", "--pack")),
    ("PyTorch program", "plain.pt2", _MODEL),
    ("PyTorch program --pack", "packed.pt2", (*_MODEL, "--pack")),
    ("state dict --code", "code.pt", (*_MODEL, "--code")),
    ("state dict --code --pack", "codepacked.pt", (*_MODEL, "--code", "--pack")),
    ("safetensors", "plain.safetensors", ()),
    ("safetensors --half", "half.safetensors", ("--half",)),
    ("safetensors --bf16", "bf16.safetensors", ("--bf16",)),
    ("NumPy --pack", "packed.npz", ("--pack",)),
)
_KERAS_WAYS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("TensorFlow Lite", "plain.tflite", ()),
    ("TensorFlow Lite --half", "half.tflite", ("--half",)),
    ("TensorFlow Lite --int8", "int8.tflite", ("--int8",)),
    ("TensorFlow Lite --sparse", "sparse.tflite", ("--sparse",)),
)
_MAKE_KERAS = """
import sys, numpy as np, tf_keras as k
def unit(x, width, size=3, stride=1, act=True):
    x = k.layers.BatchNormalization()(k.layers.Conv2D(width, size, stride, "same", use_bias=False)(x))
    return k.layers.ReLU()(x) if act else x
x = image = k.layers.Input((int(sys.argv[2]), int(sys.argv[2]), 3))
x = k.layers.MaxPool2D(3, 2, "same")(unit(x, 64, 7, 2))
for stage in range(4):
    for at in range(2):
        width, stride = 64 << stage, 2 if stage and not at else 1
        y = unit(unit(x, width, 3, stride), width, act=False)
        side = unit(x, width, 1, stride, act=False) if stride > 1 else x
        x = k.layers.ReLU()(k.layers.add([y, side]))
k.Model(image, k.layers.Dense(1000)(k.layers.GlobalAveragePooling2D()(x))).save(sys.argv[1])
"""
_TORCH_PRUNE = """
import sys, torch
from torch.nn.utils import prune
from benchmarks.export_sizes import net
model = net()
holders = [(one, "weight") for one in model.modules() if isinstance(one, (torch.nn.Conv2d, torch.nn.Linear))]
prune.global_unstructured(holders, prune.L1Unstructured, amount=0.8)
torch.save(model.state_dict(), sys.argv[2])
"""
_ONNXSIM = """
import sys, onnx, onnxsim
model = onnx.load(sys.argv[1])
onnx.save(onnxsim.apply_magnitude_pruning(model, sparsity=0.8), sys.argv[2])
"""
_ONNXSIM_AGAIN = """
import sys, onnx, onnxsim
model = onnxsim.apply_magnitude_pruning(onnx.load(sys.argv[1]), sparsity=0.8)
onnx.save(onnxsim.simplify(model)[0], sys.argv[2])
"""
_TFMOT = """
import sys, tf_keras, tensorflow_model_optimization as tfmot
sparsity = tfmot.sparsity.keras
model = tf_keras.models.load_model(sys.argv[1], compile=False)
sparsity.prune_low_magnitude(model, sparsity.ConstantSparsity(0.8, 0)).save(sys.argv[2])
"""
_TFLITE = """
import sys, tensorflow as tf, tf_keras
converter = tf.lite.TFLiteConverter.from_keras_model(tf_keras.models.load_model(sys.argv[1], compile=False))
converter.optimizations = [tf.lite.Optimize.DEFAULT]
open(sys.argv[2], "wb").write(converter.convert())
"""
_OTHERS = (
    ("torch.nn.utils.prune, state dict with its masks", _TORCH_PRUNE, "dense.pt", "prune.pt"),
    ("onnxsim, pruned", _ONNXSIM, "dense.onnx", "onnxsim.onnx"),
    ("onnxsim, pruned and simplified", _ONNXSIM_AGAIN, "dense.onnx", "simplified.onnx"),
    ("tfmot, .h5 with its wrappers", _TFMOT, "dense.h5", "tfmot.h5"),
    ("TensorFlow Lite's converter, by its default, of the stripped .h5", _TFLITE, "sparse.h5", "default.tflite"),
)


def net() -> torch.nn.Module:
    """Return the network, its numbers always the same."""
    torch.manual_seed(0)
    return ResNet((2, 2, 2, 2), is_narrow=False).eval()


def run() -> None:
    """Print a row for each way, as raw bytes and as gzip makes of them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _make(folder)
        rows = [_size("dense state dict", folder / "dense.pt"), _size("dense .h5", folder / "dense.h5")]
        for source, ways in (("sparse.pt", _TORCH_WAYS), ("sparse.h5", _KERAS_WAYS)):
            rows.append(_size(f"pruned by prunectl, {source}", folder / source))
            rows += [_exported(folder, source, *way) for way in ways]
        rows += [_other(folder, *other) for other in _OTHERS]
    show(f"ResNet-18, 80 % zero: MB of what ships ({SIDE}x{SIDE} images, {EXAMPLES} examples)", _TITLES, rows)


def _make(folder: Path) -> None:
    torch.save(net().state_dict(), folder / "dense.pt")
    numbers = np.random.default_rng(0).standard_normal((EXAMPLES, 3, SIDE, SIDE), np.float32)
    np.savez(folder / "data.npz", x=numbers)
    _call(PYTHON, "-c", _MAKE_KERAS, str(folder / "dense.h5"), str(SIDE))
    _call(PRUNECTL, "export", str(folder / "dense.pt"), "-o", str(folder / "dense.onnx"), *_MODEL)
    for suffix in (".pt", ".h5"):
        dense, sparse = folder / f"dense{suffix}", folder / f"sparse{suffix}"
        _call(PRUNECTL, "prune", str(dense), "-o", str(sparse), "--sparsity", "0.8")


def _exported(folder: Path, source: str, title: str, name: str, words: tuple[str, ...]) -> tuple[str, ...]:
    said = [word.format(folder=folder) for word in words]
    code, out = _call(
        PRUNECTL, "export", str(folder / source), "-o", str(folder / name), "--json", *said, may_fail=True
    )
    found = json.loads(out)
    if code:
        return (title, "-", "-", "-", f"{code}: {found['error']['message'].replace(str(folder), '')[:140]}")
    return _size(title, folder / name, found["models"][-1])


def _other(folder: Path, title: str, script: str, source: str, name: str) -> tuple[str, ...]:
    _call(PYTHON, "-c", script, str(folder / source), str(folder / name))
    return _size(title, folder / name)


def _size(title: str, path: Path, found: dict[str, Any] | None = None) -> tuple[str, ...]:
    raw = path.stat().st_size
    packed = len(gzip.compress(path.read_bytes(), 6, mtime=0))
    share = f"{found['params']['zero'] / found['params']['total']:.1%}" if found else "-"
    return (title, f"{raw / 1e6:.1f}", f"{packed / 1e6:.1f}", share, "0")


def _call(*words: str, may_fail: bool = False) -> tuple[int, str]:
    done = subprocess.run(list(words), capture_output=True, text=True, env=os.environ | QUIET, check=False)
    if done.returncode and not may_fail:
        raise RuntimeError(f"{' '.join(words)[:200]} ended with {done.returncode}: {done.stderr[-400:]}")
    return done.returncode, done.stdout


if __name__ == "__main__":
    run()
