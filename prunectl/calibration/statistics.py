"""Statistics of layer inputs (sums, norms, Gram matrices), and importance scores from them and from gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.calibration.blocks import block_thread_count, map_blocks
from prunectl.calibration.im2col import im2col, scatter_rows, weight_matrix
from prunectl.errors import WorkError
from prunectl.formats.base import Array
from prunectl.training.backend import LayerInput, WeightUse

Float64Array = NDArray[np.float64]
OutputRange = tuple[int, int] | None
"""The range of a tensor's outputs that use these inputs; None for all."""


@dataclass(slots=True)
class InputStatistics:
    """Sums over a tensor's inputs, for each part of its outputs."""

    uses: dict[OutputRange, WeightUse] = field(default_factory=dict)
    totals: dict[OutputRange, Float64Array] = field(default_factory=dict)
    counts: dict[OutputRange, int] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """The number of groups, and the number of features in each."""
        shapes = [total.shape for total in self.totals.values()]
        return sum(shape[0] for shape in shapes), max((shape[1] for shape in shapes), default=0)

    def add(
        self,
        capture: LayerInput,
        kernel: tuple[int, ...],
        accumulator: Callable[[LayerInput, tuple[int, ...]], tuple[Float64Array, int]],
    ) -> None:
        """Accumulate one capture of inputs."""
        total, count = accumulator(capture, kernel)
        part = capture.use.outputs
        self.uses.setdefault(part, capture.use)
        self.counts[part] = self.counts.get(part, 0) + count
        if part in self.totals:
            self.totals[part] += total
        else:
            self.totals[part] = total


