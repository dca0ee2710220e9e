"""What it costs to look at data: a network of the size of ResNet-50 on 128 images, beside a forward pass alone.

Fitting layers anew is measured on one with an eighth of the widths, and on the whole one with small images on one and
two threads, which have to write the same bytes. PRUNECTL_BEFORE may name the folder of another
commit (`git worktree add FOLDER COMMIT`): what that takes stands beside it, measured in turns.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import PRUNECTL, PYTHON, Cost, cost, show

IMAGES, BATCH = 128, 32
_NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, inside, width, stride):
        super().__init__()
        out = width * 4
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))
        self.side = nn.Identity() if inside == out and stride == 1 else nn.Sequential(
            nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    def forward(self, x):
        return torch.relu(self.body(x) + self.side(x))

def Net(width=64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = width
    for count, stride in ((3, 1), (4, 2), (6, 2), (3, 2)):
        for number in range(count):
            layers.append(Block(inside, width, stride if number == 0 else 1))
            inside = width * 4
        width *= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))

def Small():
    return Net(8)
"""
_FORWARD = """
import sys, numpy as np, torch
folder, name, data, batch = sys.argv[1:]
sys.path.insert(0, folder)
import net as nets
net = getattr(nets, name)().eval()
net.load_state_dict(torch.load(f"{folder}/{name}.pt", weights_only=True))
x = torch.from_numpy(np.load(data)["x"])
with torch.no_grad():
    for rows in x.split(int(batch)):
        net(rows)
"""
_SAVE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import net
torch.save(getattr(net, sys.argv[2])().state_dict(), f"{sys.argv[1]}/{sys.argv[2]}.pt")
"""


_SCORES = tuple((name, ("--strategy", name)) for name in ("activation-magnitude", "magnitude-gradient"))
_FITS = (
    ("obs", ("--strategy", "obs")),
    ("magnitude + repair", ("--scope", "layer", "--repair")),
    ("obs, global + repair", ("--strategy", "obs", "--scope", "global", "--repair")),
)


def run() -> None:
    """Print seconds and memory of each whole command, and ratios to the forward pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.py").write_text(_NET)
        for net, pixels, title, ways in (
            ("Net", 224, "calibrating a ResNet-50 on", _SCORES),
            ("Small", 64, "fitting a ResNet-50 of an eighth of the widths to", _FITS),
        ):
            images = np.random.default_rng(0).standard_normal((IMAGES, 3, pixels, pixels), np.float32)
            np.savez(folder / "images.npz", x=images, y=np.arange(IMAGES) % 1000)
            _measure(folder, net, f"{title} {IMAGES} images of {pixels}x{pixels}", ways)
        _measure_threads(folder)


def _measure(folder: Path, net: str, title: str, ways: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    subprocess.run([PYTHON, "-c", _SAVE, str(folder), net], check=True, capture_output=True)
    model, data, before = folder / f"{net}.pt", str(folder / "images.npz"), os.environ.get("PRUNECTL_BEFORE")
    forward = cost([PYTHON, "-c", _FORWARD, str(folder), net, data, str(BATCH)], runs=2)
    rows = [("forward pass", f"{forward.seconds:.1f} s", "1.0", _size(forward), *(("",) if before else ()))]
    for way, options in ways:
        words = ["prune", str(model), "-o", str(folder / "out.pt"), "--force", "-s", "0.8", *options]
        words += ["--data", data, "--builder", f"{folder / 'net.py'}:{net}", "--batch-size", str(BATCH)]
        found = cost([PRUNECTL, *words], runs=2)
        ratio = f"{found.seconds / forward.seconds:.1f}"
        row = (way, f"{found.seconds:.1f} s", ratio, _size(found))
        if before:
            theirs = cost(["/usr/bin/env", f"PYTHONPATH={before}", PRUNECTL, *words], runs=2)
            row += (f"{theirs.seconds:.1f} s ({theirs.seconds / found.seconds:.1f}x), {_size(theirs)}",)
        rows.append(row)
    show(title, ("command", "time", "ratio", "memory", *(("before",) if before else ())), rows)


def _measure_threads(folder: Path) -> None:
    """Print what `obs` takes of the whole network on one and two threads; the images are those of the last table."""
    rows, written = [], []
    for threads in (1, 2):
        output = folder / f"on{threads}.pt"
        words = ["prune", str(folder / "Net.pt"), "-o", str(output), "-s", "0.8", "--strategy", "obs"]
        words += ["--data", str(folder / "images.npz"), "--builder", f"{folder / 'net.py'}:Net"]
        words += ["--batch-size", str(BATCH)]
        found = cost(["/usr/bin/env", f"OMP_NUM_THREADS={threads}", PRUNECTL, *words], runs=1)
        written.append(output.read_bytes())
        times = (f"{found.seconds:.1f} s", f"{found.processor:.1f} s")
        rows.append((str(threads), *times, _size(found), str(written[0] == written[-1])))
    show(
        f"obs of a ResNet-50 on {IMAGES} images of 64x64",
        ("threads", "time", "processor", "memory", "same bytes"),
        rows,
    )


def _size(found: Cost) -> str:
    return f"{found.peak_bytes / 1e6:,.0f} MB"
