"""Pruning on whole arrays, as a few lines of NumPy: what streaming must come to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prunectl.formats.registry import open_model
from prunectl.pruning.destination import Destination
from prunectl.pruning.prune import Pruned
from prunectl.pruning.prune import prune as run
from prunectl.pruning.request import PruneRequest, check
from tests.contract import Array
from tests.running import FIXTURES

WHOLE_FOLDERS = ("digits_cnn_savedmodel", "every_variable_twice")
MODELS = {
    path.name: path
    for path in sorted(FIXTURES.iterdir())
    if (path.is_file() and path.suffix not in {".py", ".md", ".npz", ".data-00000-of-00001"})
    or path.name in WHOLE_FOLDERS
} | {
    "external_data": FIXTURES / "external_data" / "model.onnx",
    "two_shards": FIXTURES / "two_shards" / "model.safetensors.index.json",
}
"""Every model among the fixtures, by the name of its file or folder."""


def prune(path: Path, folder: Path, **words: object) -> tuple[Pruned, Path]:
    """Prune into another folder, and return what came of it and where it is."""
    folder.mkdir(exist_ok=True)
    asked = PruneRequest(**words)  # type: ignore[arg-type]
    check(asked)
    target = folder / path.name
    return run(path, asked, Destination(target)), target


def arrays(path: Path) -> dict[str, Array]:
    """Return every tensor, copied out of the file."""
    model = open_model(path)
    return {tensor.name: np.array(model.read(tensor)) for tensor in model.tensors}


def magnitudes(array: Array) -> Array:
    """Return absolute values that NumPy can sort, whatever the type."""
    return np.abs(array.astype(np.float64))


def lowest(scores: Array, drop: int) -> Array:
    """Mark the lowest scores, the first of equal ones first."""
    mask = np.zeros(scores.size, np.bool_)
    mask[np.argsort(scores, axis=None, kind="stable")[:drop]] = True
    return mask.reshape(scores.shape)


def layerwise(weights: Mapping[str, Array], sparsity: float) -> dict[str, Array]:
    """Mark the smallest weights of each tensor."""
    return {name: lowest(magnitudes(array), round(sparsity * array.size)) for name, array in weights.items()}


def together(weights: Mapping[str, Array], sparsity: float) -> dict[str, Array]:
    """Mark the smallest weights of all tensors, but for the largest hundredth of each, or half of what stays."""
    size = sum(array.size for array in weights.values())
    kept = size - round(sparsity * size)
    flat = {name: magnitudes(array).ravel() for name, array in weights.items()}
    for array in flat.values() if kept >= 2 * len(flat) else ():
        least = max(int(array.size * min(0.01, kept / size / 2)), 1)
        least = min(least, np.count_nonzero(array))
        array[np.argsort(array, kind="stable")[array.size - least :]] = np.inf
    scores = np.concatenate(list(flat.values()))
    marks = np.split(lowest(scores, round(sparsity * scores.size)), np.cumsum([a.size for a in weights.values()])[:-1])
    return {name: mark.reshape(array.shape) for (name, array), mark in zip(weights.items(), marks, strict=True)}


def in_groups(array: Array, axis: int, zeros: int, group: int) -> Array:
    """Mark so many of every few neighbours along an axis, one group after another; the last may be short."""
    mask = np.zeros(array.shape, np.bool_)
    scores, marks = np.moveaxis(magnitudes(array), axis, -1), np.moveaxis(mask, axis, -1)
    for place in np.ndindex(scores.shape[:-1]):
        for begin in range(0, scores.shape[-1], group):
            few = scores[place][begin : begin + group]
            marks[place][begin : begin + group] = lowest(few, max(zeros - (group - len(few)), 0))
    return mask


def in_blocks(array: Array, out_axis: int, rows: int, columns: int, pool: str, sparsity: float) -> Array:
    """Mark whole blocks of the matrix of inputs by outputs, one block after another."""
    mask = np.zeros(array.shape, np.bool_)
    lengths = (-1, array.shape[out_axis])
    scores = np.moveaxis(magnitudes(array), out_axis, -1).reshape(lengths)
    marks = np.zeros(scores.shape, np.bool_)
    corners = [(i, j) for i in range(0, scores.shape[0], rows) for j in range(0, scores.shape[1], columns)]
    pooled = [np.mean if pool == "avg" else np.max for _ in corners]
    values = np.array([f(scores[i : i + rows, j : j + columns]) for f, (i, j) in zip(pooled, corners, strict=True)])
    for at in np.flatnonzero(lowest(values, round(sparsity * len(corners)))):
        i, j = corners[at]
        marks[i : i + rows, j : j + columns] = True
    moved = np.moveaxis(mask, out_axis, -1)
    moved[...] = marks.reshape(moved.shape)
    return mask
