"""What it costs to look at data: a network of the size of ResNet-50 on 128 images, beside a forward pass alone."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import PRUNECTL, PYTHON, cost, show

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

def Net():
    torch.manual_seed(0)
    layers, inside = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            layers.append(Block(inside, width, stride if number == 0 else 1))
            inside = width * 4
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
"""
_FORWARD = """
import sys, numpy as np, torch
folder, data, batch = sys.argv[1:]
sys.path.insert(0, folder)
from net import Net
net = Net().eval()
net.load_state_dict(torch.load(folder + "/net.pt", weights_only=True))
x = torch.from_numpy(np.load(data)["x"])
with torch.no_grad():
    for rows in x.split(int(batch)):
        net(rows)
"""
_SAVE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from net import Net
torch.save(Net().state_dict(), sys.argv[2])
"""


def run() -> None:
    """Print seconds and memory of each whole command, and ratios to the forward pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.py").write_text(_NET)
        model, data = folder / "net.pt", folder / "images.npz"
        subprocess.run([PYTHON, "-c", _SAVE, str(folder), str(model)], check=True, capture_output=True)
        images = np.random.default_rng(0).standard_normal((IMAGES, 3, 224, 224), np.float32)
        np.savez(data, x=images, y=np.arange(IMAGES) % 1000)
        forward = cost([PYTHON, "-c", _FORWARD, str(folder), str(data), str(BATCH)], runs=2)
        rows = [("forward pass", f"{forward.seconds:.1f} s", "1.0", f"{forward.peak_bytes / 1e6:,.0f} MB")]
        own = ["--data", str(data), "--model", f"{folder / 'net.py'}:Net", "--batch-size", str(BATCH)]
        for strategy in ("activation-magnitude", "magnitude-gradient"):
            words = ["prune", str(model), "-o", str(folder / "out.pt"), "--force", "-s", "0.8", "--strategy", strategy]
            found = cost([PRUNECTL, *words, *own], runs=2)
            ratio = f"{found.seconds / forward.seconds:.1f}"
            rows.append((strategy, f"{found.seconds:.1f} s", ratio, f"{found.peak_bytes / 1e6:,.0f} MB"))
    show(f"calibrating a ResNet-50 on {IMAGES} images", ("command", "time", "ratio", "memory"), rows)
