"""Sensitivity analysis: each tensor pruned alone at a few sparsities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunectl.analysis.stats import find_tied_tensors
from prunectl.analysis.tensor_io import ProgressFactory, no_progress, nonzero_mask
from prunectl.calibration import statistics
from prunectl.calibration.im2col import im2col_by_group, weight_matrix
from prunectl.calibration.passes import AHEAD_BYTES
from prunectl.calibration.session import (
    Calibration,
    CalibrationSession,
    groups_in_memory,
    note_about,
    open_calibration,
)
from prunectl.calibration.statistics import Float64Array, InputStatistics
from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array, ModelFile, Tensor, select_names
from prunectl.pruning.masks import threshold
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.strategies import BlockContext, magnitude
from prunectl.training.backend import LayerInput, Logs, TrainableModel, TrainOptions
from prunectl.training.data import adapt
from prunectl.training.data.source import Batch, as_tuple

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""The sparsities at which each tensor is measured."""


@dataclass(frozen=True, slots=True)
class Score:
    """Loss and accuracy of a model on the examples."""

    loss: float | None
    """None if it is NaN or infinite."""
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class SensitivityPoint:
    """Errors of a tensor, and of the model, when that tensor alone is pruned by magnitude."""

    sparsity: float
    weight_error: float
    """Norm of the pruned weights, as a share of the norm of all."""
    output_error: float | None = None
    """Norm of the error of the layer's outputs, as a share of their norm; None if they were not observed."""
    score: Score | None = None
    """Loss and accuracy of the whole model; None where they were not measured."""


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One tensor at every sparsity."""

    name: str
    weights: int
    points: tuple[SensitivityPoint, ...]
    first_dead_sparsity: float | None = None
    """The first sparsity at which one of its outputs loses all its weights."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """All tensors of a model, in the order of its file."""

    layers: tuple[LayerSensitivity, ...]
    data: str = ""
    """The data that it was measured with; empty if only weights were compared."""
    examples: int = 0
    base: Score | None = None
    """Score of the unpruned model."""
    notes: tuple[str, ...] = ()


Levels = NDArray[np.uint8]
"""For each weight, the index in `SPARSITIES` at which it is pruned first; `len(SPARSITIES)` if it never is."""


def pruning_levels(weights: Array) -> Levels:
    """The index of the sparsity at which each weight is pruned: the smallest first, ties in order."""
    scores = magnitude(weights, BlockContext("", 0, 0))
    result = np.full(weights.shape, len(SPARSITIES), np.uint8)
    # From the highest down: weights that are pruned at a low sparsity are pruned at every higher one too.
    for level in reversed(range(len(SPARSITIES))):
        cut = threshold([lambda: iter([scores])], round(SPARSITIES[level] * weights.size), weights.size)
        result[cut.masker(0).mask(scores)] = level
    return result


def pruned(weights: Array, prune_levels: Levels, level: int) -> Array:
    """The weights, with those that are pruned at a level set to zero."""
    return np.where(prune_levels <= level, np.zeros((), weights.dtype), weights)


def weight_errors(weights: Array, prune_levels: Levels) -> tuple[float, ...]:
    """Relative weight error at each sparsity: norm of what is pruned over the norm of all."""
    squares = np.square(weights.astype(np.float64)).reshape(-1)
    shares = np.bincount(prune_levels.reshape(-1), weights=squares, minlength=len(SPARSITIES) + 1)
    total = float(shares.sum())
    lost = np.cumsum(shares)[: len(SPARSITIES)]
    return tuple(float(error) for error in (np.sqrt(lost / total) if total else np.zeros_like(lost)))


def first_dead_sparsity(weights: Array, prune_levels: Levels, out_axis: int | None) -> float | None:
    """The first sparsity at which an output that has weights loses all of them; None if none does."""
    if out_axis is None:
        return None
    others = tuple(axis for axis in range(weights.ndim) if axis != out_axis)
    last_levels = np.where(nonzero_mask(weights), prune_levels.astype(np.int16), -1).max(axis=others)
    first = last_levels[last_levels >= 0].min(initial=len(SPARSITIES))
    return SPARSITIES[first] if first < len(SPARSITIES) else None


Errors = tuple[float | None, ...]


def output_errors(
    calibration: Calibration, tensors: Sequence[Tensor], weights: Mapping[str, Array], levels: Mapping[str, Levels]
) -> dict[str, Errors]:
    """Relative output errors of each tensor at each sparsity, without biases, from one pass over the data.

    A tensor is left out if not all its outputs were observed. An error is None if only the dense outputs are zero.
    """

    def squared_errors(capture: LayerInput, kernel: tuple[int, ...]) -> tuple[Float64Array, int]:
        return _squared_errors(capture, kernel, weights[capture.name], levels[capture.name])

    errors = calibration.accumulate(tensors, squared_errors)
    return {
        tensor.name: _relative(errors[tensor.name])
        for tensor in tensors
        if tensor.name in errors and statistics.covers_all_outputs(tensor.shape, errors[tensor.name])
    }


def _relative(errors: InputStatistics) -> Errors:
    *squares, energy = np.sum(list(errors.totals.values()), axis=0).tolist()
    if not energy:
        return tuple(None if square else 0.0 for square in squares)
    return tuple(float(np.sqrt(square / energy)) for square in squares)


def _squared_errors(
    capture: LayerInput, kernel: tuple[int, ...], weights: Array, prune_levels: Levels
) -> tuple[Float64Array, int]:
    """The sum of squared output errors at each sparsity and, last, the sum of squared outputs.

    Computed from the outputs, since a Gram matrix would take memory with the square of the number of inputs.
    """
    rows, levels = weight_matrix(weights, capture.use).astype(np.float32), weight_matrix(prune_levels, capture.use)
    errors, positions = np.zeros(len(SPARSITIES) + 1), 0
    for inputs in im2col_by_group(capture.inputs, capture.use, kernel, len(rows) * rows.shape[1]):
        for level in range(len(errors)):
            # The last level includes every weight: its error is the output itself.
            part = np.where(levels <= level, rows, np.float32(0))
            errors[level] += np.square(np.matmul(inputs, part.transpose(0, 2, 1)), dtype=np.float64).sum()
        positions += inputs.shape[1]
    return errors, positions


_ACCURACIES = ("accuracy", "acc", "sparse_categorical_accuracy", "categorical_accuracy", "binary_accuracy")


def prepare(network: TrainableModel, batches: tuple[Batch, ...], loss: str, seed: int, name: str) -> None:
    """Choose the loss, and refuse labels that are no class of the model."""
    network.prepare(TrainOptions(loss=loss, optimizer="sgd", lr=0.0, seed=seed, example=batches[0]))
    tasks, begin = adapt.infer_tasks(network.signature, batches[0]), 0
    for batch in batches:
        if batch.y is not None:
            adapt.check_labels(batch.y, tasks, network.signature, name=f"{name} (shuffled)", begin=begin)
        begin += len(as_tuple(batch.x)[0])


def dense_score(network: TrainableModel, batches: tuple[Batch, ...]) -> Score:
    """The score of the unpruned model."""
    score = _score(network.evaluate(iter(batches)))
    if score.loss is None:
        raise WorkError(
            "the loss of the unpruned model is NaN or infinite",
            hint="check that the data is scaled as in training (?norm=unit) and that --loss is right",
        )
    return score


def scores_at_each_level(
    network: TrainableModel, batches: tuple[Batch, ...], name: str, weights: Array, prune_levels: Levels
) -> tuple[Score, ...]:
    """The model's score at each sparsity of one tensor, which is restored afterwards."""
    scores = []
    for level in range(len(SPARSITIES)):
        network.assign({name: pruned(weights, prune_levels, level)})
        scores.append(_score(network.evaluate(iter(batches))))
    network.assign({name: weights})
    return tuple(scores)


