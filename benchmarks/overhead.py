"""What masks cost a training step: the framework's own loop, ours with masks, and tfmot's; in processor time.

On one thread, since the time of several depends on what else the machine does, and without the system's share of it:
that is the page faults of the allocator, which differ threefold between two runs of the same program.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.timing import PYTHON, QUIET, show
from benchmarks.training import DATA, START, TORCH_NET

EXAMPLES, EPOCHS, BATCH = 10_000, 5, 250
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"} | QUIET

_OURS = """
import json, os, statistics, sys
from pathlib import Path
import prunectl.training.finetune as training
from prunectl.pruning.destination import Destination
from prunectl.training.request import parse_request
source, target, data, model, epochs, batch = sys.argv[1:]
ends = []
def watch(moment):
    if moment.step * 1.0 / moment.steps * moment.epochs == len(ends) + 1:
        ends.append(os.times().user)
words = {"data": data, "epochs": int(epochs), "batch_size": int(batch), "sparsity": 0.875, "begin": "10",
         "device": "cpu", "frequency": 100, "builder": model, "keep": "last"}
training.finetune(Path(source), parse_request(words), Destination(Path(target), is_forced=True), watch)
print(json.dumps(statistics.median(later - earlier for earlier, later in zip(ends, ends[1:]))))
"""
_KERAS = """
import json, os, statistics, sys, numpy as np
kind, source, data, epochs, batch, limit = sys.argv[1:]
if kind == "keras":
    import keras as k
else:
    import tf_keras as k
held = np.load(data)
x, y = held["x"][:int(limit), ..., None].astype("f4") / 255, held["y"][:int(limit)].astype("i8")
model = k.models.load_model(source)
callbacks = []
if kind == "tfmot":
    import tensorflow_model_optimization as tfmot
    s = tfmot.sparsity.keras
    steps = len(x) // int(batch) * int(epochs)
    model = s.prune_low_magnitude(model, pruning_schedule=s.PolynomialDecay(0.0, 0.875, 10, int(steps * 0.75)))
    callbacks = [s.UpdatePruningStep()]
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
ends = []
class Clock(k.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        ends.append(os.times().user)
model.fit(x, y, batch_size=int(batch), epochs=int(epochs), callbacks=[*callbacks, Clock()], verbose=0)
print(json.dumps(statistics.median(later - earlier for earlier, later in zip(ends, ends[1:]))))
"""
_TORCH = """
import json, os, statistics, sys, numpy as np, torch
folder, data, epochs, batch, limit = sys.argv[1:]
sys.path.insert(0, folder)
from net import Net
net = Net()
net.load_state_dict(torch.load(folder + "/start.pt", weights_only=True))
held = np.load(data)
x = torch.from_numpy(held["x"][:int(limit), None].astype("f4") / 255)
y = torch.from_numpy(held["y"][:int(limit)].astype("i8"))
optimizer, ends = torch.optim.Adam(net.parameters()), []
for epoch in range(int(epochs)):
    right = 0
    for rows in torch.randperm(len(x)).split(int(batch)):
        optimizer.zero_grad(set_to_none=True)
        out = net(x[rows])
        loss = torch.nn.functional.cross_entropy(out, y[rows])
        loss.backward()
        optimizer.step()
        right += (out.argmax(1) == y[rows]).sum()
    right.item()
    ends.append(os.times().user)
print(json.dumps(statistics.median(later - earlier for earlier, later in zip(ends, ends[1:]))))
"""


def _time(*words: object) -> float:
    done = subprocess.run(
        [PYTHON, "-c", *map(str, words)], capture_output=True, text=True, check=False, env=os.environ | _ONE_THREAD
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(json.loads(done.stdout.splitlines()[-1]))


def run() -> None:
    """Print seconds for an epoch, and ratios to the framework's own loop."""
    train = DATA / "fashion_train.npz"
    if not train.is_file():
        print(f"overhead: {DATA} has no fashion_train.npz, nothing to train on")
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.py").write_text(TORCH_NET)
        subprocess.run([PYTHON, "-c", START, folder, "0"], check=True, capture_output=True)
        data, model = f"{train}?norm=unit&limit={EXAMPLES}", f"{folder / 'net.py'}:Net"
        for title, suffix, kind in (
            ("Keras 2", ".h5", "tf_keras"),
            ("Keras 3", ".keras", "keras"),
            ("PyTorch", ".pt", ""),
        ):
            source = folder / f"start{suffix}"
            ours, plain = [], []
            for _ in range(3):  # by turns, so that what else goes on meets both
                own = model if suffix == ".pt" else ""
                ours.append(_time(_OURS, source, folder / f"out{suffix}", data, own, EPOCHS, BATCH))
                words = (_TORCH, folder) if suffix == ".pt" else (_KERAS, kind, source)
                plain.append(_time(*words, train, EPOCHS, BATCH, EXAMPLES))
            base = sorted(plain)[1]
            rows.append((title, f"{base:.2f} s", f"{sorted(ours)[1]:.2f} s", f"{sorted(ours)[1] / base:.2f}"))
            if suffix == ".h5":
                tfmot = sorted(_time(_KERAS, "tfmot", source, train, EPOCHS, BATCH, EXAMPLES) for _ in range(3))[1]
                rows.append(("Keras 2, tfmot", f"{base:.2f} s", f"{tfmot:.2f} s", f"{tfmot / base:.2f}"))
    show(f"overhead: an epoch of {EXAMPLES} images", ("runtime", "own loop", "with masks", "ratio"), rows)
