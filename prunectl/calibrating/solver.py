"""New numbers for what stays: layer after layer, each with the inputs that those before it now give."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from prunectl.calibrating import moments, obs, scores
from prunectl.calibrating.bias import bias_of, corrected
from prunectl.calibrating.bias import means as outputs
from prunectl.calibrating.calibration import Calibration
from prunectl.calibrating.columns import matrix, placed
from prunectl.calibrating.moments import Pairs, Part, Sums, Wide
from prunectl.calibrating.refit import centred, refit
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.writing import in_storage_order
from prunectl.measuring.patterns import ZerosOf
from prunectl.pruning import live
from prunectl.pruning.execute import Method, Solution
from prunectl.pruning.not_finite import NotFinite
from prunectl.pruning.plan import Choice, Plan
from prunectl.pruning.selection import Mask
from prunectl.training.sights import Use

DAMP = 0.01
BLOCK = 128
Met = Mapping[Part, Pairs]
Fit = tuple[Wide, Mask]
"""New numbers, and what was dropped of the old ones."""


@dataclass(slots=True)
class Solver:
    """Decides and fits, one tensor after the other."""

    calibration: Calibration
    is_obs: bool
    is_repaired: bool
    damp: float = DAMP
    block: int = BLOCK
    unfitted: list[str] = field(default_factory=list)
    """Tensors of which it could not be told what they meet."""
    others: dict[str, Array] = field(default_factory=dict)
    """Biases that changed with them."""

    def solve(self, model: ModelFile, plan: Plan, method: Method) -> Solution:
        """Return what becomes of every tensor of a plan."""
        tensors = {cut.tensor.name: cut.tensor for cut in plan.cuts}
        old = {name: np.array(model.read(tensor)) for name, tensor in tensors.items()}
        kept = live.kept(model, plan, method, Choice(tuple(tensors.values()), (), {}), dict(old))
        self._begin(model, old)
        means = self.calibration.sums(list(tensors.values()), moments.sums)
        for name, met in means.items():
            # Before the first layer is solved, and not after an hour.
            sizes = [total.shape for total in met.totals.values()]
            features = max((size[1] for size in sizes), default=0)
            moments.check_memory(name, groups=sum(size[0] for size in sizes), features=features, kept=2)
        new: dict[str, tuple[Array, Mask]] = {}
        # In the order in which data meets them; what it never meets comes last.
        for name in (*means, *(name for name in tensors if name not in means)):
            tensor, weights, seen = tensors[name], old[name], means.get(name)
            bias = _free_bias(model, tensor, seen, tensors) if self.is_repaired and seen is not None else None
            if seen is not None and np.isfinite(weights).all() and scores.is_covered(tensor.shape, seen):
                values, dropped = self._fit(tensor, weights, ~kept[name], method, seen, has_bias=bias is not None)
            else:
                self.unfitted.append(name)
                stays = kept[name] & (np.isfinite(weights) | (method.not_finite is not NotFinite.ZERO))
                values, dropped = np.where(stays, weights, np.zeros((), weights.dtype)), ~kept[name]
            new[name] = np.where(dropped, 0, values).astype(tensor.dtype), dropped
            self.calibration.network.assign({name: new[name][0]})
            if bias is not None and seen is not None:
                self._correct(model, bias, tensor, outputs(seen, weights), new[name][0])
        made = [partial(_given, cut.tensor, *new[cut.tensor.name]) for cut in plan.cuts]
        return Solution(made, dict(self.others))

    def _begin(self, model: ModelFile, weights: Mapping[str, Array]) -> None:
        """Bring the model back to what it was: a search for a size solves again and again."""
        biases = {tensor.name: np.array(model.read(tensor)) for tensor in model.tensors if tensor.name in self.others}
        self.calibration.network.assign({**weights, **biases})
        self.unfitted.clear()
        self.others.clear()

    def _correct(self, model: ModelFile, bias: Tensor, tensor: Tensor, wanted: Wide, weights: Array) -> None:
        """Have a bias make up for what the outputs of its layer lose on the average."""
        before = self.others[bias.name] if bias.name in self.others else np.array(model.read(bias))
        now = outputs(self.calibration.sums([tensor], moments.sums)[tensor.name], weights)
        if before.size == now.size:
            self.others[bias.name] = corrected(wanted, now, before)
            self.calibration.network.assign({bias.name: self.others[bias.name]})

    def _fit(self, tensor: Tensor, weights: Array, dropped: Mask, method: Method, seen: Sums, *, has_bias: bool) -> Fit:
        """Return new numbers for a tensor of which it is known what it meets."""
        values: Wide = weights.astype(np.float64)
        pairs, start = self.calibration.pairs(tensor), values
        if self.is_obs and _goes_by_columns(tensor, method, seen):
            start, dropped = self._operated(values, pairs, int(np.count_nonzero(dropped)), method)
        return self._refitted(values, start, dropped, pairs, has_bias=has_bias), dropped

    def _operated(self, values: Wide, met: Met, drop: int, method: Method) -> Fit:
        """Return what is dropped column by column, and what the columns after each made of themselves for it."""
        dropped: Mask = np.zeros(values.shape, np.bool_)
        size, pattern = values.size, method.pattern
        found, done, seen = values, 0, 0
        for pairs in met.values():
            use = pairs.use
            rows = matrix(values, use)
            new, gone = np.empty_like(rows), np.zeros(rows.shape, np.bool_)
            for group, total in enumerate(pairs.among):
                outputs, features = rows.shape[1:]
                seen += outputs * features
                here = drop * seen // size - done
                done += here
                if isinstance(pattern, ZerosOf):
                    channels = features if use.window is None else _channels(values, use)
                    decided = obs.grouped(features, channels, pattern.zeros, pattern.group)
                else:
                    decided = obs.unstructured(outputs, features, here, self.block)
                new[group], gone[group] = obs.prune(rows[group], total, decided, self.damp, self.block)
            found, dropped = placed(new, use, found), placed(gone, use, dropped)
        return found, dropped

    def _refitted(self, values: Wide, start: Wide, dropped: Mask, met: Met, *, has_bias: bool) -> Wide:
        """Return what stays so that the layer says what it said in the model as it was."""
        found = start
        for pairs in met.values():
            rows, first, kept = matrix(values, pairs.use), matrix(start, pairs.use), ~matrix(dropped, pairs.use)
            among, across = pairs.among, pairs.across
            if has_bias:
                among = centred(among, pairs.now, pairs.now, pairs.count)
                across = centred(across, pairs.now, pairs.before, pairs.count)
            new = [
                refit(rows[at], among[at], across[at], kept[at], self.damp, start=first[at]) for at in range(len(rows))
            ]
            found = placed(np.stack(new), pairs.use, found)
        return found


def _free_bias(model: ModelFile, tensor: Tensor, seen: Sums, pruned: Collection[str]) -> Tensor | None:
    """Return the bias that can make up for what outputs lose: one number for each, and not pruned itself."""
    bias = bias_of(model, tensor)
    if bias is None or bias.name in pruned or bias.size != scores.outputs_of(tensor.shape, seen):
        return None
    return bias


def _goes_by_columns(tensor: Tensor, method: Method, products: Sums) -> bool:
    """Whether columns can be decided one after the other: not in blocks, and groups only along what is summed over."""
    if method.pattern is None:
        return True
    return isinstance(method.pattern, ZerosOf) and all(
        use.in_axis == tensor.inputs_axis and use.shape is None for use in products.uses.values()
    )


def _channels(values: Array, use: Use) -> int:
    return 1 if use.in_axis is None else values.shape[use.in_axis]


def _given(tensor: Tensor, values: Array, dropped: Mask) -> Iterator[tuple[Array, Mask]]:
    yield in_storage_order(tensor, values), in_storage_order(tensor, dropped)
