"""Half of the channels of usual networks, cut out of their ONNX exports by prunectl and by onnxsim: what is left.

python -m benchmarks.channels_onnx [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.channels_torch import RATIO, example_of, print_rows
from benchmarks.nets_torch import Known, lively
from prunectl.analysis.stats import ModelStats
from prunectl.api import inspect
from prunectl.channels.prune import prune_channels
from prunectl.errors import PrunectlError
from prunectl.pruning.destination import Destination
from prunectl.pruning.request import PruneRequest

HEAD = (
    *("network", "cut", "parameters left", "MACs left", "apart", "ms before", "ms after", "s"),
    *("onnxsim left", "its MACs", "its s"),
)


def run(chosen: tuple[str, ...] = ()) -> None:
    """Print a row for each network."""
    print_rows(HEAD, _row, chosen)


def _row(known: Known) -> list[str]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "net.onnx"
        _export(lively(known.make()), example_of(known.shape), path)
        begin = time.perf_counter()
        try:
            request = PruneRequest(sparsity=RATIO, pattern="channel")
            found = prune_channels(path, request, Destination(Path(name) / "small.onnx"), has_latency=True)
        except PrunectlError as error:
            return [known.name, str(error)[:100]]
        seconds = time.perf_counter() - begin
        theirs = _theirs(path, example_of(known.shape).numpy(), found.before)
    return [
        known.name,
        f"{found.dropped}/{found.channels}",
        f"{found.after.params.total / found.before.params.total:.1%}",
        f"{(found.after.macs or 0) / (found.before.macs or 1):.1%}",
        f"{found.proof.error:.0e}",
        *(f"{latency.median.middle * 1e3:.1f}" for latency in found.latencies),
        f"{seconds:.1f}",
        *theirs,
    ]


def _theirs(path: Path, example: Any, before: ModelStats) -> list[str]:
    onnx, onnxsim, runtime = (__import__(name) for name in ("onnx", "onnxsim", "onnxruntime"))
    small = path.with_name("theirs.onnx")
    begin = time.perf_counter()
    try:
        onnx.save(onnxsim.apply_structured_pruning(onnx.load(path), RATIO, importance_norm="l1"), small)
        seconds = time.perf_counter() - begin
        runtime.InferenceSession(small, providers=["CPUExecutionProvider"]).run(None, {"x": example})
    except Exception as error:  # noqa: BLE001 - a row for what it cannot do
        return [f"{type(error).__name__}: {str(error)[:40]}".replace("\n", " "), "", ""]
    after = inspect(small, flops=True)
    params, macs = after.params.total / before.params.total, (after.macs or 0) / (before.macs or 1)
    return [f"{params:.1%}", f"{macs:.1%}", f"{seconds:.1f}"]


def _export(net: Any, example: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (example,), str(path), dynamo=False, input_names=["x"], output_names=["y"])


if __name__ == "__main__":
    run(tuple(sys.argv[1:]))
