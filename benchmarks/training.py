"""Pruning while training on Fashion-MNIST, beside tfmot's own script and beside no pruning at all.

The network is that of the article that made tfmot's schedules known: Conv 32, Conv 64, Dense 256; batches of 250, Adam.
It takes hours on two cores: BENCH_EPOCHS, BENCH_SEEDS and BENCH_EXAMPLES make it shorter, and the table says so.
BENCH_KEPT names a file in which each run is noted, so that a benchmark that was cut short goes on where it was.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import PRUNECTL, PYTHON, output_of

DATA = Path(os.environ.get("BENCH_DATA", "../shared/data"))
EPOCHS = int(os.environ.get("BENCH_EPOCHS", "10"))
SEEDS = int(os.environ.get("BENCH_SEEDS", "3"))
EXAMPLES = int(os.environ.get("BENCH_EXAMPLES", "60000"))
KEPT = os.environ.get("BENCH_KEPT", "")
BATCH = 250
SPARSITY = 0.875
FRAMEWORKS = {".h5": "Keras 2", ".keras": "Keras 3", ".pt": "PyTorch"}

_BUILD_KERAS = """
def build(k):
    return k.Sequential([
        k.layers.Input((28, 28, 1)),
        k.layers.Conv2D(32, 3, activation="relu"), k.layers.MaxPooling2D(),
        k.layers.Conv2D(64, 3, activation="relu"), k.layers.MaxPooling2D(),
        k.layers.Flatten(), k.layers.Dense(256, activation="relu"), k.layers.Dense(10, activation="softmax")])
"""
TORCH_NET = """
import torch
from torch import nn
def Net():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 256), nn.ReLU(), nn.Linear(256, 10))
"""
START = (
    _BUILD_KERAS
    + """
import sys, numpy as np
folder, seed, trained = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
import tf_keras
tf_keras.utils.set_random_seed(seed)
model = build(tf_keras)
if trained:
    model.load_weights(trained[0])
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.save(folder + "/start.h5")
weights = model.get_weights()
import keras
three = build(keras)
three.set_weights(weights)
three.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
three.save(folder + "/start.keras")
import torch
sys.path.insert(0, folder)
from net import Net
net = Net()
with torch.no_grad():
    for at, layer in ((0, 0), (2, 3)):
        net[layer].weight.copy_(torch.from_numpy(weights[at].transpose(3, 2, 0, 1).copy()))
    # Flattened channels first here, channels last there.
    dense = weights[4].reshape(5, 5, 64, 256).transpose(3, 2, 0, 1).reshape(256, 1600)
    net[7].weight.copy_(torch.from_numpy(dense.copy()))
    net[9].weight.copy_(torch.from_numpy(weights[6].T.copy()))
    for at, layer in ((1, 0), (3, 3), (5, 7), (7, 9)):
        net[layer].bias.copy_(torch.from_numpy(weights[at].copy()))
