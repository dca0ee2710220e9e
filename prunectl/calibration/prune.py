"""Prune a model file with calibration data, and write the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from prunectl.analysis.patterns import BlockPattern
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.calibration import statistics
from prunectl.calibration.blocks import block_threads
from prunectl.calibration.im2col import scatter_rows, weight_matrix
from prunectl.calibration.match import OutputMatcher, masked, refuse_untrainable
from prunectl.calibration.reconstruct import BLOCK, DAMP, BlockwiseReconstructor, Reconstructor
from prunectl.calibration.session import (
    BlockwiseCalibration,
    Calibration,
    CalibrationSession,
    note_about,
    open_calibration,
)
from prunectl.calibration.sparsegpt import inverse_cholesky
from prunectl.calibration.sparsegpt import scores as obs_scores
from prunectl.calibration.statistics import Float64Array, InputStatistics, covers_all_outputs, rank_per_output
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.extents import unchanged
from prunectl.formats.registry import open_model
from prunectl.pruning import destination as outputs
from prunectl.pruning import plan as planning
from prunectl.pruning.destination import Destination
from prunectl.pruning.engine import PrunedTensors, PruningMethod
from prunectl.pruning.plan import Plan, Scope
from prunectl.pruning.prune import Pruned
from prunectl.pruning.prune import prune as prune_file
from prunectl.pruning.request import PruneRequest, resolve_method
from prunectl.pruning.strategies import BlockContext, Requires, Strategy, magnitude


def with_data_scores(
    read: Callable[[Tensor], Array],
    tensors: Sequence[Tensor],
    method: PruningMethod,
    scope: Scope,
    calibration: Calibration,
) -> tuple[PruningMethod, tuple[str, ...]]:
    """The method with data-based scores precomputed, and the tensors that fall back to magnitude."""
    strategy = method.strategy
    if strategy.needs is Requires.GRADIENTS:
        gradients = calibration.gradients(tensors, statistics.gradient_reduction(strategy.name))
        scores_by_name = {
            tensor.name: statistics.gradient_scores(strategy.name, read(tensor), gradients[tensor.name])
            for tensor in tensors
        }
        return replace(method, strategy=_with_scores(strategy, scores_by_name)), ()
    if strategy.needs is Requires.PRODUCTS:
        is_ranked = scope is Scope.GLOBAL or isinstance(method.pattern, BlockPattern)
        scores_by_name = _costs(read, tensors, calibration, strategy) if is_ranked else {}
        if scope is Scope.GLOBAL:
            scores_by_name |= _costs_without_data(
                read, [tensor for tensor in tensors if tensor.name not in scores_by_name]
            )
        return replace(method, strategy=_with_scores(strategy, scores_by_name)), ()
    is_by_output = scope is not Scope.GLOBAL and not isinstance(method.pattern, BlockPattern)
    norms = _norms(calibration, tensors, strategy)
    unseen = tuple(tensor.name for tensor in tensors if tensor.name not in norms)
    # A tensor without captured inputs is ranked as if each of its inputs had the median norm.
    median_norm = float(np.median(np.concatenate([_flat(sums) for sums in norms.values()]))) if norms else 1.0

    def score(weights: Array, context: BlockContext) -> Array:
        # Computed when the tensor is pruned: the scores of all tensors together are larger than the model.
        if context.name not in norms:
            return magnitude(weights, context).astype(np.float64) * median_norm
        scores = statistics.wanda_scores(weights, norms[context.name])
        return rank_per_output(scores, norms[context.name]) if is_by_output else scores

    scored = replace(strategy, score=score, is_elementwise=False, needs=Requires.NOTHING)
    return replace(method, strategy=scored), unseen


def _ranked(
    tensors: Sequence[Tensor], method: PruningMethod, calibration: Calibration, weights: Mapping[str, Array]
) -> PruningMethod:
    """The method with scores over all layers, of weights that have changed."""
    return with_data_scores(lambda tensor: weights[tensor.name], tensors, method, Scope.GLOBAL, calibration)[0]


def _norms(calibration: Calibration, tensors: Sequence[Tensor], strategy: Strategy) -> dict[str, InputStatistics]:
    """Input norms by feature, of tensors whose outputs are all observed."""
    is_square = strategy.params.get("norm", "2") == "2"
    statistics_by_name = calibration.accumulate(tensors, statistics.sum_squares if is_square else statistics.sum_abs)
    for sums in statistics_by_name.values():
        for part, total in sums.totals.items():
            mean = total / sums.counts[part]
            sums.totals[part] = np.sqrt(mean) if is_square else mean
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return {name: sums for name, sums in statistics_by_name.items() if covers_all_outputs(shapes[name], sums)}


def _costs(
    read: Callable[[Tensor], Array], tensors: Sequence[Tensor], calibration: Calibration, strategy: Strategy
) -> dict[str, Array]:
    """Optimal brain surgeon costs of pruning each weight, as a share of the layer's output energy.

    Shares can be compared between layers, whose outputs differ in size and in the number of positions.
    """
    costs_by_name: dict[str, Array] = {}
    for tensor, gram in calibration.grams(tensors):
        if not covers_all_outputs(tensor.shape, gram):
            continue
        weights: Float64Array = read(tensor).astype(np.float64)
        values, total_energy = np.zeros(tensor.shape), 0.0
        for part, use in gram.uses.items():
            rows, totals = weight_matrix(weights, use), gram.totals[part]
            roots = [inverse_cholesky(total, strategy.params.get("damp", 0.01)) for total in totals]
            costs = [obs_scores(rows[group], *root) for group, root in enumerate(roots)]
            values = scatter_rows(np.stack(costs), use, values)
            total_energy += float(np.sum(np.matmul(rows, totals) * rows))
        costs_by_name[tensor.name] = _shares(values, total_energy)
    return costs_by_name


def _costs_without_data(read: Callable[[Tensor], Array], tensors: Sequence[Tensor]) -> dict[str, Array]:
    """The costs of tensors whose inputs are not observed, as if their inputs were uncorrelated and of equal size."""
    squares = {tensor.name: np.square(read(tensor).astype(np.float64)) for tensor in tensors}
    return {name: _shares(values, float(values.sum())) for name, values in squares.items()}


def _shares(values: Float64Array, total: float) -> Float64Array:
    return values / total if total > 0 else values


def _flat(sums: InputStatistics) -> Array:
    return np.concatenate([total.reshape(-1) for total in sums.totals.values()])


def _with_scores(strategy: Strategy, scores_by_name: Mapping[str, Array]) -> Strategy:
    def score(weights: Array, context: BlockContext) -> Array:
        if context.name in scores_by_name:
            return scores_by_name[context.name]
        return magnitude(weights, context).astype(np.float64)

    return replace(strategy, score=score, is_elementwise=False, is_precomputed=True, needs=Requires.NOTHING)


def prune(
    path: Path,
    request: PruneRequest,
    output: Destination | None,
    *,
    has_digests: bool = False,
    is_trusted: bool = False,
    method: PruningMethod | None = None,
    meter: ProgressFactory = no_progress,
    allow_empty: bool = False,
) -> Pruned:
    """Prune a model with calibration data."""
    model, method = open_model(path), method or resolve_method(request)
    outputs.check(model, output)
    if request.is_matched:
        refuse_untrainable(model)
    tensors = planning.select_tensors(model, method.criteria).tensors
    with ExitStack() as stack:
        with unchanged(model.states):
            session = stack.enter_context(closing(_open_session(model, request, method, is_trusted=is_trusted)))
            stack.enter_context(block_threads())
            ready = _prepare(session, model, request, method, tensors=tensors, meter=meter)
        pruned = prune_file(
            model, request, output, has_digests=has_digests, method=ready.method, allow_empty=allow_empty
        )
        notes = (*pruned.notes, *ready.notes)
        if ready.reconstructor is not None:
            notes += _reconstruction_notes(pruned, ready.reconstructor, session.calibration.examples, request)
        notes += tuple(ready.matcher.notes) if ready.matcher is not None else ()
    return replace(pruned, notes=notes)


def _reconstructs(request: PruneRequest, method: PruningMethod) -> bool:
    """Whether kept weights are changed to compensate for the pruned ones."""
    return method.strategy.needs is Requires.PRODUCTS or request.is_repaired


def _open_session(
    model: ModelFile, request: PruneRequest, method: PruningMethod, *, is_trusted: bool
) -> CalibrationSession:
    needs, reconstructs = method.strategy.needs, _reconstructs(request, method)
    # Gradients, training, and reconstruction with a global scope or block pattern need the whole model in memory.
    is_blockwise = needs is not Requires.GRADIENTS and not request.is_matched
    if reconstructs:
        is_blockwise &= method.criteria.scope is not Scope.GLOBAL and not isinstance(method.pattern, BlockPattern)
    return open_calibration(
        model,
        request,
        is_blockwise=is_blockwise,
        is_trusted=is_trusted,
        needs_targets=needs is Requires.GRADIENTS,
        # The dense outputs of a language model are too large to keep: a copy of the model computes them again.
        has_reference=reconstructs or (request.is_matched and model.folder is not None),
    )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A method with scores from the data, and the reconstructor or matcher that changes the kept weights."""

    method: PruningMethod
    reconstructor: Reconstructor | None
    matcher: OutputMatcher | None
    notes: tuple[str, ...]


