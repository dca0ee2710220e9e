"""How processor time and memory grow with bytes, tensors and shards."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.timing import PRUNECTL, Cost, cost, show

GIGABYTES = (0.1, 0.5, 2.0, 8.0)
TENSORS = (10, 1_000, 10_000, 100_000)
SHARDS = (1, 10, 100, 1_000)
_BIG, _SMALL = 1 << 22, 256
"""Weights of a tensor where bytes grow, and where tensors or shards do."""
_SHARDED = 10_000
"""Tensors in any number of shards."""
_INDEX = "model.safetensors.index.json"
_NAME = "model.safetensors"


def run() -> None:
    """Print a table of each: processor time, and memory at its peak."""
    folder = os.environ.get("PRUNECTL_BENCH_FOLDER") or None
    for title, head, sizes in (
        ("With bytes, in tensors of 17 MB", "GB", GIGABYTES),
        ("With tensors of 1 kB, in one file", "tensors", TENSORS),
        (f"With shards, of {_SHARDED:,} tensors of 1 kB", "shards", SHARDS),
    ):
        columns = (head, "inspect, s", "MB", "prune, s", "MB")
        show(title, columns, list(_rows(head, sizes, folder)))


def _rows(what: str, sizes: tuple[float, ...], place: str | None) -> Iterator[tuple[str, ...]]:
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="prunectl-bench-", dir=place) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            if what == "GB":
                _write(folder, round(size * 1e9 / (4 * _BIG)), _BIG, 1)
            elif what == "tensors":
                _write(folder, int(size), _SMALL, 1)
            else:
                _write(folder, _SHARDED, _SMALL, int(size))
            out = Path(scratch) / "out"
            inspected = cost([PRUNECTL, "inspect", str(folder)], runs=1)
            pruned = cost([PRUNECTL, "prune", str(folder), "-o", str(out), "-q", *_HOW], runs=1)
        yield (f"{size:,}", *_shown(inspected), *_shown(pruned))


_HOW = ("-s", "0.8", "--scope", "global")


def _shown(found: Cost) -> tuple[str, ...]:
    return f"{found.processor:.1f}", f"{found.peak_bytes / 1e6:.0f}"


def _write(folder: Path, tensors: int, weights: int, shards: int) -> None:
    """Write kernels of random numbers, each other ones, as shards with an index or as one file."""
    random = np.random.default_rng(0).standard_normal(2 * weights + tensors).astype(np.float32)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else _NAME
        own = range(number * tensors // shards, (number + 1) * tensors // shards)
        shape, nbytes = [16, weights // 16], 4 * weights
        header = {
            f"layers.{index}.weight": {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [place * nbytes, (place + 1) * nbytes],
            }
            for place, index in enumerate(own)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for index in own:
                file.write(random[index : index + weights].data)
        weight_map.update(dict.fromkeys(header, name))
    if shards > 1:
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
