"""Half of the channels of usual networks, cut by prunectl and by Torch-Pruning: what is left, and how long it took.

python -m benchmarks.channels_torch [NAME ...]
"""

from __future__ import annotations

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
from prunectl.channels.groups import channel_groups
from prunectl.channels.prune import prune_channels
from prunectl.errors import PrunectlError
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import LoadOptions

RATIO = 0.5
HEAD = ("network", "free", "parameters", "left", "MACs left", "error", "s", "Torch-Pruning left", "its MACs", "its s")


def run(chosen: tuple[str, ...] = ()) -> None:
    """Print a row for each network."""
    print_rows(HEAD, _row, chosen)


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
