"""Accuracy without any training: every strategy at every sparsity, on a CNN, a multilayer perceptron and a transformer.

The first two are trained here on Fashion-MNIST; the transformer learns to tell which module of Python's own library
some words of source come from, in files that ship with Python. 512 examples calibrate. Rows come on stderr as they are
measured, since all of them take a while.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np

from benchmarks.timing import PRUNECTL, PYTHON, output_of, show

DATA = Path(os.environ.get("BENCH_DATA", "../shared/data"))
SEEDS = int(os.environ.get("BENCH_SEEDS", "3"))
SAMPLES = 512
SPARSITIES = (0.7, 0.8, 0.9, 0.95)
MODULES = ("argparse", "ast", "datetime", "_pydecimal", "doctest", "inspect", "pickle", "tarfile", "turtle", "typing")
WORDS, LENGTH, BLOCK = 2048, 32, 256
"""Numbers that words are hashed to, words in an example, and words in a run that is for training or for testing."""
EPOCHS = {"Cnn": 3, "Mlp": 5, "Text": 4}
SCOPES_EPOCHS = {**EPOCHS, "Resnet": 4}
MATCHED_EPOCHS = {**SCOPES_EPOCHS, "Article": 10}
LOOKED_UP = ("--exclude", "words*", "--exclude", "places*")
"""Tensors whose rows are looked up: they meet no inputs, and all methods leave them whole."""
_LAYER, _GLOBAL = ("--scope", "layer"), ("--scope", "global")
METHODS = (
    ("random", ("--strategy", "random")),
    ("magnitude", _LAYER),
    ("magnitude, global", _GLOBAL),
    ("lamp, global", ("--strategy", "lamp", *_GLOBAL)),
    ("activation-magnitude", ("--strategy", "activation-magnitude")),
    ("magnitude-gradient", ("--strategy", "magnitude-gradient", *_LAYER)),
    ("activation-magnitude, global", ("--strategy", "activation-magnitude", *_GLOBAL)),
    ("magnitude-gradient, global", ("--strategy", "magnitude-gradient", *_GLOBAL)),
    ("magnitude + repair", (*_LAYER, "--repair")),
    ("obs", ("--strategy", "obs")),
    ("obs + repair", ("--strategy", "obs", "--repair")),
    ("obs, global", ("--strategy", "obs", *_GLOBAL)),
    ("obs, global + repair", ("--strategy", "obs", *_GLOBAL, "--repair")),
    ("alps", ("--strategy", "alps")),
    ("alps, global", ("--strategy", "alps", *_GLOBAL)),
)
SCOPED = (0.5, 0.8, 0.9, 0.95)
MATCHED = {
    "Mlp": ((0.95, 4096), (0.98, 4096), (0.95, 512), (0.98, 512)),
    "Text": ((0.8, 4096), (0.9, 4096)),
    "Resnet": ((0.8, 4096),),
    "Cnn": ((0.95, 4096), (0.95, 512)),
    "Article": ((0.875, 4096), (0.95, 4096), (0.98, 4096)),
}
"""Sparsities that ruin the networks, and by how many examples they are matched."""
Figures = tuple[float, ...]
"""Accuracy of the dense model, as pruned, as matched, and as matched after `alps`; seconds of the last two."""
_NETS = """
import torch
from torch import nn

def Cnn():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 256), nn.ReLU(), nn.Linear(256, 10))

def Article():
    return Cnn()

def Mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(),
                         nn.Linear(256, 10))

