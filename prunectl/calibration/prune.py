"""Pruning by what data does in the model, from a file to a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from prunectl.analysis.patterns import BlockPattern
from prunectl.calibration import scores, statistics
from prunectl.calibration.im2col import scatter_rows, weight_matrix
from prunectl.calibration.reconstruct import BLOCK, DAMP, Reconstructor
from prunectl.calibration.session import Calibration, CalibrationSession, note_about, open_calibration
from prunectl.calibration.sparsegpt import inverse_cholesky
from prunectl.calibration.sparsegpt import scores as obs_scores
from prunectl.calibration.statistics import Float64Array, InputStatistics
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.registry import by_name, open_model
from prunectl.pruning import destination as outputs
from prunectl.pruning import plan as planning
from prunectl.pruning.destination import Destination
from prunectl.pruning.engine import PrunedTensors, PruningMethod
from prunectl.pruning.plan import Plan, Scope
from prunectl.pruning.prune import Pruned
from prunectl.pruning.prune import prune as prune_file
from prunectl.pruning.request import PruneRequest, resolve_method, selection_of
from prunectl.pruning.strategies import BlockContext, Requires, Strategy, magnitude

Scores = Mapping[str, Array]


def with_data_scores(
    model: ModelFile, tensors: Sequence[Tensor], method: PruningMethod, scope: Scope, calibration: Calibration
) -> tuple[PruningMethod, tuple[str, ...]]:
    """Return a method that knows the scores of all tensors, and those that it had to rank by magnitude."""
    strategy = method.strategy
    if strategy.needs is Requires.GRADIENTS:
        found = calibration.gradients(tensors, scores.of_gradients(strategy.name))
        known = {
            tensor.name: scores.gradient_scores(strategy.name, model.read(tensor), found[tensor.name])
            for tensor in tensors
        }
        return replace(method, strategy=_with_scores(strategy, known, 1.0)), ()
    if strategy.needs is Requires.PRODUCTS:
        is_ranked = scope is Scope.GLOBAL or isinstance(method.pattern, BlockPattern)
        known = _costs(model, tensors, calibration, strategy) if is_ranked else {}
        if scope is Scope.GLOBAL:
            known |= _costs_without_data(model, [tensor for tensor in tensors if tensor.name not in known])
        return replace(method, strategy=_with_scores(strategy, known, 1.0)), ()
    is_by_output = scope is not Scope.GLOBAL and not isinstance(method.pattern, BlockPattern)
    norms = _norms(calibration, tensors, strategy)
    known = {}
    for tensor in tensors:
        weights = model.read(tensor)
        if tensor.name in norms:
            score = scores.wanda_scores(weights, norms[tensor.name])
            known[tensor.name] = scores.rank_per_output(score, norms[tensor.name]) if is_by_output else score
    left = tuple(tensor.name for tensor in tensors if tensor.name not in known)
    # Beside others, a magnitude counts as if it met what the others meet on the average.
    usual = float(np.median(np.concatenate([_flat(one) for one in norms.values()]))) if norms else 1.0
    return replace(method, strategy=_with_scores(strategy, known, usual)), left


def _norms(calibration: Calibration, tensors: Sequence[Tensor], strategy: Strategy) -> dict[str, InputStatistics]:
    """Return the norm of every feature, of those tensors whose outputs were all seen."""
    is_square = strategy.params.get("norm", "2") == "2"
    found = calibration.sums(tensors, statistics.squares if is_square else statistics.sizes)
    for sums in found.values():
        for part, total in sums.totals.items():
            mean = total / sums.counts[part]
            sums.totals[part] = np.sqrt(mean) if is_square else mean
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return {name: sums for name, sums in found.items() if scores.covers_all_outputs(shapes[name], sums)}


def _costs(
    model: ModelFile, tensors: Sequence[Tensor], calibration: Calibration, strategy: Strategy
) -> dict[str, Array]:
    """Return what dropping each weight costs if the others make up for it, as a share of what its layer puts out.

    A share, since layers are seen at more or fewer positions, and what they put out is larger or smaller.
    """
    found: dict[str, Array] = {}
    for tensor in tensors:
        products = calibration.products(tensor)
        if not scores.covers_all_outputs(tensor.shape, products):
            continue
        weights: Float64Array = model.read(tensor).astype(np.float64)
        values, whole = np.zeros(tensor.shape), 0.0
        for part, use in products.uses.items():
            rows, totals = weight_matrix(weights, use), products.totals[part]
            roots = [inverse_cholesky(total, strategy.params.get("damp", 0.01)) for total in totals]
            costs = [obs_scores(rows[group], *root) for group, root in enumerate(roots)]
            values = scatter_rows(np.stack(costs), use, values)
            whole += float(np.sum(np.matmul(rows, totals) * rows))
        found[tensor.name] = _shares(values, whole)
    return found


def _costs_without_data(model: ModelFile, tensors: Sequence[Tensor]) -> dict[str, Array]:
    """Return the same for tensors of which it cannot be told what they meet, as if all of that were alike."""
    found = {tensor.name: np.square(model.read(tensor).astype(np.float64)) for tensor in tensors}
    return {name: _shares(values, float(values.sum())) for name, values in found.items()}


def _shares(values: Float64Array, whole: float) -> Float64Array:
    return values / whole if whole > 0 else values


def _flat(sums: InputStatistics) -> Array:
    return np.concatenate([total.reshape(-1) for total in sums.totals.values()])


def _with_scores(strategy: Strategy, known: Scores, usual: float) -> Strategy:
    def score(weights: Array, place: BlockContext) -> Array:
        if place.name in known:
            return known[place.name]
        return magnitude(weights, place).astype(np.float64) * usual

    return replace(strategy, score=score, is_elementwise=False, is_known=True, needs=Requires.NOTHING)


def prune(
    path: Path,
    request: PruneRequest,
    output: Destination | None,
    *,
    has_digests: bool = False,
    is_trusted: bool = False,
) -> Pruned:
    """Prune a model by what some data does in it."""
    model, method = open_model(path), resolve_method(request)
    outputs.check(model, output)
    wish, needs = selection_of(request), method.strategy.needs
    choice = planning.select_tensors(model, wish, can_reencode=by_name(model.format).is_reencoded)
    is_fitted = needs is Requires.PRODUCTS or request.is_repaired
    found = open_calibration(
        model,
        request,
        is_trusted=is_trusted,
        needs_targets=needs is Requires.GRADIENTS,
        has_reference=is_fitted,
    )
    with closing(found):
        notes = found.notes
        solver: Reconstructor | None = None
        if is_fitted:
            params = method.strategy.params
            solver = Reconstructor(
                found.calibration,
                needs is Requires.PRODUCTS,
                request.is_repaired,
                params.get("damp", DAMP),
                params.get("blocksize", BLOCK),
            )
        if needs is not Requires.NOTHING:
            method, left = with_data_scores(model, choice.tensors, method, wish.scope, found.calibration)
            notes += note_about("ranked by magnitude: what they meet cannot be seen", left)
        if solver is not None:
            method = replace(
                method, solver=_ReconstructWithBatchNorm(found, solver).solve if request.is_repaired else solver.solve
            )
        pruned = prune_file(path, request, output, has_digests=has_digests, method=method)
        if solver is not None:
            fitted = sum(cut.tensor.name not in solver.unfitted for cut in pruned.plan.cuts)
            examples = found.calibration.examples
            notes += (f"What stays of {fitted} tensors was fitted anew to {examples} examples of {request.data}.",)
            how = "ranked by magnitude and not fitted anew" if solver.is_obs else "not fitted anew"
            notes += note_about(f"{how}: what they meet cannot be seen", tuple(solver.unfitted))
    return replace(pruned, notes=notes)


class _ReconstructWithBatchNorm:
    """Solves, and takes the statistics of batch normalisation anew where the model can be trained."""

    def __init__(self, found: CalibrationSession, solver: Reconstructor) -> None:
        self._found, self._solver = found, solver
        self._before = found.trained.tensors() if found.trained is not None else {}

    def solve(self, model: ModelFile, plan: Plan, method: PruningMethod) -> PrunedTensors:
        """Return what becomes of the tensors of a plan, of biases and of statistics."""
        network, batches = self._found.trained, self._found.calibration.batches
        if network is not None:
            network.assign(self._before)
        solution = self._solver.solve(model, plan, method)
        if network is None or not network.recalibrate(iter(batches)):
            return solution
        after, cut = network.tensors(), {cut.tensor.name for cut in plan.cuts}
        statistics = {
            name: after[name]
            for name, before in self._before.items()
            if name not in cut and not np.array_equal(after[name], before)
        }
        return replace(solution, others={**statistics, **solution.others})
