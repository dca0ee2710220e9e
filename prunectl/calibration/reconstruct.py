"""New numbers for what stays: layer after layer, each with the inputs that those before it now give."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from prunectl.analysis.patterns import NMPattern
from prunectl.calibration import scores, sparsegpt, statistics
from prunectl.calibration.im2col import scatter_rows, weight_matrix
from prunectl.calibration.session import Calibration
from prunectl.calibration.sparsegpt import dampen
from prunectl.calibration.statistics import CrossStatistics, Float64Array, InputStatistics, OutputRange
from prunectl.formats.base import Array, ModelFile, Role, Tensor
from prunectl.formats.patch import in_storage_order, is_writable
from prunectl.pruning import engine
from prunectl.pruning.engine import PrunedTensors, PruningMethod
from prunectl.pruning.masks import NonFinitePolicy
from prunectl.pruning.plan import Plan, Selection
from prunectl.pruning.threshold import Mask
from prunectl.training.layer_inputs import Use

_NAMES = (("pointwise_kernel", "bias"), ("kernel", "bias"), ("weight", "bias"), ("Weight", "Bias"))


def correct_bias(wanted: Float64Array, now: Float64Array, bias: Array) -> Array:
    """Return a bias to which is added what the outputs of its layer lose on the average."""
    return np.asarray(bias + (wanted - now).reshape(bias.shape)).astype(bias.dtype)


def mean_outputs(sums: InputStatistics, weights: Array) -> Float64Array:
    """Return what comes out of a layer on the average, without its bias, output by output."""
    wide = weights.astype(np.float64)
    parts = {
        use.outputs or (0, 0): np.einsum("gof,gf->go", weight_matrix(wide, use), sums.totals[part] / sums.counts[part])
        for part, use in sums.uses.items()
    }
    return np.concatenate([parts[outputs].reshape(-1) for outputs in sorted(parts)])


def bias_of(model: ModelFile, tensor: Tensor) -> Tensor | None:
    """Return the bias that is added to what a tensor makes, if it is clear which."""
    wanted = {tensor.name.replace(*pair) for pair in _NAMES if pair[0] in tensor.name}
    layer = [one for one in model.tensors if one.layer == tensor.layer and one.is_float]
    near = [one for one in layer if one.role is Role.BIAS]
    # Beside other kernels, as of a separable convolution, a bias that is not named for it may be that of another.
    is_shared = any(one.role is Role.KERNEL and one.name != tensor.name for one in layer)
    found = [one for one in near if one.name in wanted] or ([] if is_shared and tensor.role is Role.KERNEL else near)
    return found[0] if len(found) == 1 and is_writable(found[0]) else None


_EXACT = 1e-20
"""The square of how far off a row may be, relative to what it is to give."""
_MOST_STEPS = 1000
"""Damped by a hundredth it takes 20 to 50."""


def least_squares_refit(
    rows: Float64Array,
    among: Float64Array,
    across: Float64Array,
    kept: Mask,
    damp: float,
    *,
    start: Float64Array | None = None,
) -> Float64Array:
    """Return rows that are zero where nothing is kept, and elsewhere the least squares from the outputs that were.

    Among each other and across are the products of the inputs now, and of them with the inputs before. Damping pulls
    towards the old weights and not towards zero: without evidence a weight stays as it is.
    """
    damped = dampen(among, damp)
    diagonal = np.diagonal(damped)
    wanted = np.where(kept, rows @ across.T + rows * (diagonal - np.diagonal(among)), 0.0)
    return _solved(damped, wanted, kept, np.where(kept, rows if start is None else start, 0.0))


def _solved(products: Float64Array, wanted: Float64Array, kept: Mask, found: Float64Array) -> Float64Array:
    """Return the solution of each row's own equations, by conjugate gradients from where it starts.

    Each row keeps other columns: to eliminate, row by row, takes minutes for a layer that this does in seconds.
    """
    scale = 1 / np.diagonal(products)
    limit = _EXACT * (wanted * wanted * scale).sum(axis=1)
    rest = wanted - np.where(kept, found @ products, 0.0)
    near = rest * scale
    step, size = near, (rest * near).sum(axis=1)
    for _ in range(_MOST_STEPS):
        if (size <= limit).all():
            break
        bent = np.where(kept, step @ products, 0.0)
        length = _over(size, (step * bent).sum(axis=1))
        found = found + length * step
        rest = rest - length * bent
        near = rest * scale
        before, size = size, (rest * near).sum(axis=1)
        step = near + _over(size, before) * step
    return found


def _over(one: Float64Array, other: Float64Array) -> Float64Array:
    """Return a ratio for each row, zero for rows that are done."""
    return np.divide(one, other, out=np.zeros_like(one), where=other > 0)[:, np.newaxis]


def center(products: Float64Array, first: Float64Array, second: Float64Array, count: int) -> Float64Array:
    """Return the products of features less their means, for a layer whose bias sees to the means."""
    return products - first[:, :, np.newaxis] * second[:, np.newaxis] / count


DAMP = 0.01
BLOCK = 128
Met = Mapping[OutputRange, CrossStatistics]
Fit = tuple[Float64Array, Mask]
"""New numbers, and what was dropped of the old ones."""


@dataclass(slots=True)
class Reconstructor:
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

    def solve(self, model: ModelFile, plan: Plan, method: PruningMethod) -> PrunedTensors:
        """Return what becomes of every tensor of a plan."""
        tensors = {cut.tensor.name: cut.tensor for cut in plan.cuts}
        old = {name: np.array(model.read(tensor)) for name, tensor in tensors.items()}
        kept = engine.keep_masks(model, plan, method, Selection(tuple(tensors.values()), (), {}), dict(old))
        self._begin(model, old)
        means = self.calibration.sums(list(tensors.values()), statistics.sums)
        for name, met in means.items():
            # Before the first layer is solved, and not after an hour.
            sizes = [total.shape for total in met.totals.values()]
            features = max((size[1] for size in sizes), default=0)
            statistics.check_memory(name, groups=sum(size[0] for size in sizes), features=features, kept=2)
        new: dict[str, tuple[Array, Mask]] = {}
        # In the order in which data meets them; what it never meets comes last.
        for name in (*means, *(name for name in tensors if name not in means)):
            tensor, weights, seen = tensors[name], old[name], means.get(name)
            bias = _free_bias(model, tensor, seen, tensors) if self.is_repaired and seen is not None else None
            if seen is not None and np.isfinite(weights).all() and scores.covers_all_outputs(tensor.shape, seen):
                values, dropped = self._fit(tensor, weights, ~kept[name], method, seen, has_bias=bias is not None)
            else:
                self.unfitted.append(name)
                stays = kept[name] & (np.isfinite(weights) | (method.not_finite is not NonFinitePolicy.ZERO))
                values, dropped = np.where(stays, weights, np.zeros((), weights.dtype)), ~kept[name]
            new[name] = np.where(dropped, 0, values).astype(tensor.dtype), dropped
            self.calibration.network.assign({name: new[name][0]})
            if bias is not None and seen is not None:
                self._correct(model, bias, tensor, mean_outputs(seen, weights), new[name][0])
        made = [partial(_given, cut.tensor, *new[cut.tensor.name]) for cut in plan.cuts]
        return PrunedTensors(made, dict(self.others))

    def _begin(self, model: ModelFile, weights: Mapping[str, Array]) -> None:
        """Bring the model back to what it was: a search for a size solves again and again."""
        biases = {tensor.name: np.array(model.read(tensor)) for tensor in model.tensors if tensor.name in self.others}
        self.calibration.network.assign({**weights, **biases})
        self.unfitted.clear()
        self.others.clear()

    def _correct(self, model: ModelFile, bias: Tensor, tensor: Tensor, wanted: Float64Array, weights: Array) -> None:
        """Have a bias make up for what the outputs of its layer lose on the average."""
        before = self.others[bias.name] if bias.name in self.others else np.array(model.read(bias))
        now = mean_outputs(self.calibration.sums([tensor], statistics.sums)[tensor.name], weights)
        if before.size == now.size:
            self.others[bias.name] = correct_bias(wanted, now, before)
            self.calibration.network.assign({bias.name: self.others[bias.name]})

    def _fit(
        self,
        tensor: Tensor,
        weights: Array,
        dropped: Mask,
        method: PruningMethod,
        seen: InputStatistics,
        *,
        has_bias: bool,
    ) -> Fit:
        """Return new numbers for a tensor of which it is known what it meets."""
        values: Float64Array = weights.astype(np.float64)
        pairs, start = self.calibration.pairs(tensor), values
        if self.is_obs and _supports_obs(tensor, method, seen):
            start, dropped = self._operated(values, pairs, int(np.count_nonzero(dropped)), method)
        return self._refitted(values, start, dropped, pairs, has_bias=has_bias), dropped

    def _operated(self, values: Float64Array, met: Met, drop: int, method: PruningMethod) -> Fit:
        """Return what is dropped column by column, and what the columns after each made of themselves for it."""
        dropped: Mask = np.zeros(values.shape, np.bool_)
        size, pattern = values.size, method.pattern
        found, done, seen = values, 0, 0
        for pairs in met.values():
            use = pairs.use
            rows = weight_matrix(values, use)
            new, gone = np.empty_like(rows), np.zeros(rows.shape, np.bool_)
            for group, total in enumerate(pairs.among):
                outputs, features = rows.shape[1:]
                seen += outputs * features
                here = drop * seen // size - done
                done += here
                if isinstance(pattern, NMPattern):
                    channels = features if use.window is None else _channels(values, use)
                    decided = sparsegpt.nm_blocks(features, channels, pattern.zeros, pattern.group)
                else:
                    decided = sparsegpt.unstructured_blocks(outputs, features, here, self.block)
                new[group], gone[group] = sparsegpt.prune_rows(rows[group], total, decided, self.damp, self.block)
            found, dropped = scatter_rows(new, use, found), scatter_rows(gone, use, dropped)
        return found, dropped

    def _refitted(
        self, values: Float64Array, start: Float64Array, dropped: Mask, met: Met, *, has_bias: bool
    ) -> Float64Array:
        """Return what stays so that the layer says what it said in the model as it was."""
        found = start
        for pairs in met.values():
            rows, first, kept = (
                weight_matrix(values, pairs.use),
                weight_matrix(start, pairs.use),
                ~weight_matrix(dropped, pairs.use),
            )
            among, across = pairs.among, pairs.across
            if has_bias:
                among = center(among, pairs.now, pairs.now, pairs.count)
                across = center(across, pairs.now, pairs.before, pairs.count)
            new = [
                least_squares_refit(rows[at], among[at], across[at], kept[at], self.damp, start=first[at])
                for at in range(len(rows))
            ]
            found = scatter_rows(np.stack(new), pairs.use, found)
        return found


def _free_bias(model: ModelFile, tensor: Tensor, seen: InputStatistics, pruned: Collection[str]) -> Tensor | None:
    """Return the bias that can make up for what outputs lose: one number for each, and not pruned itself."""
    bias = bias_of(model, tensor)
    if bias is None or bias.name in pruned or bias.size != scores.outputs_of(tensor.shape, seen):
        return None
    return bias


def _supports_obs(tensor: Tensor, method: PruningMethod, products: InputStatistics) -> bool:
    """Whether columns can be decided one after the other: not in blocks, and groups only along what is summed over."""
    if method.pattern is None:
        return True
    return isinstance(method.pattern, NMPattern) and all(
        use.in_axis == tensor.inputs_axis and use.shape is None for use in products.uses.values()
    )


def _channels(values: Array, use: Use) -> int:
    return 1 if use.in_axis is None else values.shape[use.in_axis]


def _given(tensor: Tensor, values: Array, dropped: Mask) -> Iterator[tuple[Array, Mask]]:
    yield in_storage_order(tensor, values), in_storage_order(tensor, dropped)