def sum_squares(capture: LayerInput, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
    """The sum of the squares of every feature, as groups by features."""
    return _sum_moments(capture, kernel, lambda inputs: np.einsum("i...,i...->...", inputs, inputs))


def sum_abs(capture: LayerInput, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
    """The sum of the absolute values of every feature."""
    return _sum_moments(capture, kernel, lambda inputs: np.abs(inputs).sum(axis=0))


def sum_inputs(capture: LayerInput, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
    """The sum of every feature."""
    return _sum_moments(capture, kernel, lambda inputs: inputs.sum(axis=0))


def _sum_moments(capture: LayerInput, kernel: tuple[int, ...], of: Callable[[Array], Any]) -> tuple[Float64Array, int]:
    # Summed over the examples first and cut into windows after that, which needs far less memory than all windows
    # at once. The sums are the same, since the zeros of the padding add nothing to them.
    inputs = capture.inputs
    if capture.use.window is None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        return np.asarray(of(flat), np.float64).reshape(capture.use.groups, -1), len(flat)
    moments = np.asarray(of(inputs))[None]
    total, positions = np.float64(0), 0
    for columns in im2col(moments, capture.use, kernel):
        total = total + columns.sum(axis=0, dtype=np.float64)
        positions += len(columns)
    return np.asarray(total), positions * len(inputs)


def gram(capture: LayerInput, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
    """Gram matrices X^T X: groups by features by features."""
    total: Float64Array = np.zeros(())
    count = 0
    for columns in im2col(capture.inputs, capture.use, kernel):
        if not count:
            total = _zero_products(columns)
        by_group = _by_group(columns)
        _add_products(total, np.ascontiguousarray(by_group.transpose(0, 2, 1)), by_group, is_symmetric=True)
        count += len(columns)
    return total, count


_FEATURES = 256
"""Rows of a Gram matrix that are computed as one block of work."""
_GROUPS = 16
"""Groups whose matrices are computed as one block of work, where the matrices are small."""


def _zero_products(columns: Array) -> Float64Array:
    return np.zeros((columns.shape[1], columns.shape[2], columns.shape[2]))


def _add_products(total: Float64Array, transposed: Array, inputs: Array, *, is_symmetric: bool) -> None:
    """Add the products of features with features in each group; only half of a symmetric matrix is multiplied."""
    groups, features = total.shape[:2]
    if features <= _FEATURES:

        def add(some: slice) -> None:
            total[some] += np.matmul(transposed[some], inputs[some])

        map_blocks(add, groups, _GROUPS)
        return
    for group in range(groups):

        def add_rows(rows: slice, group: int = group) -> None:
            columns = slice(0, rows.stop) if is_symmetric else slice(None)
            products = transposed[group, rows] @ inputs[group, :, columns]
            total[group, rows, columns] += products
            if is_symmetric:
                total[group, : rows.start, rows] += products[:, : rows.start].T

        map_blocks(add_rows, features, _FEATURES)


@dataclass(slots=True)
class CrossStatistics:
    """Sums, Gram and cross-Gram matrices of the inputs of pruned and dense model."""

    use: WeightUse
    count: int = 0
    sum_pruned: Float64Array = field(default_factory=lambda: np.zeros(()))
    """The sum of every feature, as groups by features."""
    sum_dense: Float64Array = field(default_factory=lambda: np.zeros(()))
    gram: Float64Array = field(default_factory=lambda: np.zeros(()))
    """Gram matrix of the inputs in the pruned model: groups by features by features."""
    cross_gram: Float64Array = field(default_factory=lambda: np.zeros(()))
    """Products of the features in the pruned model (rows) with those in the dense model (columns)."""

    def add(self, pruned: LayerInput, dense: LayerInput, kernel: tuple[int, ...]) -> None:
        """Accumulate the inputs of the same weights for the same examples."""
        for pruned_inputs, dense_inputs in zip(
            im2col(pruned.inputs, pruned.use, kernel), im2col(dense.inputs, dense.use, kernel), strict=True
        ):
            if not self.count:
                check_memory(pruned.name, groups=pruned_inputs.shape[1], features=pruned_inputs.shape[2], kept=2)
                self.gram, self.cross_gram = _zero_products(pruned_inputs), _zero_products(dense_inputs)
            self.count += len(pruned_inputs)
            self.sum_pruned = self.sum_pruned + pruned_inputs.sum(axis=0, dtype=np.float64)
            self.sum_dense = self.sum_dense + dense_inputs.sum(axis=0, dtype=np.float64)
            transposed = np.ascontiguousarray(pruned_inputs.transpose(1, 2, 0), np.float32)
            _add_products(self.gram, transposed, _by_group(pruned_inputs), is_symmetric=True)
            _add_products(self.cross_gram, transposed, _by_group(dense_inputs), is_symmetric=False)


_WORKING_COPIES = 6
"""Copies of a group's Gram matrix while it is solved: `alps` has a damped and a scaled one, and `eigh` needs four."""
_COPIES_PER_THREAD = 0.5
"""A row that keeps half of its columns solves a quarter of the matrix, which LAPACK copies."""


def check_memory(name: str, *, groups: int, features: int, kept: int) -> None:
    """Refuse a layer whose Gram matrices, features by features in float64, would not fit in memory."""
    copies = groups * kept + _WORKING_COPIES + _COPIES_PER_THREAD * block_thread_count()
    needed = 8 * features**2 * copies
    free = available_bytes()
    if free is not None and needed > free:
        raise WorkError(
            f"{name} has {features:,} input features, whose Gram matrix takes "
            f"{needed / 1e9:,.1f} GB of memory; {free / 1e9:,.1f} GB are free",
            hint=f"--exclude {name}, or use --strategy activation-magnitude, which needs no Gram matrix",
        )


def available_bytes() -> int | None:
    """Memory that is available without swapping, within a container's limit; None if the system has no /proc."""
    numbers = []
    for path, line in _MEMORY_FILES:
        try:
            text = path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            continue
        number = re.search(line, text)
        if number is not None:
            numbers.append(int(number[1]) * (1024 if path.name == "meminfo" else 1))
    if len(numbers) == len(_MEMORY_FILES):  # a container's limit less what it uses
        return min(numbers[0], max(numbers[1] - numbers[2], 0))
    return numbers[0] if numbers else None


_MEMORY_FILES = (
    (Path("/proc/meminfo"), r"MemAvailable:\s*(\d+) kB"),
    (Path("/sys/fs/cgroup/memory.max"), r"^(\d+)$"),
    (Path("/sys/fs/cgroup/memory.current"), r"^(\d+)$"),
)


def _by_group(columns: Array) -> Array:
    return np.ascontiguousarray(columns.transpose(1, 0, 2), np.float32)


def wanda_scores(weights: Array, norms: InputStatistics) -> Float64Array:
    """Wanda: |weight| times the norm of its input (Sun et al. 2023)."""
    result: Array = np.zeros(weights.shape)
    for part, use in norms.uses.items():
        rows = np.abs(weight_matrix(weights, use).astype(np.float64)) * norms.totals[part][:, np.newaxis]
        result = scatter_rows(rows, use, result)
    return result


def rank_per_output(scores: Float64Array, sums: InputStatistics) -> Float64Array:
    """Ranks within each output, so that all outputs lose the same share."""
    result: Array = np.zeros(scores.shape)
    for use in sums.uses.values():
        rows = weight_matrix(scores, use)
        order = np.argsort(rows, axis=-1, kind="stable")
        ranks = np.empty_like(rows)
        np.put_along_axis(ranks, order, np.arange(rows.shape[-1], dtype=rows.dtype), axis=-1)
        result = scatter_rows(ranks, use, result)
    return result


def covers_all_outputs(shape: tuple[int, ...], sums: InputStatistics) -> bool:
    """Whether every output of a tensor was observed."""
    covered = np.zeros(shape, np.bool_)
    for use in sums.uses.values():
        covered = scatter_rows(np.ones(weight_matrix(covered, use).shape, np.bool_), use, covered)
    return bool(covered.all())


def count_outputs(shape: tuple[int, ...], sums: InputStatistics) -> int:
    """Number of observed outputs of a tensor."""
    return sum(math.prod(weight_matrix(np.broadcast_to(np.False_, shape), use).shape[:2]) for use in sums.uses.values())


def gradient_reduction(strategy: str) -> Callable[[Float64Array], Float64Array]:
    """The function of each batch's gradient g that a strategy accumulates: |g|, g or its square."""
    accumulated: dict[str, Callable[[Float64Array], Float64Array]] = {"snip": np.array, "fisher": np.square}
    return accumulated.get(strategy, np.abs)


def gradient_scores(strategy: str, weights: Array, gradients: Float64Array) -> Float64Array:
    """Scores of a gradient strategy from its accumulated means over batches."""
    wide = weights.astype(np.float64)
    if strategy == "gradient":
        return gradients
    if strategy == "fisher":
        return np.asarray(np.square(wide) * gradients)
    return np.asarray(np.abs(wide * gradients))
