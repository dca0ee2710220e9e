"""Accuracy without any training: every strategy at every sparsity, on a CNN, a multilayer perceptron and a transformer.

The first two are trained here on Fashion-MNIST; the transformer learns to tell which module of Python's own library a
line of source comes from, from files that ship with Python. 512 examples calibrate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import PRUNECTL, PYTHON, show

DATA = Path(os.environ.get("BENCH_DATA", "../shared/data"))
SAMPLES = 512
SPARSITIES = (0.7, 0.8, 0.9, 0.95)
MODULES = ("argparse", "ast", "datetime", "decimal", "doctest", "inspect", "pickle", "tarfile", "turtle", "typing")
CHARACTERS, LENGTH = 128, 64
METHODS = (
    ("random", ("--strategy", "random")),
    ("magnitude", ()),
    ("magnitude, global", ("--scope", "global")),
    ("lamp, global", ("--strategy", "lamp", "--scope", "global")),
    ("activation-magnitude", ("--strategy", "activation-magnitude")),
    ("magnitude-gradient", ("--strategy", "magnitude-gradient")),
    ("magnitude + repair", ("--repair",)),
    ("obs", ("--strategy", "obs")),
    ("obs + repair", ("--strategy", "obs", "--repair")),
    ("obs, global", ("--strategy", "obs", "--scope", "global")),
    ("obs, global + repair", ("--strategy", "obs", "--scope", "global", "--repair")),
)
_NETS = """
import torch
from torch import nn

def Cnn():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 256), nn.ReLU(), nn.Linear(256, 10))

def Mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(),
                         nn.Linear(256, 10))

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(128, 64), nn.Parameter(torch.zeros(64, 64))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, batch_first=True, norm_first=True) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)
    def forward(self, x):
        h = self.letters(x) + self.places
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))
"""
_TRAIN = """
import sys, torch, numpy as np
folder, name, data, epochs = sys.argv[1:]
sys.path.insert(0, folder)
import nets
torch.manual_seed(0)
net, held = getattr(nets, name)(), np.load(data)
x, y = torch.from_numpy(held["x"]), torch.from_numpy(held["y"].astype("i8"))
x = x[:, None].float() / 255 if x.ndim == 3 else x.long()
optimizer = torch.optim.Adam(net.parameters(), 1e-3)
for epoch in range(int(epochs)):
    for rows in torch.randperm(len(x)).split(128):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
torch.save(net.state_dict(), f"{folder}/{name}.pt")
"""


_JUDGE = """
import json, sys, torch, numpy as np
folder, name, data, *models = sys.argv[1:]
sys.path.insert(0, folder)
import nets
held = np.load(data)
x, y = torch.from_numpy(held["x"]), torch.from_numpy(held["y"].astype("i8"))
x = x[:, None].float() / 255 if x.ndim == 3 else x.long()
found = []
for model in models:
    net = getattr(nets, name)().eval()
    net.load_state_dict(torch.load(model, weights_only=True))
    with torch.no_grad():
        right = sum(int((net(part).argmax(1) == of).sum()) for part, of in zip(x.split(1000), y.split(1000)))
    found.append(right / len(x))
print(json.dumps(found))
"""


def _text(folder: Path) -> None:
    """Write lines of Python's library, letter by letter, with the number of the module they come from."""
    rows, labels = [], []
    for number, name in enumerate(MODULES):
        source = (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_bytes()
        letters = np.minimum(np.frombuffer(source, np.uint8), CHARACTERS - 1)
        for begin in range(0, len(letters) - LENGTH, LENGTH // 2):
            rows.append(letters[begin : begin + LENGTH])
            labels.append(number)
    order = np.random.default_rng(0).permutation(len(rows))
    x, y = np.stack(rows)[order].astype(np.int64), np.array(labels, np.int64)[order]
    cut = len(x) * 4 // 5
    np.savez(folder / "text_train.npz", x=x[:cut], y=y[:cut])
    np.savez(folder / "text_test.npz", x=x[cut:], y=y[cut:])


def _accuracies(folder: Path, net: str, test: Path, models: list[Path]) -> list[float]:
    out = _run(PYTHON, "-c", _JUDGE, folder, net, test, *models)
    found: list[float] = json.loads(out.splitlines()[-1])
    return found


def _run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def run() -> None:
    """Print a table for each network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "nets.py").write_text(_NETS)
        _text(folder)
        fashion = [DATA / f"fashion_{part}.npz" for part in ("train", "test")]
        text = [folder / f"text_{part}.npz" for part in ("train", "test")]
        for net, (train, test), epochs in (("Cnn", fashion, 3), ("Mlp", fashion, 5), ("Text", text, 4)):
            if not train.is_file():
                print(f"calibration: {train} is not there, nothing to train {net} on")
                continue
            _run(PYTHON, "-c", _TRAIN, folder, net, train, epochs)
            options = "?norm=unit" if train in fashion else ""
            _table(folder, net, f"{train}{options}", test)


def _table(folder: Path, net: str, train: str, test: Path) -> None:
    model = folder / f"{net}.pt"
    own = ("--model", f"{folder / 'nets.py'}:{net}")
    made = [model]
    for _, words in METHODS:
        for sparsity in SPARSITIES:
            looks = {"--repair", "activation-magnitude", "magnitude-gradient", "obs"} & set(words)
            data = ("--data", train, "--samples", SAMPLES, "--batch-size", "128", *own) if looks else ()
            made.append(folder / f"{net}-{len(made)}.pt")
            _run(PRUNECTL, "prune", model, "-o", made[-1], "-s", sparsity, *words, *data)
    dense, *found = (f"{one:.2%}" for one in _accuracies(folder, net, test, made))
    width = len(SPARSITIES)
    rows = [(title, *found[at * width : (at + 1) * width]) for at, (title, _) in enumerate(METHODS)]
    heads = tuple(f"{sparsity:.0%}" for sparsity in SPARSITIES)
    show(f"calibration: {net}, dense {dense}, {SAMPLES} examples, no training", ("method", *heads), rows)