def _score(logs: Logs) -> Score:
    loss = float(logs["loss"])
    accuracy = next((float(logs[name]) for name in _ACCURACIES if name in logs), None)
    return Score(loss if math.isfinite(loss) else None, accuracy)


_Measured = tuple[list[LayerSensitivity], tuple[str, ...]]


def sensitivity(
    model: ModelFile,
    request: PruneRequest,
    *,
    layers: str = "",
    is_trusted: bool = False,
    meter: ProgressFactory = no_progress,
) -> Sensitivity:
    """Measure how much pruning harms each prunable tensor; with data, also its outputs, loss and accuracy."""
    tensors = _prunable(model, layers)
    if not tensors:
        return Sensitivity(
            (), notes=("Sensitivity is measured for kernels only, and none of these tensors is a kernel.",)
        )
    if not request.data:
        measured, notes = _measure_layers(model, tensors, None, None, meter)
        return Sensitivity(tuple(measured), notes=(*_wrapper_note(model), *notes))
    session = open_calibration(model, request, is_trusted=is_trusted, needs_targets=False, has_reference=False)
    with closing(session):
        base, base_notes = _dense_score(model, session, request)
        measured, notes = _measure_layers(model, tensors, session, base, meter)
        own = session.trainable.notes if session.trainable is not None and base is not None else ()
        notes = tuple(dict.fromkeys((*session.notes, *own, *base_notes, *notes)))
        return Sensitivity(tuple(measured), request.data, session.calibration.examples, base, notes)


def _prunable(model: ModelFile, layers: str) -> tuple[Tensor, ...]:
    """The tensors that the default policy prunes, each storage once."""
    chosen = select_names(model, layers) if layers else model.tensors
    candidates = [
        tensor for tensor in chosen if tensor.is_prunable and tensor.size and tensor.name not in model.duplicates
    ]
    tied = find_tied_tensors(candidates)
    return tuple(tensor for tensor in candidates if tensor.name not in tied)


def _wrapper_note(model: ModelFile) -> tuple[str, ...]:
    if not model.about.pruning_wrappers:
        return ()
    return ("Weights behind the masks of pruning wrappers were not measured: apply the masks with `prunectl strip`.",)


