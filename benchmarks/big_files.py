"""Files of two gigabytes: facts without reading a weight, and counting at the speed of memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.timing import PRUNECTL, PYTHON, cost, show

LAYERS, SIDE = 32, 4096
_COUNT = """
import sys, torch
from safetensors.torch import load_file
path = sys.argv[1]
tensors = (load_file(path) if path.endswith("safetensors") else torch.load(path, weights_only=True)).values()
print(sum(int((t == 0).sum()) for t in tensors))
"""


def run() -> None:
    """Print time and memory for both kinds of file, dense and half zero."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="prunectl-bench-") as scratch:
        for share in (0.0, 0.8):
            for path in _write(Path(scratch), share):
                nbytes = path.stat().st_size
                script = cost([PYTHON, "-c", _COUNT, str(path)], runs=2)
                for flags in ("--no-zeros", ""):
                    found = cost([PRUNECTL, "inspect", str(path), "--sort", "size", *flags.split()], runs=3)
                    rate = "" if flags else f"{nbytes / found.seconds / 1e9:.1f} GB/s"
                    rows.append(
                        (
                            f"{path.suffix}, {nbytes / 1e9:.1f} GB, {share:.0%} zero",
                            f"`inspect --sort size {flags}`".replace(" `", "`"),
                            f"{found.seconds:.2f} s",
                            rate,
                            f"{found.peak_bytes / 1e6:.0f} MB",
                            "" if flags else f"{script.seconds:.2f} s, {script.peak_bytes / 1e6:.0f} MB",
                        )
                    )
                path.unlink()
    head = ("file", "command", "time", "rate (goal: 1 GB/s)", "peak (goal: 200 MB)", "load with torch and count")
    show("Two gigabytes", head, rows)


def _write(folder: Path, share: float) -> list[Path]:
    random = np.random.default_rng(0)
    one = random.standard_normal((SIDE, SIDE)).astype(np.float32)
    one[random.random(one.shape) < share] = 0
    state = {f"layers.{number}.weight": torch.from_numpy(one.copy()) for number in range(LAYERS)}
    save_file(state, folder / "big.safetensors")
    torch.save(state, folder / "big.pt")
    return [folder / "big.safetensors", folder / "big.pt"]
