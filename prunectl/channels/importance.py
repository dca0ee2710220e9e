"""Channel importance: pure functions from weights to one score for each index of an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from prunectl.channels.adapter import Feeds, GraphAdapter
from prunectl.channels.groups import ChannelGroup, ChannelSlices
from prunectl.channels.labels import AxisRole
from prunectl.channels.lengths import DataShapes
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.pruning import BATCH_SIZE, RANDOM_PREFIX
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.strategies import uniform_numbers
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.source import EpochOrder

Rows = NDArray[np.float64]
"""The weights of a channel in each row."""
Similarity = NDArray[np.float64]
"""The similarity of every two rows: 1 if they are the same."""

_CHUNK_BYTES = 32 << 20


def cosine(rows: Rows) -> Similarity:
    """The cosine of the angle between every two rows; rows of zeros are similar only to each other."""
    norms = _norms(rows)
    across = np.outer(norms, norms)
    similarity = np.divide(rows @ rows.T, across, out=np.zeros_like(across), where=across > 0)
    return _finalize(np.clip(similarity, -1, 1), norms)


def euclidean(rows: Rows) -> Similarity:
    """1 - distance / product of norms, at least 0, of every two rows; rows of zeros are similar only to each other."""
    norms = _norms(rows)
    across = np.outer(norms, norms)
    # Not |a|² + |b|² - 2ab: for nearly equal rows, almost all digits of the difference would cancel.
    distances = np.sqrt(_summed(rows, lambda rows_part, all_rows: np.square(rows_part - all_rows)))
    similarity = 1 - np.divide(distances, across, out=np.ones_like(across), where=across > 0)
    return _finalize(np.maximum(similarity, 0), norms)


def iou(rows: Rows) -> Similarity:
    """Intersection over union of every two rows; two rows of zeros have 1.

    For two weights of the same sign the intersection is the smaller |weight| and the union the larger; for weights of
    opposite signs they are 0 and the sum of both. Without negative weights: the sum of minima over the sum of maxima.
    """
    signed = np.concatenate([np.maximum(rows, 0), np.maximum(-rows, 0)], axis=1)
    shared = _summed(signed, np.minimum)
    sizes = signed.sum(axis=1)
    either = sizes[:, np.newaxis] + sizes - shared
    return _finalize(np.divide(shared, either, out=np.zeros_like(either), where=either > 0), sizes)


METRICS: Mapping[str, Callable[[Rows], Similarity]] = {"cosine": cosine, "euclidean": euclidean, "iou": iou}


def redundancy(similarity: Similarity) -> Scores:
    """The similarity of each row to the kept row that replaces it, as rows are removed greedily, one by one.

    Each round removes the later row of the most similar pair, so that for any number of removed rows these are the
    ones with the highest scores. The last row has -1, as no row is left to replace it.
    """
    count = len(similarity)
    # Only an earlier row replaces a row, as the later row of a pair is removed.
    before = np.where(np.tri(count, k=-1, dtype=np.bool_), similarity, -np.inf)
    best = before.max(axis=1, initial=-np.inf)
    scores = np.full(count, -1.0)
    for _ in range(count - 1):
        # Of equal maxima the last, so that the first of several identical rows is kept.
        removed = count - 1 - int(np.argmax(best[::-1]))
        scores[removed] = best[removed]
        best[removed] = -np.inf
        followers = removed + 1 + np.flatnonzero(before[removed + 1 :, removed] == best[removed + 1 :])
        before[:, removed] = -np.inf
        best[followers] = np.where(np.isneginf(best[followers]), -np.inf, before[followers].max(axis=1))
    return scores


def dissimilarity(weights: Array, axis: int, metric: str = "cosine") -> Scores:
    """The distance of each index of an axis from the index that replaces it, from 0 to 2; the lowest are removed."""
    return np.asarray(1 - redundancy(METRICS[metric](channel_rows(weights, axis))))


def _norms(rows: Rows) -> NDArray[np.float64]:
    return np.asarray(np.sqrt(np.square(rows).sum(axis=1)))


def _finalize(similarity: Similarity, sizes: NDArray[np.float64]) -> Similarity:
    """Set the similarity to 1 for each row with itself, and for every two rows of zeros."""
    empty = sizes == 0
    completed = np.where(np.outer(empty, empty), 1.0, similarity)
    np.fill_diagonal(completed, 1.0)
    return completed


def _summed(rows: Rows, function: Callable[[Rows, Rows], Rows]) -> Similarity:
    """The sum of an elementwise function over every two rows, a few rows at a time to limit memory."""
    step = max(_CHUNK_BYTES // max(rows.nbytes, 1), 1)
    chunks = [function(rows[begin : begin + step, np.newaxis], rows).sum(axis=2) for begin in range(0, len(rows), step)]
    return np.concatenate(chunks) if chunks else np.zeros((0, 0))


Scores = NDArray[np.float64]


class RequiredData(StrEnum):
    """The statistics of calibration data that an importance needs."""

    NOTHING = "nothing"
    OUTPUTS = "outputs"
    GRADIENTS = "gradients"


@dataclass(frozen=True, slots=True)
class Importance:
    """A measure of channel importance: a score for each channel from some of its weights."""

    name: str
    roles: frozenset[AxisRole]
    function: Callable[[Array, int], Scores]
    """From a weight and an axis to one score for each index."""
    summary: str
    key: str = ""
    """The name of the `--param` that selects a variant, such as norm."""
    choices: Mapping[str, Callable[[Array, int], Scores]] = field(default_factory=dict)
    """The function of each variant, by the value of this parameter."""
    choice: str = ""
    """The selected variant; empty for the default."""
    needs: RequiredData = RequiredData.NOTHING
    """The statistic of calibration data that `function` gets instead of the weights."""
    has_threshold: bool = False
    """Whether a threshold may be given: it removes the channels with scores of at most 1 - threshold."""


def absolute(weights: Array, axis: int) -> Scores:
    """The mean absolute value at each index."""
    return _means_of_rows(weights, axis, np.abs)


def squared(weights: Array, axis: int) -> Scores:
    """The mean square at each index."""
    return _means_of_rows(weights, axis, np.square)


def geometric_median(weights: Array, axis: int) -> Scores:
    """The sum of distances to all other channels, low for those that others replace best: FPGM (He et al. 2019)."""
    rows = channel_rows(weights, axis)
    squares = np.square(rows).sum(axis=1)
    squared_distances = squares[:, None] + squares[None, :] - 2 * (rows @ rows.T)
    return np.asarray(np.sqrt(np.maximum(squared_distances, 0)).sum(axis=1))


def abs_sum(weights: Array, axis: int) -> Scores:
    """The absolute value of the sum at each index."""
    return np.asarray(np.abs(channel_rows(weights, axis).sum(axis=1)))


MEASURES = (
    Importance(
        "channel-norm",
        frozenset({AxisRole.OUT, AxisRole.IN}),
        absolute,
        "the smallest mean |weight| in all layers that produce or read the channel (norm=2: mean square)",
        key="norm",
        choices={"1": absolute, "2": squared},
    ),
    Importance("bn-scale", frozenset({AxisRole.SCALE}), absolute, "the smallest scales of batch normalisation"),
    Importance(
        "geometric-median",
        frozenset({AxisRole.OUT}),
        geometric_median,
        "those nearest to the geometric median of their layer (FPGM, He et al. 2019)",
    ),
    Importance(
        "similarity",
        frozenset({AxisRole.OUT}),
        dissimilarity,
        "those most similar to another channel that is kept (metric=cosine, euclidean, iou; threshold=0.9)",
        key="metric",
        choices={metric: partial(dissimilarity, metric=metric) for metric in METRICS},
        has_threshold=True,
    ),
    Importance(
        "channel-activation",
        frozenset({AxisRole.OUT}),
        abs_sum,
        "the smallest outputs on calibration data",
        key="norm",
        choices={"1": abs_sum, "2": abs_sum},
        needs=RequiredData.OUTPUTS,
    ),
    Importance(
        "taylor",
        frozenset({AxisRole.OUT}),
        abs_sum,
        "the smallest change of the loss on calibration data, to first order (Taylor)",
        needs=RequiredData.GRADIENTS,
    ),
)
RANDOM = "random"


def group_importance(group: ChannelGroup, weights: Mapping[str, Array], importance: Importance) -> Scores | None:
    """The score of each channel of a group, the mean over its axes; None if no axis has a role that the measure needs.

    For a measure that needs calibration data, `weights` holds the statistics of this data in the shape of the weights.
    """
    kept = [
        number for number, axis in enumerate(group.axes) if axis.role in importance.roles and axis.tensor in weights
    ]
    if not kept:
        return None
    scores = []
    for number in kept:
        axis = group.axes[number]
        per_index = importance.function(weights[axis.tensor], axis.axis)
        scores.append(_means(per_index, group.slices[number]))
    return np.asarray(np.mean(scores, axis=0))


def _means(scores: Scores, slices: ChannelSlices) -> Scores:
    """The mean of the scores at the indices of each channel."""
    counts = slices.counts
    if (counts == counts[0]).all():
        return np.asarray(scores[slices.indices].reshape(len(counts), -1).mean(axis=1))
    return np.asarray([scores[own].mean() for own in np.split(slices.indices, np.cumsum(counts)[:-1])])


def random_importance(group: ChannelGroup, seed: int) -> Scores:
    """Random scores, determined by the seed, the name of the group and the position in the group."""
    return uniform_numbers(len(group), f"{seed}/{group.name}")


def channel_rows(weights: Array, axis: int) -> NDArray[np.float64]:
    """The weights at each index of an axis as a row."""
    return _rows(weights, axis).astype(np.float64)


def _rows(weights: Array, axis: int) -> Array:
    return np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)


_CACHED_BYTES = 1 << 20


def _means_of_rows(weights: Array, axis: int, function: Callable[[Rows], Rows]) -> Scores:
    """The mean of a function of the weights at each index, in parts of a few indices that fit into the CPU cache."""
    rows = _rows(weights, axis)
    # No part has a single row, unless it is the only one: in column-major memory, NumPy adds up the numbers of a
    # single row in another order than those of several rows.
    parts = min(len(rows) // 2, rows.size * 8 // _CACHED_BYTES) or 1
    return np.concatenate([function(part.astype(np.float64)).mean(axis=1) for part in np.array_split(rows, parts)])


def importance_inputs(
    model: ModelFile,
    groups: Sequence[ChannelGroup],
    weights: Mapping[str, Array],
    importance: Importance | None,
    request: PruneRequest,
    *,
    is_trusted: bool,
) -> Mapping[str, Array]:
    """The arrays that an importance scores, in the shape of each weight: weights, output norms, weights * gradients."""
    if importance is None or importance.needs is RequiredData.NOTHING:
        return weights
    from prunectl.calibration.outputs import output_norms  # noqa: PLC0415 - most cuts look at no data
    from prunectl.calibration.session import open_calibration  # noqa: PLC0415 - most cuts look at no data

    makers = {
        axis.tensor: axis.axis
        for group in groups
        for axis in group.axes
        if axis.role is AxisRole.OUT and not group.locked_because
    }
    tensors = {tensor.name: tensor for tensor in model.tensors if tensor.name in makers}
    if importance.needs is RequiredData.OUTPUTS:
        norms = output_norms(model, tensors.keys(), request, norm=importance.choice or "1", is_trusted=is_trusted)
        return {
            name: _spread(norm, weights[name].shape, makers[name])
            for name, norm in norms.items()
            if len(norm) == weights[name].shape[makers[name]]
        }
    session = open_calibration(model, request, is_trusted=is_trusted, needs_targets=True, has_reference=False)
    with closing(session):
        gradients = session.calibration.gradients(list(tensors.values()), np.array)
        return {name: weights[name].astype(np.float64) * gradient for name, gradient in gradients.items()}


def _spread(line: Array, shape: tuple[int, ...], axis: int) -> Array:
    """An array of a shape whose sum at each index of an axis is the number in `line`; all but one summand are 0."""
    spread = np.zeros(shape)
    first = tuple(slice(None) if number == axis else 0 for number in range(len(shape)))
    spread[first] = line
    return spread


_BATCHES = 4
"""Enough to find differences that random inputs do not show; each batch costs a run of both networks."""


def calibration_batches(
    model: ModelFile, adapter: GraphAdapter, request: PruneRequest, importance: Importance | None
) -> tuple[tuple[Feeds, ...], tuple[str, ...]]:
    """Batches of calibration data for the equivalence check, of the traced batch size, and notes for the user.

    Data that do not fit the traced shapes are skipped with a note if the strategy needs data; else they are an error,
    as the check is the only use of the data.
    """
    if not request.data:
        return (), ()
    try:
        return _batches(adapter, request, is_channels_first=model.about.keras is None)
    except UsageError as error:
        if importance is None or importance.needs is RequiredData.NOTHING:
            raise
        return (), (f"The pruned network was verified on random inputs only: {error.message}.",)


def shapes_of_data(request: PruneRequest) -> DataShapes | None:
    """A lookup of the shapes of the user's data, for models with open axes."""
    if not request.data or (request.data.startswith(RANDOM_PREFIX) and "shape=" not in request.data):
        # Random data have the shapes that the model declares.
        return None

    def shapes(signature: ModelSignature) -> Sequence[tuple[int, ...]]:
        from prunectl.calibration.session import load_inputs  # noqa: PLC0415 - most cuts look at no data

        arrays, _ = load_inputs(request.data, signature, 1, EpochOrder(1, request.seed, is_shuffled=False))
        return [array.shape[1:] for array in arrays]

    return shapes


def _batches(
    adapter: GraphAdapter, request: PruneRequest, *, is_channels_first: bool
) -> tuple[tuple[Feeds, ...], tuple[str, ...]]:
    from prunectl.calibration.session import load_inputs, padded_batch_rows  # noqa: PLC0415 - most cuts look at no data

    example = adapter.random_inputs(np.random.default_rng(request.seed))
    names = adapter.graph.inputs
    ports = tuple(TensorSpec(name, example[name].shape[1:], str(example[name].dtype)) for name in names)
    signature = ModelSignature(ports, (), is_channels_first=is_channels_first)
    size = len(example[names[0]])
    order = EpochOrder(request.batch_size or BATCH_SIZE, request.seed, is_shuffled=True)
    arrays, notes = load_inputs(request.data, signature, min(request.samples, size * _BATCHES), order)
    rows = padded_batch_rows(len(arrays[0]), size)
    feeds = tuple(dict(zip(names, (array[row] for array in arrays), strict=True)) for row in rows)
    return feeds, notes
