"""Half of the channels of usual networks, cut by prunectl and by Torch-Pruning: what is left, and how long it took.

python -m benchmarks.channels_torch [NAME ...]

Then whole processes, in turns: `prunectl prune` from file to file, and a script that builds, loads, cuts with
Torch-Pruning, saves, loads and runs the result.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.nets_torch import NETS, Known, lively
from benchmarks.timing import PYTHON, cost
from prunectl.channels.groups import channel_groups
from prunectl.channels.prune import prune_channels
from prunectl.errors import PrunectlError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import LoadOptions

RATIO = 0.5
HEAD = ("network", "free", "parameters", "left", "MACs left", "error", "s", "Torch-Pruning left", "its MACs", "its s")
COMPARED = ("ResNet-18", "EfficientNet-B0", "DenseNet-121", "VGG-16")
PROCESSES = ("network", "processor s", "Torch-Pruning", "ratio")
RUNS = 3


def run(chosen: tuple[str, ...] = ()) -> None:
    """Print a row for each network."""
    print_rows(HEAD, _row, chosen)
    print_rows(PROCESSES, _processes, chosen or COMPARED)


def print_rows(head: Sequence[str], row: Callable[[Known], list[str]], chosen: tuple[str, ...]) -> None:
    """Print what there is to say of each network that was chosen, or of all."""
    print("\t".join(head))
    for known in NETS:
        if not chosen or known.name in chosen:
            print("\t".join(row(known)), flush=True)


def _row(known: Known) -> list[str]:
    torch.manual_seed(0)
    net = lively(known.make())
    example = example_of(known.shape)
    before = _counted(net, example)
    with tempfile.TemporaryDirectory() as folder:
        ours = _ours(known, net, Path(folder), example, before)
    return [known.name, *ours, *_theirs(known, example, before)]


def _ours(known: Known, net: Any, folder: Path, example: Any, before: tuple[float, float]) -> list[str]:
    path, output = folder / "net.pt", folder / "small.pt"
    torch.save(net.state_dict(), path)
    model = f"benchmarks.nets_torch:{known.make.__name__}"
    found = channel_groups(open_model(path), LoadOptions(model, inputs=(known.shape,)))
    free = f"{found.prunable / found.channels:.0%}"
    begin = time.perf_counter()
    try:
        request = PruneRequest(sparsity=RATIO, pattern="channel", model=model, inputs=(known.shape,))
        done = prune_channels(path, request, Destination(output))
    except PrunectlError as error:
        return [free, str(error)[:60], "", "", "", ""]
    seconds = time.perf_counter() - begin
    home = types.ModuleType("small")
    exec(compile((folder / "small.py").read_text(), "small.py", "exec"), home.__dict__)
    kind = next(value for value in vars(home).values() if isinstance(value, type) and value.__module__ == "small")
    small = kind().eval()
    small.load_state_dict(torch.load(output, weights_only=True), strict=True)
    parameters, _ = _counted(small, example)
    return [
        free,
        f"{before[0] / 1e6:.2f} M",
        f"{parameters / before[0]:.1%}",
        f"{(done.after.macs or 0) / (done.before.macs or 1):.1%}",
        f"{done.proof.error:.0e}",
        f"{seconds:.1f}",
    ]


def _theirs(known: Known, example: Any, before: tuple[float, float]) -> list[str]:
    pruning: Any = __import__("torch_pruning")
    torch.manual_seed(0)
    net = lively(known.make())
    last = [module for module in net.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)][-1]
    head = getattr(net, "classifier", None) or getattr(net, "head", None) or getattr(net, "out", None)
    ignored = [last, *([head] if isinstance(head, torch.nn.Linear | torch.nn.Conv2d) else [])]
    heads = {module.query: module.heads for module in net.modules() if hasattr(module, "query")}
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importance = pruning.importance.MagnitudeImportance(p=1)
            pruner = pruning.pruner.MagnitudePruner(
                net, example, importance=importance, pruning_ratio=RATIO, ignored_layers=ignored, num_heads=heads
            )
            pruner.step()
            net(example)
    except Exception as error:  # noqa: BLE001 - a row for what it cannot do
        return [f"{type(error).__name__}: {str(error)[:40]}".replace("\n", " "), "", ""]
    seconds = time.perf_counter() - begin
    parameters, macs = _counted(net, example)
    return [f"{parameters / before[0]:.1%}", f"{macs / before[1]:.1%}", f"{seconds:.1f}"]


_SCRIPT = """
import importlib, sys, warnings
import torch
name, path, output, shape = sys.argv[1:]
net = getattr(importlib.import_module("benchmarks.nets_torch"), name)()
net.load_state_dict(torch.load(path, weights_only=True))
net.eval()
import torch_pruning as pruning
warnings.simplefilter("ignore")
example = torch.randn([int(length) for length in shape.split(",")])
last = [module for module in net.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)][-1]
importance = pruning.importance.MagnitudeImportance(p=1)
pruning.pruner.MagnitudePruner(
    net, example, importance=importance, pruning_ratio=0.5, ignored_layers=[last]
).step()
net.zero_grad()
torch.save(net, output)
with torch.no_grad():
    torch.load(output, weights_only=False)(example)
"""


def _processes(known: Known) -> list[str]:
    """The processor time of both as whole processes: the medians, measured in turns."""
    torch.manual_seed(0)
    name = known.make.__name__
    with tempfile.TemporaryDirectory() as folder:
        path, output = f"{folder}/net.pt", f"{folder}/small.pt"
        torch.save(lively(known.make()).state_dict(), path)
        builder = f"benchmarks.nets_torch:{name}"
        ours = [PYTHON, "-m", "prunectl", "prune", path, "-o", output, "--force", "--quiet", "--pattern", "channel"]
        ours += ["-s", f"{RATIO:.0%}", "--builder", builder, "--input", known.shape]
        theirs = [PYTHON, "-c", _SCRIPT, name, path, output, known.shape]
        turns = [(cost(ours, 1).processor, cost(theirs, 1).processor) for _ in range(RUNS)]
    mine, other = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    return [known.name, f"{mine:.1f}", f"{other:.1f}", f"{mine / other:.2f}"]


def _counted(net: Any, example: Any) -> tuple[float, float]:
    """Return the numbers of parameters and of multiply-adds of convolutions and dense layers, as hooks see them."""
    macs: list[int] = []

    def see(module: Any, _: Any, made: Any) -> None:
        positions = made.numel() / made.shape[1] if made.ndim == 4 else made.numel() / made.shape[-1]
        macs.append(
            module.weight.numel() * int(positions)
            if not isinstance(module, torch.nn.ConvTranspose2d)
            else module.weight.numel() * int(positions) // (module.stride[0] * module.stride[1])
        )

    kinds = torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d
    hooks = [module.register_forward_hook(see) for module in net.modules() if isinstance(module, kinds)]
    with torch.no_grad():
        net(example)
    for hook in hooks:
        hook.remove()
    return float(sum(weight.numel() for weight in net.parameters())), float(sum(macs)) or 1.0


def example_of(shape: str) -> Any:
    """Return something that a network takes."""
    lengths, _, kind = shape.partition(":")
    size = [int(length) for length in lengths.split(",")]
    return torch.randint(0, 2, size) if kind else torch.randn(size)


if __name__ == "__main__":
    run(tuple(sys.argv[1:]))
