"""Pruning by what data does in the model, from a file to a file."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from prunectl.calibrating.informed import informed
from prunectl.calibrating.opening import Opened, opened
from prunectl.calibrating.said import said
from prunectl.calibrating.solver import BLOCK, DAMP, Solver
from prunectl.formats.base import ModelFile
from prunectl.formats.table import by_name, open_model
from prunectl.pruning import output as outputs
from prunectl.pruning import plan as planning
from prunectl.pruning.execute import Method, Solution
from prunectl.pruning.output import Output
from prunectl.pruning.plan import Plan
from prunectl.pruning.prune import Pruned
from prunectl.pruning.prune import prune as prune_file
from prunectl.pruning.request import Request, method_of, wish_of
from prunectl.pruning.strategies import Needs


def prune(
    path: Path, request: Request, output: Output | None, *, has_digests: bool = False, is_trusted: bool = False
) -> Pruned:
    """Prune a model by what some data does in it."""
    model, method = open_model(path), method_of(request)
    outputs.check(model, output)
    wish, needs = wish_of(request), method.strategy.needs
    choice = planning.choose(model, wish, can_reencode=by_name(model.format).is_reencoded)
    is_fitted = needs is Needs.PRODUCTS or request.is_repaired
    found = opened(
        model,
        request,
        is_trusted=is_trusted,
        needs_targets=needs is Needs.GRADIENTS,
        has_reference=is_fitted,
    )
    with closing(found):
        notes = found.notes
        solver: Solver | None = None
        if is_fitted:
            params = method.strategy.params
            solver = Solver(
                found.calibration,
                needs is Needs.PRODUCTS,
                request.is_repaired,
                params.get("damp", DAMP),
                params.get("blocksize", BLOCK),
            )
        if needs is not Needs.NOTHING:
            method, left = informed(model, choice.tensors, method, wish.scope, found.calibration)
            notes += said("ranked by magnitude: what they meet cannot be seen", left)
        if solver is not None:
            method = replace(method, solver=_Repair(found, solver).solve if request.is_repaired else solver.solve)
        pruned = prune_file(path, request, output, has_digests=has_digests, method=method)
        if solver is not None:
            fitted = sum(cut.tensor.name not in solver.unfitted for cut in pruned.plan.cuts)
            examples = found.calibration.examples
            notes += (f"What stays of {fitted} tensors was fitted anew to {examples} examples of {request.data}.",)
            how = "ranked by magnitude and not fitted anew" if solver.is_obs else "not fitted anew"
            notes += said(f"{how}: what they meet cannot be seen", tuple(solver.unfitted))
    return replace(pruned, notes=notes)


class _Repair:
    """Solves, and takes the statistics of batch normalisation anew where the model can be trained."""

    def __init__(self, found: Opened, solver: Solver) -> None:
        self._found, self._solver = found, solver
        self._before = found.trained.tensors() if found.trained is not None else {}

    def solve(self, model: ModelFile, plan: Plan, method: Method) -> Solution:
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