def _prepare(
    session: CalibrationSession,
    model: ModelFile,
    request: PruneRequest,
    method: PruningMethod,
    *,
    tensors: Sequence[Tensor],
    meter: ProgressFactory,
) -> _Prepared:
    """Score the weights by the data, and attach the reconstructor or matcher of the kept weights to the method."""
    calibration, notes = session.calibration, session.notes
    scope, needs = method.criteria.scope, method.strategy.needs
    reconstructor = _reconstructor(calibration, request, method) if _reconstructs(request, method) else None
    if reconstructor is not None and scope is Scope.GLOBAL:
        if model.folder is not None and not request.model:
            notes += ("The whole model was loaded; with --scope layer it is processed one block at a time.",)
        if needs is Requires.PRODUCTS:
            reconstructor.rank = partial(_ranked, tensors, method, calibration)
    if needs is not Requires.NOTHING:
        method, unseen = with_data_scores(model.read, tensors, method, scope, calibration)
        notes += note_about("ranked by magnitude, because their inputs cannot be captured", unseen)
    matcher: OutputMatcher | None = None
    if request.is_matched and session.trainable is not None:
        start = masked if reconstructor is None else reconstructor.fit
        copy = calibration.reference
        matcher = OutputMatcher(calibration.batches, session.trainable, request, start, meter, copy=copy)
        method = replace(method, weight_updater=matcher.solve)
    elif reconstructor is not None:
        solver = _ReconstructWithBatchNorm(session, reconstructor) if request.is_repaired else reconstructor
        method = replace(method, weight_updater=solver.solve)
    return _Prepared(method, reconstructor, matcher, notes)