torch.save(net.state_dict(), folder + "/start.pt")
"""
)
_TFMOT = """
import json, sys, time, numpy as np, tf_keras
import tensorflow_model_optimization as tfmot
source, target, train, test, schedule, sparsity, epochs, batch, limit, seed = sys.argv[1:]
sparsity, epochs, batch, limit = float(sparsity), int(epochs), int(batch), int(limit)
tf_keras.utils.set_random_seed(int(seed))
data, judge = np.load(train), np.load(test)
x, y = data["x"][:limit, ..., None].astype("f4") / 255, data["y"][:limit].astype("i8")
model = tf_keras.models.load_model(source)
steps = -(-len(x) // batch) * epochs
s = tfmot.sparsity.keras
callbacks = []
if schedule != "dense":
    ramp = (s.ConstantSparsity(sparsity, int(0.2 * steps), frequency=100) if schedule == "constant"
            else s.PolynomialDecay(0.0, sparsity, int(0.2 * steps), steps, frequency=100))
    model = s.prune_low_magnitude(model, pruning_schedule=ramp)
    callbacks = [s.UpdatePruningStep()]
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
began = time.time()
model.fit(x, y, batch_size=batch, epochs=epochs, callbacks=callbacks, verbose=0)
took = time.time() - began
if schedule != "dense":
    model = s.strip_pruning(model)
model.save(target, include_optimizer=False)
# By hand: a model that is saved before it has seen a target takes accuracy for that of one-hot targets.
right = model.predict(judge["x"][..., None].astype("f4") / 255, verbose=0).argmax(1) == judge["y"]
kernels = [w for layer in model.layers for w in layer.get_weights() if w.ndim > 1]
print(json.dumps({"accuracy": right.mean(), "seconds": took,
    "sparsity": sum((w == 0).sum() for w in kernels) / sum(w.size for w in kernels)}, default=float))
"""


def _spec(name: str, *, limit: int = 0) -> str:
    return f"{DATA / name}?norm=unit" + (f"&limit={limit}" if limit else "")


def _by_tfmot(folder: Path, schedule: str, seed: int, sparsity: float = SPARSITY) -> dict[str, float]:
    target = folder / "tfmot.h5"
    words = (DATA / "fashion_train.npz", DATA / "fashion_test.npz", schedule, sparsity, EPOCHS, BATCH, EXAMPLES, seed)
    out = output_of(PYTHON, "-c", _TFMOT, folder / "start.h5", target, *words)
    return {**json.loads(out.splitlines()[-1]), "gzip": _gzip(target)}


def _gzip(path: Path) -> int:
    return len(gzip.compress(path.read_bytes(), 6, mtime=0))


def _ours(folder: Path, suffix: str, seed: int, *words: object) -> dict[str, float]:
    target = folder / f"ours{suffix}"
    own = ["--builder", f"{folder / 'net.py'}:Net"] if suffix == ".pt" else []
    out = output_of(
        *(PRUNECTL, "finetune", folder / f"start{suffix}", "-o", target, "--force", "--json", "--keep", "last"),
        *("--data", _spec("fashion_train.npz", limit=EXAMPLES), "--val", _spec("fashion_test.npz")),
        *("--epochs", EPOCHS, "--batch-size", BATCH, "--seed", seed, *own, *words),
    )
    found = json.loads(out)["models"][1]
    stripped = folder / f"stripped{suffix}"
    output_of(PRUNECTL, "strip", target, "-o", stripped, "--force")
    training = found["training"]
    return {
        "accuracy": training["after"]["accuracy"],
        "sparsity": found["params"]["prunable_zero"] / found["params"]["prunable"],
        "gzip": _gzip(stripped),
        "kept": training["zeros_kept"] / training["zeros"] if training["zeros"] else 1.0,
    }


def _schedule(name: str, sparsity: float = SPARSITY, *more: str) -> tuple[object, ...]:
    ends = ("--end", "100%") if name == "polynomial" else ()
    scope = () if "--scope" in more else ("--scope", "layer")
    return ("-s", sparsity, "--schedule", name, "--begin", "20%", *ends, "--frequency", 100, *scope, *more)


def run() -> None:
    """Print the table with the columns that tfmot's own issue asks for."""
    if not (DATA / "fashion_train.npz").is_file():
        print(f"training: {DATA} has no fashion_train.npz, nothing to train on")
        return
    print(f"## training: Fashion-MNIST, {EXAMPLES} examples, {EPOCHS} epochs, {SEEDS} seeds")
    rows: dict[str, list[dict[str, float]]] = {}
    for fill in (_fill, _fill_higher, _fill_from_dense):
        for seed in range(SEEDS):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "net.py").write_text(TORCH_NET)
                output_of(PYTHON, "-c", START, folder, seed)
                fill(_Runs(folder, seed, rows), seed)
    dense = rows["dense, tf_keras"]
    base, base_gzip = statistics.mean(row["accuracy"] for row in dense), statistics.mean(row["gzip"] for row in dense)
    print("| method | baseline accuracy | accuracy | baseline gzip | gzip | of it | sparsity | zeros kept |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method, found in rows.items():
        mean = {key: statistics.mean(row[key] for row in found) for key in found[0]}
        kept = f"{mean['kept']:.0%}" if "kept" in mean else "-"
        print(
            f"| {method} | {base:.4f} | {mean['accuracy']:.4f} | {base_gzip:,.0f} | {mean['gzip']:,.0f} "
            f"| {mean['gzip'] / base_gzip:.2f} | {mean['sparsity']:.4f} | {kept} |"
        )


class _Runs:
    """Runs with one seed; those that were noted are not made again."""

    def __init__(self, folder: Path, seed: int, rows: dict[str, list[dict[str, float]]]) -> None:
        self._folder, self._seed, self._rows = folder, seed, rows
        self._kept = _kept()

    def add(self, method: str, run: Callable[..., dict[str, float]], *words: object) -> None:
        """Add a run to its row."""
        key = f"{method}, seed {self._seed}, {EPOCHS} epochs, {EXAMPLES} examples"
        if key not in self._kept:
            self._kept[key] = run(self._folder, *words)
            # It takes hours, and an interrupted run shall not have been for nothing.
            print(f"{key}: {self._kept[key]}", file=sys.stderr, flush=True)
            if KEPT:
                with Path(KEPT).open("a") as notes:
                    notes.write(json.dumps([key, self._kept[key]]) + "\n")
        self._rows.setdefault(method, []).append(self._kept[key])

    def train_dense(self) -> None:
        """Let what follows begin with a network that was trained without pruning."""
        _by_tfmot(self._folder, "dense", self._seed)
        output_of(PYTHON, "-c", START, self._folder, self._seed, self._folder / "tfmot.h5")


def _fill(runs: _Runs, seed: int) -> None:
    runs.add("dense, tf_keras", _by_tfmot, "dense", seed)
    for schedule in ("constant", "polynomial"):
        runs.add(f"{schedule} 87.5 %, tfmot", _by_tfmot, schedule, seed)
        for suffix, name in FRAMEWORKS.items():
            runs.add(f"{schedule} 87.5 %, prunectl {name}", _ours, suffix, seed, *_schedule(schedule))


def _fill_higher(runs: _Runs, seed: int) -> None:
    for sparsity in (0.95, 0.98):
        runs.add(f"polynomial {sparsity:.0%}, tfmot", _by_tfmot, "polynomial", seed, sparsity)
        for how in (("--scope", "global"), ("--strategy", "lamp", "--scope", "global")):
            words = _schedule("polynomial", sparsity, *how)
            runs.add(f"polynomial {sparsity:.0%}, prunectl {' '.join(how)}", _ours, ".keras", seed, *words)


def _fill_from_dense(runs: _Runs, seed: int) -> None:
    runs.train_dense()
    for sparsity in (0.875, 0.95, 0.98):
        runs.add(f"from dense {sparsity:.1%}, tfmot", _by_tfmot, "polynomial", seed, sparsity)
        suffixes = {".keras": "Keras 3"} if sparsity > SPARSITY else FRAMEWORKS
        for suffix, name in suffixes.items():
            runs.add(f"from dense {sparsity:.1%}, prunectl {name}", _ours, suffix, seed, "-s", sparsity)


def _kept() -> dict[str, dict[str, float]]:
    if not KEPT or not Path(KEPT).is_file():
        return {}
    return dict(json.loads(line) for line in Path(KEPT).read_text().splitlines())
