"""Pruning a file beside the frameworks and tools that do it, and beside `cp`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from benchmarks.timing import BIN, PRUNECTL, PYTHON, Cost, cost, show

SIDE, LAYERS = 4096, 8
_TORCH = """
import os, sys, torch
from torch.nn.utils import prune
source, target = sys.argv[1:]
state = torch.load(source, weights_only=True)
holders = []
for name, tensor in state.items():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(tensor, requires_grad=False)
    holders.append((layer, "weight"))
prune.global_unstructured(holders, prune.L1Unstructured, amount=0.8)
for (layer, _), name in zip(holders, state):
    prune.remove(layer, "weight")
    state[name] = layer.weight.data
torch.save(state, target)
os.fsync(os.open(target, os.O_RDONLY))
"""
_TFMOT = """
import os, sys, tf_keras, tensorflow_model_optimization as tfmot
source, target = sys.argv[1:]
sparsity = tfmot.sparsity.keras
model = tf_keras.models.load_model(source, compile=False)
model = sparsity.prune_low_magnitude(model, pruning_schedule=sparsity.ConstantSparsity(0.8, 0))
for layer in model.layers:
    if hasattr(layer, "pruning_obj"):
        layer.pruning_obj.conditional_mask_update()
        layer.pruning_obj.weight_mask_op()
sparsity.strip_pruning(model).save(target, include_optimizer=False)
os.fsync(os.open(target, os.O_RDONLY))
"""
_MAKE_H5 = """
import sys, tf_keras
k = tf_keras.layers
model = tf_keras.Sequential([k.Input((4096,)), *(k.Dense(4096, use_bias=False) for _ in range(4))])
model.save(sys.argv[1])
"""
_ONNXSIM = """
import os, sys, onnx, onnxsim
source, target = sys.argv[1:]
model = onnxsim.apply_magnitude_pruning(onnx.load(source), sparsity=0.5)
onnx.save(model[0] if isinstance(model, tuple) else model, target)
os.fsync(os.open(target, os.O_RDONLY))
"""


def run() -> None:
    """Print the table of all formats, and the memory that a file of four gigabytes takes."""
    head = ("file", "peer", "prunectl", "ratio", "`cp` and sync", "prunectl to `cp`", "prunectl's peak")
    with tempfile.TemporaryDirectory(prefix="prunectl-bench-") as scratch:
        folder = Path(scratch)
        show("Pruning, beside its peers (goals: 20x, 3 times `cp`, 200 MB)", head, list(_rows(folder)))
        show("Memory does not grow with the file", ("file", "time", "peak"), [_big(folder)])


def _rows(folder: Path) -> Iterator[tuple[str, ...]]:
    global_80, by_layer = ["-s", "0.8", "--scope", "global"], ["-s", "0.8", "--scope", "layer"]
    path = _state(folder / "model.pt", LAYERS)
    yield _row(path, "torch: global_unstructured, remove, save", [PYTHON, "-c", _TORCH], global_80, runs=1)
    path = folder / "model.safetensors"
    save_file(torch.load(folder / "model.pt", weights_only=True), path)
    yield _row(path, "", None, global_80, runs=3)
    for used in (folder / "model.pt", path):
        used.unlink()
    path = folder / "model.h5"
    cost([PYTHON, "-c", _MAKE_H5, str(path)], runs=1)
    yield _row(path, "tfmot: wrap, mask, strip, save", [PYTHON, "-c", _TFMOT], by_layer, runs=1)
    path.unlink()
    path = _network(folder / "model.onnx")
    surgeon = [str(BIN / "polygraphy"), "surgeon", "prune"]
    yield _row(path, "polygraphy surgeon prune (2:4)", surgeon, ["--pattern", "2:4"], runs=1, flag="-o")
    yield _row(path, "onnxsim.apply_magnitude_pruning", [PYTHON, "-c", _ONNXSIM], ["-s", "0.5", *by_layer[2:]], runs=1)


def _row(path: Path, peer: str, words: list[str] | None, how: list[str], runs: int, flag: str = "") -> tuple[str, ...]:
    out = path.with_name(f"out{path.suffix}")
    theirs = cost([*words, str(path), *filter(None, [flag]), str(out)], runs=runs) if words else None
    ours = _pruned(path, how)
    copied = cost(["/bin/sh", "-c", f"cp {path} {out} && sync {out}"], runs=5)
    out.unlink()
    return (
        f"{path.suffix}, {path.stat().st_size / 1e6:.0f} MB",
        f"{peer}: {theirs.seconds:.1f} s, {theirs.peak_bytes / 1e6:.0f} MB" if theirs else "",
        f"{ours.seconds:.2f} s",
        f"{theirs.seconds / ours.seconds:.0f}x" if theirs else "",
        f"{copied.seconds:.2f} s",
        f"{ours.seconds / copied.seconds:.1f}",
        f"{ours.peak_bytes / 1e6:.0f} MB",
    )


def _pruned(path: Path, how: list[str], runs: int = 5) -> Cost:
    return cost(
        [PRUNECTL, "prune", str(path), "-o", str(path.with_name(f"out{path.suffix}")), "--force", "-q", *how], runs
    )


def _big(folder: Path) -> tuple[str, ...]:
    path = _state(folder / "big.pt", 64)
    found = _pruned(path, ["-s", "0.8", "--scope", "global"], runs=1)
    return (f".pt, {path.stat().st_size / 1e6:.0f} MB", f"{found.seconds:.1f} s", f"{found.peak_bytes / 1e6:.0f} MB")


def _state(path: Path, layers: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(SIDE, SIDE, generator=generator)
    torch.save({f"layers.{number}.weight": one * (1 + number / 100) for number in range(layers)}, path)
    return path


def _network(path: Path) -> Path:
    """Write a network of a ResNet-18's size: convolutions of 3x3, 11 million weights."""
    random = np.random.default_rng(0)
    widths = [64, 128, 256, 512, 512, 512, 512]
    nodes, weights = [], []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        array = random.standard_normal((outputs, inputs, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{number}"))
        nodes.append(helper.make_node("Conv", [f"x{number}", f"w{number}"], [f"x{number + 1}"], f"conv{number}"))
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x0", floats, [1, 64, 32, 32])],
        [helper.make_tensor_value_info(f"x{len(nodes)}", floats, [1, 512, 20, 20])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