def _reconstructor(calibration: Calibration, request: PruneRequest, method: PruningMethod) -> Reconstructor:
    params = method.strategy.params
    kind = BlockwiseReconstructor if isinstance(calibration, BlockwiseCalibration) else Reconstructor
    return kind(
        calibration,
        method.strategy.name if method.strategy.needs is Requires.PRODUCTS else "",
        request.is_repaired,
        params.get("damp", DAMP),
        params.get("blocksize", BLOCK),
        params.get("stages", 1),
    )


def _reconstruction_notes(
    pruned: Pruned, reconstructor: Reconstructor, examples: int, request: PruneRequest
) -> tuple[str, ...]:
    """Notes on how many tensors were reconstructed, without those that lost all weights, and which were not."""
    cuts = [cut for cut in pruned.plan.cuts if cut.tensor.name not in reconstructor.skipped]
    count = sum(pruned.counts[cut.tensor.name].dropped < cut.tensor.size for cut in cuts)
    tensors = f"{count} tensor{'s' * (count != 1)}"
    sentence = f"Weights of {tensors} were reconstructed from {examples} examples of {request.data}."
    how = "ranked by magnitude and not reconstructed" if reconstructor.strategy else "not reconstructed"
    skipped = note_about(f"{how}, because their inputs cannot be captured", tuple(reconstructor.skipped))
    return (*([sentence] if count else []), *skipped)


class _ReconstructWithBatchNorm:
    """Reconstructs, then recalibrates batch normalisation if the model is in a framework that can train it."""

    def __init__(self, session: CalibrationSession, reconstructor: Reconstructor) -> None:
        self._session, self._solver = session, reconstructor
        self._before = session.trainable.tensors() if session.trainable is not None else {}

    def solve(self, model: ModelFile, plan: Plan, method: PruningMethod) -> PrunedTensors:
        """The pruned and reconstructed tensors, with changed biases and batch-norm statistics."""
        network, batches = self._session.trainable, self._session.calibration.batches
        if network is not None:
            network.assign(self._before)
        solution = self._solver.solve(model, plan, method)
        if network is None or not network.recalibrate(iter(batches)):
            return solution
        after, pruned = network.tensors(), {pruned.tensor.name for pruned in plan.cuts}
        statistics = {
            name: after[name]
            for name, before in self._before.items()
            if name not in pruned and not np.array_equal(after[name], before)
        }
        return replace(solution, updated={**statistics, **solution.updated})