def _dense_score(
    model: ModelFile, session: CalibrationSession, request: PruneRequest
) -> tuple[Score | None, tuple[str, ...]]:
    """The score of the dense model, or None and a note that says why."""
    batches = session.calibration.batches
    has_targets = batches[0].y is not None
    if session.trainable is not None and has_targets:
        prepare(session.trainable, batches, request.loss, request.seed, request.data)
        return dense_score(session.trainable, batches), ()
    reason = (
        f"{request.data} has no targets"
        if not has_targets
        else f"{model.path} runs in onnxruntime, which computes no loss: the targets of {request.data} are not used"
    )
    if request.loss:
        raise UsageError(f"--loss cannot be used: {reason}")
    return None, (f"Only the outputs of each layer were compared: {reason}.",)


def _measure_layers(
    model: ModelFile,
    tensors: Sequence[Tensor],
    session: CalibrationSession | None,
    base: Score | None,
    meter: ProgressFactory,
) -> _Measured:
    """Measure the tensors, in groups that fit in memory; without data, one at a time."""
    measured: list[LayerSensitivity] = []
    nonfinite, unobserved = [], []
    trained_names = (
        frozenset(session.trainable.tensors()) if session is not None and session.trainable is not None else None
    )
    by_name = {tensor.name: tensor for tensor in tensors}
    sizes = {name: _COPIES * tensor.nbytes if session is not None else AHEAD_BYTES for name, tensor in by_name.items()}
    with meter(f"pruning {model.path.name} tensor by tensor", sum(tensor.nbytes for tensor in tensors)) as bar:
        for names in groups_in_memory(by_name, sizes):
            weights = {name: np.array(model.read(by_name[name])) for name in names}
            finite = [name for name in names if np.isfinite(weights[name]).all()]
            nonfinite += [name for name in names if name not in finite]
            levels = {name: pruning_levels(weights[name]) for name in finite}
            known = [by_name[name] for name in finite if trained_names is None or name in trained_names]
            errors = output_errors(session.calibration, known, weights, levels) if session is not None else {}
            for name in names:
                if name in finite:
                    scored = session if by_name[name] in known and base is not None else None
                    layer = _measure_layer(by_name[name], weights[name], levels[name], errors.get(name), scored)
                    if session is not None and layer.points[0].output_error is None:
                        unobserved.append(name)
                    measured.append(layer)
                bar.advance(by_name[name].nbytes)
    notes = (
        *note_about("left out, because they hold NaN or infinity", nonfinite),
        *note_about("output error unknown, because their inputs cannot be captured", unobserved),
    )
    return measured, notes


_COPIES = 4
"""Memory that measuring a tensor takes, in multiples of its bytes: weights and levels, and both as matrices."""


def _measure_layer(
    tensor: Tensor, weights: Array, prune_levels: Levels, errors: Errors | None, scored: CalibrationSession | None
) -> LayerSensitivity:
    scores: tuple[Score | None, ...] = (None,) * len(SPARSITIES)
    if scored is not None and scored.trainable is not None:
        scores = scores_at_each_level(scored.trainable, scored.calibration.batches, tensor.name, weights, prune_levels)
    rows = zip(
        SPARSITIES, weight_errors(weights, prune_levels), errors or (None,) * len(SPARSITIES), scores, strict=True
    )
    points = tuple(SensitivityPoint(*row) for row in rows)
    return LayerSensitivity(
        tensor.name, tensor.size, points, first_dead_sparsity(weights, prune_levels, tensor.out_axis)
    )


MAX_OUTPUT_ERROR = 0.5
MAX_ACCURACY_FALL = 0.1


@dataclass(frozen=True, slots=True)
class Collapse:
    """A tensor, the first sparsity at which it collapses, and why."""

    name: str
    sparsity: float
    reasons: tuple[str, ...]
    size: float
    """The output error at this sparsity, or the weight error where the output error is not known."""


def collapses(report: Sensitivity) -> tuple[Collapse, ...]:
    """The tensors that collapse, the worst first: by the lowest sparsity, then by the largest error."""
    collapsed = filter(None, (_collapse(layer, report.base) for layer in report.layers))
    return tuple(sorted(collapsed, key=lambda collapse: (collapse.sparsity, -collapse.size)))


def _collapse(layer: LayerSensitivity, base: Score | None) -> Collapse | None:
    for point in layer.points:
        reasons = []
        if layer.first_dead_sparsity is not None and layer.first_dead_sparsity <= point.sparsity:
            reasons.append("an output has no weights left but zeros")
        if point.output_error is not None and point.output_error > MAX_OUTPUT_ERROR:
            reasons.append(f"output error {100 * point.output_error:.0f} %")
        fall = _accuracy_fall(base, point.score)
        if fall > MAX_ACCURACY_FALL:
            reasons.append(f"accuracy falls by {100 * fall:.0f} percentage points")
        if reasons:
            size = point.weight_error if point.output_error is None else point.output_error
            return Collapse(layer.name, point.sparsity, tuple(reasons), size)
    return None


def _accuracy_fall(base: Score | None, now: Score | None) -> float:
    if base is None or now is None or base.accuracy is None or now.accuracy is None:
        return 0.0
    # Some accuracies are in float32: rounding must not decide about a fall of exactly the limit.
    return round(base.accuracy - now.accuracy, 6)