class Unit(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    def forward(self, x):
        return torch.relu(self.norm2(self.second(torch.relu(self.norm1(self.first(x))))) + self.down(x))

def Resnet():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Unit(16, 16, 1), Unit(16, 32, 2),
        Unit(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(2048, 64), nn.Embedding(32, 64)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, batch_first=True, norm_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)
    def forward(self, x):
        h = self.words(x) + self.places.weight
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))
"""
_TRAIN = """
import sys, torch, numpy as np
folder, name, data, epochs, seed = sys.argv[1:]
sys.path.insert(0, folder)
import nets
torch.manual_seed(int(seed))
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
    """Write words of Python's library as numbers, with the number of the module they come from.

    Examples for training overlap; those for testing come from runs of words that training never sees.
    """
    found: dict[str, tuple[list[list[int]], list[int]]] = {"train": ([], []), "test": ([], [])}
    for number, name in enumerate(MODULES):
        source = (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text(encoding="utf-8")
        words = [crc32(word.encode()) % WORDS for word in re.findall(r"\w+|[^\w\s]", source)]
        for block, begin in enumerate(range(0, len(words) - BLOCK, BLOCK)):
            part, step = ("test", LENGTH) if block % 5 == 4 else ("train", LENGTH // 4)
            rows, labels = found[part]
            for at in range(begin, begin + BLOCK - LENGTH + 1, step):
                rows.append(words[at : at + LENGTH])
                labels.append(number)
    for part, (rows, labels) in found.items():
        np.savez(folder / f"text_{part}.npz", x=np.array(rows, np.int64), y=np.array(labels, np.int64))


def _accuracies(folder: Path, net: str, test: Path, models: list[Path]) -> list[float]:
    out = output_of(PYTHON, "-c", _JUDGE, folder, net, test, *models)
    found: list[float] = json.loads(out.splitlines()[-1])
    return found


def _trained(nets: Sequence[str], epochs: Mapping[str, int], seed: int = 0) -> Iterator[tuple[str, Path, str, Path]]:
    """Train networks, each in a folder of its own; their names, the folder, the data to learn from and to test on."""
    for net in nets:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "nets.py").write_text(_NETS)
            home, kind, options = DATA, "fashion", "?norm=unit"
            if net == "Text":
                home, kind, options = folder, "text", ""
                _text(folder)
            train, test = home / f"{kind}_train.npz", home / f"{kind}_test.npz"
            if not train.is_file():
                print(f"{train} is not there, nothing to train {net} on")
                continue
            output_of(PYTHON, "-c", _TRAIN, folder, net, train, epochs[net], seed)
            yield net, folder, f"{train}{options}", test


def run(nets: Sequence[str] = tuple(EPOCHS)) -> None:
    """Print a table for each network."""
    for net, folder, train, test in _trained(nets, EPOCHS):
        _table(folder, net, train, test)


def _table(folder: Path, net: str, train: str, test: Path) -> None:
    model = folder / f"{net}.pt"
    (dense,) = _accuracies(folder, net, test, [model])
    _tell(f"{net}, dense {dense:.2%}")
    rows = []
    for title, words in METHODS:
        made = [_pruned(model, folder, net, train, sparsity, words) for sparsity in SPARSITIES]
        rows.append((title, *(f"{one:.2%}" for one in _accuracies(folder, net, test, made))))
        _tell(f"{net}, " + ", ".join(rows[-1]))
    heads = tuple(f"{sparsity:.0%}" for sparsity in SPARSITIES)
    show(f"calibration: {net}, dense {dense:.2%}, {SAMPLES} examples, no training", ("method", *heads), rows)


def matched(nets: Sequence[str] = tuple(MATCHED)) -> None:
    """Print what magnitude loses, and what matching the dense outputs wins back of it and after `alps`."""
    rows: dict[tuple[str, ...], list[Figures]] = {}
    for seed in range(SEEDS):
        for net, folder, train, test in _trained(nets, MATCHED_EPOCHS, seed):
            for row, figures in _match(folder, net, train, test):
                _tell(f"seed {seed}: {', '.join(row)}: {figures}")
                rows.setdefault(row, []).append(figures)
    show(
        f"matching: no labels, means of {SEEDS} seeds",
        ("net", "sparsity", "examples", "dense", "magnitude", "matched", "alps, matched", "processor", "with alps"),
        [(*row, *_mean_of(figures)) for row, figures in rows.items()],
    )


def scopes(nets: Sequence[str] = tuple(SCOPES_EPOCHS)) -> None:
    """Print what magnitude loses in each scope."""
    rows: list[tuple[str, ...]] = []
    for net, folder, train, test in _trained(nets, SCOPES_EPOCHS):
        rows += _by_scope(folder, net, train, test)
    show("scopes: magnitude, no data", ("net", "scope", *(f"{sparsity:.0%}" for sparsity in SCOPED)), rows)


def _by_scope(folder: Path, net: str, train: str, test: Path) -> list[tuple[str, ...]]:
    model = folder / f"{net}.pt"
    rows = [(net, f"dense {_accuracies(folder, net, test, [model])[0]:.2%}", *("",) * len(SCOPED))]
    for title, words in (
        ("layer", _LAYER),
        ("global", _GLOBAL),
        ("erk", ("--scope", "erk")),
        ("lamp, global", ("--strategy", "lamp", *_GLOBAL)),
    ):
        made = [_pruned(model, folder, net, train, sparsity, words) for sparsity in SCOPED]
        rows.append((net, title, *(f"{one:.2%}" for one in _accuracies(folder, net, test, made))))
    return rows


def _match(folder: Path, net: str, train: str, test: Path) -> Iterator[tuple[tuple[str, str, str], Figures]]:
    model = folder / f"{net}.pt"
    for sparsity, samples in MATCHED[net]:
        # Renamed, since the next has the same name.
        once = _pruned(model, folder, net, train, sparsity, _GLOBAL).rename(folder / "once.pt")
        accuracies, seconds = _accuracies(folder, net, test, [model, once]), []
        for ranked in ((), ("--strategy", "alps")):
            before = os.times()
            made = _pruned(model, folder, net, train, sparsity, (*ranked, *_GLOBAL, "--repair", "outputs"), samples)
            after = os.times()
            seconds.append(sum(after[2:4]) - sum(before[2:4]))
            accuracies += _accuracies(folder, net, test, [made])
        yield (net, f"{sparsity:.1%}", f"{samples:,}"), (*accuracies, *seconds)


def _pruned(
    model: Path, folder: Path, net: str, train: str, sparsity: float, words: tuple[str, ...], samples: int = SAMPLES
) -> Path:
    looks = {"--repair", "activation-magnitude", "magnitude-gradient", "obs", "alps"} & set(words)
    own = ("--builder", f"{folder / 'nets.py'}:{net}")
    size = () if "outputs" in words else ("--batch-size", "128")
    data = ("--data", train, "--samples", samples, *size, *own) if looks else ()
    made = folder / f"{net}-{sparsity}.pt"
    left = LOOKED_UP if net == "Text" else ()
    output_of(PRUNECTL, "prune", model, "-o", made, "--force", "--allow-empty", "-s", sparsity, *words, *left, *data)
    return made


def _mean_of(figures: list[Figures]) -> tuple[str, ...]:
    *accuracies, plain, with_alps = np.mean(figures, axis=0)
    return (*(f"{accuracy:.2%}" for accuracy in accuracies), f"{plain:.0f} s", f"{with_alps:.0f} s")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
