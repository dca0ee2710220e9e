"""Does `bench` see what is faster, and nothing where nothing is? Pairs of equal files, and a network and its half."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

import prunectl
from benchmarks.nets_torch import lively, resnet18
from benchmarks.timing import PYTHON, show
from prunectl.analysis.timing import Verdict, measure

PAIRS, SECONDS = 25, 1.0
_BUSY = "while True: sum(range(1000))"


def run() -> None:
    """Print how often equal files are called different, and how much faster the half of a network is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _networks(folder)
        rows = [_equal_pairs(path, is_busy=is_busy) for path in files for is_busy in (False, True)]
        show(
            f"{PAIRS} pairs of equal files, {SECONDS:g} s each",
            ("file", "beside a busy process", "called different", "called the same", "left open"),
            rows,
        )
        show("What should be faster", ("network", "measured", "interval", "aim"), [_half(folder), _sparse(folder)])


def _networks(folder: Path) -> list[Path]:
    """Networks of a few milliseconds in different runtimes."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16384, 10)),
    ).eval()
    x = torch.zeros(1, 3, 32, 32)
    torch.export.save(torch.export.export(net, (x,)), folder / "net.pt2")
    torch.jit.trace(net, x).save(folder / "net.torchscript")  # type: ignore[no-untyped-call]
    torch.onnx.export(net, (x,), folder / "net.onnx", dynamo=False, input_names=["x"])
    shutil.copy(Path(__file__).parents[1] / "fixtures" / "digits_cnn.tflite", folder / "net.tflite")
    return [folder / f"net.{end}" for end in ("onnx", "tflite", "pt2", "torchscript")]


def _equal_pairs(path: Path, *, is_busy: bool) -> tuple[str, ...]:
    copy = path.with_stem("copy")
    shutil.copy(path, copy)
    verdicts: Counter[Verdict] = Counter()
    load = subprocess.Popen([PYTHON, "-c", _BUSY]) if is_busy else None
    try:
        for seed in range(PAIRS):
            options = {"input": "x:1,3,32,32"} if path.suffix == ".torchscript" else {}
            result = prunectl.bench(path, copy, seconds=SECONDS, seed=seed, trust=True, **options)
            verdicts[result.latencies[1][1].verdict] += 1
    finally:
        if load is not None:
            load.kill()
    different = verdicts[Verdict.FASTER] + verdicts[Verdict.SLOWER]
    counts = (different, verdicts[Verdict.SAME], verdicts[Verdict.UNCLEAR])
    return (path.suffix, "yes" if is_busy else "no", *map(str, counts))


def _half(folder: Path) -> tuple[str, ...]:
    torch.manual_seed(0)
    dense, half = folder / "dense.onnx", folder / "half.onnx"
    torch.onnx.export(
        lively(resnet18()).eval(),
        (torch.zeros(1, 3, 224, 224),),
        dense,
        dynamo=False,
        input_names=["x"],
        output_names=["y"],
    )
    prunectl.prune(dense, half, sparsity=0.5, pattern="channel")
    speedup = prunectl.bench(dense, half, seconds=20).latencies[1][1].speedup
    interval = f"{speedup.low:.2f} to {speedup.high:.2f}"
    return ("ResNet-18, half of the channels, onnxruntime", f"{speedup.middle:.2f}x", interval, "2.5x")


def _sparse(folder: Path) -> tuple[str, ...]:
    """A network without its zeros beside the dense one, which holds them: how many times as fast."""
    code = folder / "mlp.py"
    code.write_text(_MLP)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code.read_text(), names)
    torch.save(names["Net"]().state_dict(), folder / "mlp.pt")
    pruned = prunectl.prune(folder / "mlp.pt", folder / "zeros.pt", sparsity=0.95)
    prunectl.export(
        pruned.output, folder / "fast.pt", sparse=True, builder=f"{code}:Net", input="x:?,784", batch_size=32
    )
    exec((folder / "fast.py").read_text(), fast := {})
    nets = [names["Net"]().eval(), fast["Net"]().eval()]
    for net, path in zip(nets, (pruned.output, folder / "fast.pt"), strict=True):
        net.load_state_dict(torch.load(path, weights_only=True))
    x = torch.randn(32, 784)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        error = float((nets[0](x) - nets[1](x)).abs().max())
        speedup = measure([partial(net, x) for net in nets], seconds=10)[1].speedup
    torch.set_num_threads(threads)
    interval = f"{speedup.low:.2f} to {speedup.high:.2f}; outputs within {error:.0e}"
    return ("784-1024-1024-10, 95 % zeros, batch 32, PyTorch", f"{speedup.middle:.2f}x", interval, "2.5x, 1e-5")


_MLP = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
"""
