"""Strategies that know what data does in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from prunectl.calibrating import moments, scores
from prunectl.calibrating.calibration import Calibration
from prunectl.calibrating.columns import matrix, placed
from prunectl.calibrating.moments import Sums, Wide
from prunectl.calibrating.obs import inverse_root
from prunectl.calibrating.obs import scores as obs_scores
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.measuring.patterns import Block
from prunectl.pruning.execute import Method
from prunectl.pruning.plan import Scope
from prunectl.pruning.strategies import Needs, Place, Strategy, magnitude

Scores = Mapping[str, Array]


def informed(
    model: ModelFile, tensors: Sequence[Tensor], method: Method, scope: Scope, calibration: Calibration
) -> tuple[Method, tuple[str, ...]]:
    """Return a method that knows the scores of all tensors, and those that it had to rank by magnitude."""
    strategy = method.strategy
    if strategy.needs is Needs.GRADIENTS:
        found = calibration.gradients(tensors, scores.of_gradients(strategy.name))
        known = {
            tensor.name: scores.with_gradients(strategy.name, model.read(tensor), found[tensor.name])
            for tensor in tensors
        }
        return replace(method, strategy=_knowing(strategy, known, 1.0)), ()
    if strategy.needs is Needs.PRODUCTS:
        is_ranked = scope is Scope.GLOBAL or isinstance(method.pattern, Block)
        known = _costs(model, tensors, calibration, strategy) if is_ranked else {}
        if scope is Scope.GLOBAL:
            known |= _blind_costs(model, [tensor for tensor in tensors if tensor.name not in known])
        return replace(method, strategy=_knowing(strategy, known, 1.0)), ()
    is_by_output = scope is not Scope.GLOBAL and not isinstance(method.pattern, Block)
    norms = _norms(calibration, tensors, strategy)
    known = {}
    for tensor in tensors:
        weights = model.read(tensor)
        if tensor.name in norms:
            score = scores.with_inputs(weights, norms[tensor.name])
            known[tensor.name] = scores.by_output(score, norms[tensor.name]) if is_by_output else score
    left = tuple(tensor.name for tensor in tensors if tensor.name not in known)
    # Beside others, a magnitude counts as if it met what the others meet on the average.
    usual = float(np.median(np.concatenate([_flat(one) for one in norms.values()]))) if norms else 1.0
    return replace(method, strategy=_knowing(strategy, known, usual)), left


def _norms(calibration: Calibration, tensors: Sequence[Tensor], strategy: Strategy) -> dict[str, Sums]:
    """Return the norm of every feature, of those tensors whose outputs were all seen."""
    is_square = strategy.params.get("norm", "2") == "2"
    found = calibration.sums(tensors, moments.squares if is_square else moments.sizes)
    for sums in found.values():
        for part, total in sums.totals.items():
            mean = total / sums.counts[part]
            sums.totals[part] = np.sqrt(mean) if is_square else mean
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return {name: sums for name, sums in found.items() if scores.is_covered(shapes[name], sums)}


def _costs(
    model: ModelFile, tensors: Sequence[Tensor], calibration: Calibration, strategy: Strategy
) -> dict[str, Array]:
    """Return what dropping each weight costs if the others make up for it, as a share of what its layer puts out.

    A share, since layers are seen at more or fewer positions, and what they put out is larger or smaller.
    """
    found: dict[str, Array] = {}
    for tensor in tensors:
        products = calibration.products(tensor)
        if not scores.is_covered(tensor.shape, products):
            continue
        weights: Wide = model.read(tensor).astype(np.float64)
        values, whole = np.zeros(tensor.shape), 0.0
        for part, use in products.uses.items():
            rows, totals = matrix(weights, use), products.totals[part]
            roots = [inverse_root(total, strategy.params.get("damp", 0.01)) for total in totals]
            costs = [obs_scores(rows[group], *root) for group, root in enumerate(roots)]
            values = placed(np.stack(costs), use, values)
            whole += float(np.sum(np.matmul(rows, totals) * rows))
        found[tensor.name] = _shares(values, whole)
    return found


def _blind_costs(model: ModelFile, tensors: Sequence[Tensor]) -> dict[str, Array]:
    """Return the same for tensors of which it cannot be told what they meet, as if all of that were alike."""
    found = {tensor.name: np.square(model.read(tensor).astype(np.float64)) for tensor in tensors}
    return {name: _shares(values, float(values.sum())) for name, values in found.items()}


def _shares(values: Wide, whole: float) -> Wide:
    return values / whole if whole > 0 else values


def _flat(sums: Sums) -> Array:
    return np.concatenate([total.reshape(-1) for total in sums.totals.values()])


def _knowing(strategy: Strategy, known: Scores, usual: float) -> Strategy:
    def score(weights: Array, place: Place) -> Array:
        if place.name in known:
            return known[place.name]
        return magnitude(weights, place).astype(np.float64) * usual

    return replace(strategy, score=score, is_elementwise=False, is_known=True, needs=Needs.NOTHING)
