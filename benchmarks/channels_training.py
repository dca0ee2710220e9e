"""A slim ResNet-18 on Fashion-MNIST, its FLOPs halved by cutting channels, then trained on.

BENCH_EPOCHS and BENCH_EXAMPLES make it shorter, and the table says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import PRUNECTL, PYTHON, QUIET, show

DATA = Path(os.environ.get("BENCH_DATA", "../shared/data"))
EPOCHS = int(os.environ.get("BENCH_EPOCHS", "5"))
EXAMPLES = int(os.environ.get("BENCH_EXAMPLES", "60000"))
WIDTH = 8
"""Channels of the first stage; 64 in the paper."""

_NET = f"""
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.short = nn.Identity() if inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    def forward(self, x):
        return torch.relu(self.body(x) + self.short(x))

class Net(nn.Module):
    def __init__(self, width={WIDTH}):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        lengths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(*(
            nn.Sequential(Block(inputs, outputs, 1 if at == 0 else 2), Block(outputs, outputs, 1))
            for at, (inputs, outputs) in enumerate(zip(lengths, lengths[1:]))))
        self.head = nn.Linear(8 * width, 10)
    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))
"""
_START = "import sys, torch; sys.path.insert(0, '.'); torch.manual_seed(0); from net import Net; "
_START += "torch.save(Net().state_dict(), 'start.pt')"


def run() -> None:
    """Train, cut, train on, and show what each step costs and gives."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.py").write_text(_NET)
        subprocess.run([PYTHON, "-c", _START], cwd=folder, check=True, env=os.environ | QUIET)
        dense = _train(folder, "start.pt", "dense.pt", "net.py:Net")
        longer = _train(folder, "dense.pt", "longer.pt", "net.py:Net")
        cut = _said(
            folder,
            *("prune", "dense.pt", "-o", "small.pt", "--builder", "net.py:Net", "--input", "1,1,28,28"),
            *("--pattern", "channel", "--target-flops", "-50%", "--scope", "global", "--latency"),
        )
        kind = next(line for line in (folder / "small.py").read_text().splitlines() if line.startswith("class Net"))
        made = kind.removeprefix("class ").partition("(")[0]
        small = _train(folder, "small.pt", "tuned.pt", f"small.py:{made}")
    before, after = cut["models"]
    seconds = cut["channels"]["seconds"]
    rows = [
        ("dense", _accuracy(dense), *_cost(before), f"{seconds['before'] * 1e3:.2f}"),
        (f"dense, {EPOCHS} epochs more", _accuracy(longer), *_cost(before), ""),
        ("cut", _accuracy(small, "before"), *_cost(after), f"{seconds['after'] * 1e3:.2f}"),
        (f"cut, {EPOCHS} epochs more", _accuracy(small), *_cost(after), ""),
    ]
    title = f"Slim ResNet-18 on {EXAMPLES:,} images of Fashion-MNIST, {EPOCHS} epochs each"
    show(title, ("network", "accuracy", "parameters", "FLOPs", "ms for one image"), rows)


def _train(folder: Path, source: str, output: str, model: str) -> dict[str, Any]:
    data = DATA.resolve()
    return _said(
        folder,
        *("finetune", source, "-o", output, "--builder", model, "--loss", "cross-entropy", "--metric", "accuracy"),
        *("--data", f"{data / 'fashion_train.npz'}?norm=unit&shape=1x28x28&limit={EXAMPLES}"),
        *("--val", f"{data / 'fashion_test.npz'}?norm=unit&shape=1x28x28"),
        *("--epochs", str(EPOCHS), "--batch-size", "128", "--optimizer", "adam", "--lr", "0.002"),
    )


def _said(folder: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [PRUNECTL, *words, "--json"], capture_output=True, text=True, cwd=folder, env=os.environ | QUIET, check=False
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {found['error']}")
    print(words[0], words[1], "done", file=sys.stderr, flush=True)
    return found


def _accuracy(found: dict[str, Any], when: str = "after") -> str:
    return f"{found['models'][1]['training'][when]['accuracy']:.2%}"


def _cost(model: dict[str, Any]) -> tuple[str, str]:
    return f"{model['params']['total']:,}", f"{2 * model['macs'] / 1e6:.2f} M"


if __name__ == "__main__":
    run()
