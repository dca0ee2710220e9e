"""Training, fitting and matching on a GPU: beside plain PyTorch for time, beside the processor for what is exact.

`python -m benchmarks.gpu` on a machine with CUDA takes some minutes; `--device cpu --small` shows that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import PRUNECTL, PYTHON, show

SPARSITY = 0.875
_NET = """
import os
from torch import nn
WIDTH, DROPOUT = int(os.environ["BENCH_WIDTH"]), 0.3
def Net():
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1), nn.BatchNorm2d(2 * WIDTH), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(DROPOUT), nn.Linear(16 * WIDTH, 10))
"""
_OURS = """
import json, os, signal, statistics, sys, time
from pathlib import Path
import torch
import prunectl.training.finetune as training
from prunectl.pruning.destination import Destination
from prunectl.training.request import parse_request
source, target, words, cut = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
ends = []
def watch(moment):
    if cut and moment.step == cut:
        os.kill(os.getpid(), signal.SIGINT)
    if moment.step * moment.epochs >= (len(ends) + 1) * moment.steps:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
try:
    training.finetune(Path(source), parse_request(words), Destination(Path(target), is_forced=True), watch)
except KeyboardInterrupt:
    sys.exit(130)
# The first epoch compiles and warms up.
print(json.dumps(statistics.median(b - a for a, b in zip(ends, ends[1:])) if len(ends) > 1 else None))
"""
_PLAIN = """
import json, statistics, sys, time, numpy as np, torch
folder, data, device, precision, is_compiled, epochs, batch = sys.argv[1:]
sys.path.insert(0, folder)
from net import Net
net = Net()
net.load_state_dict(torch.load(folder + "/start.pt", weights_only=True))
net.to(device)
run = torch.compile(net) if is_compiled == "1" else net
held = np.load(data)
x, y = torch.from_numpy(held["x"]), torch.from_numpy(held["y"])
optimizer, ends = torch.optim.Adam(net.parameters()), []
scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
for epoch in range(int(epochs)):
    right = 0
    for rows in torch.randperm(len(x)).split(int(batch)):
        inputs, labels = x[rows].to(device), y[rows].to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=precision != "fp32"):
            out = run(inputs)
            loss = torch.nn.functional.cross_entropy(out, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        right += (out.argmax(1) == labels).sum()
    right.item()
    ends.append(time.perf_counter())
print(json.dumps(statistics.median(later - earlier for earlier, later in zip(ends, ends[1:]))))
"""
Weights = dict[str, "np.ndarray[Any, Any]"]


class _Bench:
    """A network, data for it, and the child processes that work on both."""

    def __init__(self, folder: Path, device: str, *, is_small: bool) -> None:
        self.folder, self.device = folder, device
        self.examples, self.batch, width = (512, 64, 8) if is_small else (40_000, 256, 64)
        self.epochs, self.samples = (2, 16) if is_small else (5, 256)
        self.environment = os.environ | {"BENCH_WIDTH": str(width), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        (folder / "net.py").write_text(_NET)
        self.source, self.data, self.builder = folder / "start.pt", folder / "data.npz", f"{folder / 'net.py'}:Net"
        random = np.random.default_rng(0)
        x = random.standard_normal((self.examples, 3, 32, 32), np.float32)
        y = (x.reshape(self.examples, -1) @ random.standard_normal((3 * 32 * 32, 10), np.float32)).argmax(1)
        np.savez(self.data, x=x, y=y)
        code = "import torch; from net import Net; torch.manual_seed(0); torch.save(Net().state_dict(), 'start.pt')"
        self._done([PYTHON, "-c", code], cwd=folder)

    def finetune(self, out: str, *, cut: int = 0, device: str = "", **words: Any) -> float | None:
        """Train with pruning, and return the seconds of an epoch but the first; ended by Ctrl-C after so many steps."""
        wanted = {
            "data": str(self.data),
            "builder": self.builder,
            "batch_size": self.batch,
            "sparsity": SPARSITY,
            "device": device or self.device,
            "epochs": self.epochs,
            "keep": "last",
            **words,
        }
        command = [PYTHON, "-c", _OURS, self.source, self.folder / out, json.dumps(wanted), cut]
        found: float | None = json.loads(self._done(command, code=130 if cut else 0) or "null")
        return found

    def plain(self, precision: str, *, is_compiled: bool) -> float:
        """The same without pruning, in PyTorch alone."""
        words = (self.device, precision, int(is_compiled), self.epochs, self.batch)
        return float(json.loads(self._done([PYTHON, "-c", _PLAIN, self.folder, self.data, *words])))

    def prunectl(self, *words: object, is_hidden: bool = False) -> str:
        """Run a command, which takes the GPU that it sees."""
        return self._done([PRUNECTL, *words], {"CUDA_VISIBLE_DEVICES": ""} if is_hidden else {})

    def weights(self, name: str) -> Weights:
        """The kernels in a file that was written."""
        state = torch.load(self.folder / name, weights_only=True)
        return {key: value.numpy() for key, value in state.items() if value.ndim > 1}

    def _done(
        self, words: list[Any], more: dict[str, str] | None = None, *, cwd: Path | None = None, code: int = 0
    ) -> str:
        environment = self.environment | (more or {})
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, cwd=cwd, check=False)
        if done.returncode != code:
            raise RuntimeError(done.stderr[-3000:])
        return done.stdout.strip().rpartition("\n")[2] if words[0] == PYTHON else done.stdout + done.stderr


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: this machine has no CUDA; --device cpu --small runs the same on the processor")
    with tempfile.TemporaryDirectory(prefix="prunectl-gpu-") as name:
        bench = _Bench(Path(name), options.device, is_small=options.small)
        _training(bench)
        _exact(bench)
        _fitting(bench)


def _training(bench: _Bench) -> None:
    rows: list[tuple[str, ...]] = []
    for precision, is_compiled in (("fp32", False), ("bf16", False), ("fp16", False), ("fp32", True)):
        title = precision + ", torch.compile" * is_compiled
        try:
            ours = bench.finetune("out.pt", precision=precision, compile=is_compiled)
            plain = bench.plain(precision, is_compiled=is_compiled)
        except RuntimeError as error:
            # A processor without half precision, or a machine without a compiler, leaves the others.
            rows.append((title, "failed", str(error).strip().rpartition("\n")[2][:100], "", ""))
            continue
        weights = bench.weights("out.pt").values()
        zeros, size = (sum(int(count(weight)) for weight in weights) for count in (_zeros, np.size))
        is_right = zeros == sum(round(SPARSITY * weight.size) for weight in weights)
        shown = "" if ours is None else f"{ours:.2f} s", "" if ours is None else f"{ours / plain:.2f}"
        rows.append((title, f"{plain:.2f} s", *shown, f"{zeros / size:.4f}" + ", as planned" * is_right))
    head = ("training", "plain, an epoch", "with pruning", "ratio", "zeros")
    show(f"Training on {bench.device}, {bench.examples} images in batches of {bench.batch}", head, rows)


def _zeros(weight: Any) -> int:
    return int((weight == 0).sum())


def _exact(bench: _Bench) -> None:
    """What must be the same: zeros chosen at the first step, and a run that was broken off in its second epoch."""
    for device in ("cpu", bench.device):
        bench.finetune(f"{device}-first.pt", device=device, epochs=1, schedule="constant", begin="0")
    theirs, ours = bench.weights("cpu-first.pt"), bench.weights(f"{bench.device}-first.pt")
    rows: list[tuple[str, ...]] = [("zeros of the first step, beside the processor's", _agreement(ours, theirs))]
    steps = -(-bench.examples // bench.batch)
    words: dict[str, Any] = {"epochs": 2, "frequency": 2}
    bench.finetune("unbroken.pt", **words)
    kept = {"checkpoint_dir": str(bench.folder / "kept"), **words}
    bench.finetune("broken.pt", cut=steps + max(steps // 2, 1), **kept)
    bench.finetune("broken.pt", resume=True, **kept)
    unbroken, broken = ((bench.folder / f"{name}.pt").read_bytes() for name in ("unbroken", "broken"))
    rows.append(("resumed with dropout, beside an unbroken run", "the same bytes" if unbroken == broken else "DIFFERS"))
    show(f"What is exact on {bench.device}", ("what", "found"), rows)


def _agreement(ours: Weights, theirs: Weights) -> str:
    same = sum(int(((ours[name] == 0) == (theirs[name] == 0)).sum()) for name in theirs)
    total = sum(weight.size for weight in theirs.values())
    return "the same" if same == total else f"{same / total:.6%} the same"


def _fitting(bench: _Bench) -> None:
    rows: list[tuple[str, ...]] = []
    for title, words in (
        ("obs", ("--strategy", "obs")),
        ("matching outputs", ("--repair", "outputs")),
    ):
        seconds = []
        for where, is_hidden in (("cpu", True), (bench.device, False)):
            output = bench.folder / f"{where}-fit.pt"
            given = ("-s", SPARSITY, "--data", bench.data, "--builder", bench.builder, "--samples", bench.samples)
            said = bench.prunectl(
                "prune", bench.source, "-o", output, "--force", "-v", *given, *words, is_hidden=is_hidden
            )
            seconds.append(next(line.split()[1] for line in said.splitlines() if line.startswith("took ")))
        theirs, ours = bench.weights("cpu-fit.pt"), bench.weights(f"{bench.device}-fit.pt")
        apart = max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)
        rows.append((title, *(f"{number} s" for number in seconds), _agreement(ours, theirs), f"{apart:.1e}"))
    head = ("method", "processor", bench.device, "zeros", "largest difference of a weight")
    show("Fitting and matching, beside the processor", head, rows)
    said = bench.prunectl("bench", bench.source, output, "--builder", bench.builder, "--input", "x:1,3,32,32")
    show("bench, of both", ("path, runtime, batch, median, low, high …",), [(line,) for line in said.splitlines()])


if __name__ == "__main__":
    main()
