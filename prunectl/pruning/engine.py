"""Execute a plan: score the weights, mask them, write the pruned copy, and verify it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prunectl.analysis.patterns import BlockPattern, NMPattern
from prunectl.analysis.stats import ModelStats, Tick, measure_stats
from prunectl.analysis.tensor_io import iter_blocks, iter_slabs, nonzero_mask
from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array, ModelFile, Storage, Tensor
from prunectl.formats.patch import TensorUpdate, in_storage_order
from prunectl.formats.registry import by_name, load
from prunectl.pruning.masks import (
    Mask,
    NonFinitePolicy,
    Pooling,
    Source,
    Threshold,
    ThresholdMasker,
    check_pruned_nonfinite,
    lowest_blocks,
    lowest_per_group,
    rank_nonfinite,
    threshold,
)
from prunectl.pruning.plan import Plan, PlanCriteria, Selection, SkippedTensor, TensorPlan, most_dropped
from prunectl.pruning.scores import TensorScores, label
from prunectl.pruning.strategies import BlockContext, Strategy

if TYPE_CHECKING:
    from prunectl.pruning.clustering import Clustering


@dataclass(frozen=True, slots=True)
class PruningMethod:
    """A request with all its names resolved: which tensors are pruned, and how their weights are ranked."""

    strategy: Strategy
    criteria: PlanCriteria
    seed: int = 0
    not_finite: NonFinitePolicy = NonFinitePolicy.ERROR
    pool: Pooling = Pooling.AVG
    weight_updater: WeightUpdater | None = None
    """Computes masks and new values of the kept weights, as in SparseGPT or least-squares reconstruction."""
    clustering: Clustering | None = None
    """How the kept weights of each tensor are clustered; None if they are not."""

    @property
    def pattern(self) -> NMPattern | BlockPattern | None:
        """The pattern of the zeros; None for single weights."""
        return self.criteria.pattern


@dataclass(frozen=True, slots=True)
class TensorCounts:
    """How many weights of a tensor were pruned, and how many are zero."""

    dropped: int
    zeros: int
    zeros_before: int | None = None
    """Zeros in the input; None if they were not counted, as under a weight updater."""
    lost: float | None = None
    """Share of the norm that was lost; None if kept weights change too, or if the norm of the input is zero."""


@dataclass(slots=True)
class _Original:
    """Zeros and energy of a tensor before pruning."""

    zeros: int = 0
    energy: float = 0.0
    """The sum of the squared weights."""

    def add(self, block: Array) -> None:
        self.zeros += block.size - int(np.count_nonzero(nonzero_mask(block)))
        self.energy += _energy(block)

    def lost(self, energy: float) -> float | None:
        """Share of the norm that was lost, from the energy that is left; None if the input's is zero or infinite."""
        return math.sqrt(max(1.0 - energy / self.energy, 0.0)) if 0.0 < self.energy < math.inf else None


def _energy(block: Array) -> float:
    flat = block.reshape(-1).astype(np.float32, copy=False)
    return float(np.dot(flat, flat))


def execute(
    model: ModelFile, plan: Plan, method: PruningMethod, targets: dict[Path, Path], tick: Tick = lambda _: None
) -> dict[str, TensorCounts]:
    """Write the pruned copy; return counts by tensor, taken while it is written."""
    counts: dict[str, TensorCounts] = {}
    originals: dict[str, _Original] = {}
    if method.weight_updater is not None:
        solution = method.weight_updater(model, plan, method)
    else:
        scratch = next(iter(targets.values())).parent
        solution = PrunedTensors(pruned_blocks(model, plan, method, scratch, originals))
    makers = {cut.tensor.name: make for cut, make in zip(plan.cuts, solution.blocks, strict=True)}
    if method.clustering is not None:
        from prunectl.pruning.clustering import clustered  # noqa: PLC0415 - few ask for clusters

        makers = {name: partial(clustered, make, method.clustering, name, method.seed) for name, make in makers.items()}
    is_plain = method.weight_updater is None and method.clustering is None

    def counted(name: str, counts: dict[str, TensorCounts]) -> Callable[[], Iterator[Array]]:
        return partial(_counted, makers[name], name, originals, counts, tick, has_norms=is_plain)

    rewrites = [TensorUpdate(cut.tensor, counted(cut.tensor.name, counts)) for cut in plan.cuts]
    # Further copies of a pruned tensor in the file are pruned in the same way.
    rewrites += [
        TensorUpdate(tensor, counted(model.duplicates[tensor.name], {}))
        for tensor in model.tensors
        if model.duplicates.get(tensor.name) in makers
    ]
    rewrites += [
        TensorUpdate(tensor, partial(_to_storage, tensor, solution.updated[name]))
        for tensor in model.tensors
        if (name := model.duplicates.get(tensor.name, tensor.name)) in solution.updated
    ]
    load(by_name(model.format).writer)(model, targets, rewrites)
    # In the order of the plan, which may differ from the order of writing.
    counts = {cut.tensor.name: counts[cut.tensor.name] for cut in plan.cuts}
    if not isinstance(method.pattern, BlockPattern) and method.not_finite is not NonFinitePolicy.ZERO:
        dropped = sum(count.dropped for count in counts.values())
        if dropped != plan.drop:
            raise WorkError(f"{dropped} weights of {model.path} were pruned instead of {plan.drop}")
    return counts


def verify(
    model: ModelFile,
    written: ModelFile,
    counts: dict[str, TensorCounts],
    *,
    has_channels: bool,
    tick: Tick = lambda _: None,
) -> ModelStats:
    """Verify the written file against the input's tensors and the counts; return its statistics."""
    # As sets, since packing may change the order of the tensors.
    if {(tensor.name, tensor.shape, tensor.dtype) for tensor in written.tensors} != {
        (tensor.name, tensor.shape, tensor.dtype) for tensor in model.tensors
    }:
        raise WorkError(f"the output of {model.path} has different tensors from the input")
    stats = measure_stats(written, written.tensors, has_channels=has_channels, tick=tick)
    for row in stats.layers:
        if row.name in counts and row.zeros != counts[row.name].zeros:
            raise WorkError(f"{row.name} of {model.path} has a different number of zeros in the output than planned")
    return stats


Pruned = Iterator[tuple[Array, Mask]]
"""Blocks of pruned weights in storage order, each with the mask of what was pruned."""


@dataclass(frozen=True, slots=True)
class PrunedTensors:
    """The pruned blocks of each tensor of a plan, and other tensors that are updated with them."""

    blocks: Sequence[Callable[[], Pruned]]
    updated: Mapping[str, Array] = field(default_factory=dict)


WeightUpdater = Callable[[ModelFile, Plan, PruningMethod], PrunedTensors]


def _to_storage(tensor: Tensor, value: Array) -> Iterator[Array]:
    yield from iter_blocks(in_storage_order(tensor, value.astype(tensor.dtype, copy=False)))


def _counted(
    make: Callable[[], Pruned],
    name: str,
    originals: Mapping[str, _Original],
    counts: dict[str, TensorCounts],
    tick: Tick,
    *,
    has_norms: bool,
) -> Iterator[Array]:
    """Yield the blocks of a tensor, and store its counts after the last one."""
    dropped = zeros = 0
    energy = 0.0
    for block, mask in make():
        dropped += int(np.count_nonzero(mask))
        zeros += block.size - int(np.count_nonzero(nonzero_mask(block)))
        energy += _energy(block) if has_norms else 0.0
        yield block
        tick(block.nbytes)
    original = originals.get(name)
    if original is None:
        counts[name] = TensorCounts(dropped, zeros)
    else:
        counts[name] = TensorCounts(dropped, zeros, original.zeros, original.lost(energy) if has_norms else None)


def pruned_blocks(
    model: ModelFile,
    plan: Plan,
    method: PruningMethod,
    scratch: Path | None = None,
    originals: dict[str, _Original] | None = None,
) -> Sequence[Callable[[], Pruned]]:
    """Factories of pruned blocks, one for each tensor; scores beyond a limit are spilled to the scratch folder.

    The zeros and energy of the weights before pruning are stored in `originals`.
    """
    originals = {} if originals is None else originals
    if method.pattern is not None:
        return [partial(_pruned_in_pattern, model, cut, method, originals) for cut in plan.cuts]
    joint = [cut for cut in plan.cuts if cut.drop is None]
    wide = bool(joint) and (is_wide(plan) if plan.threshold is None else plan.threshold.is_wide)
    scored = TensorScores(model, method, plan, scratch, is_wide=wide, is_joint=bool(joint))
    # The threshold of a single tensor is selected just before the tensor is written, while it is in the CPU caches.
    makers = {cut.tensor.name: partial(_per_tensor_threshold, scored, cut) for cut in plan.cuts}
    if joint:
        joint_threshold = plan.threshold or _threshold(scored, joint, _joint_drop(plan))
        makers |= {cut.tensor.name: partial(joint_threshold.masker, number) for number, cut in enumerate(joint)}
    return [partial(_pruned_unstructured, scored, cut.tensor, makers[cut.tensor.name], originals) for cut in plan.cuts]


def with_floors(
    model: ModelFile, plan: Plan, method: PruningMethod, dropped: Mapping[str, int], zeros: Mapping[str, int]
) -> Plan:
    """The plan with a minimum of kept weights for each jointly ranked tensor; the same plan if all keep that anyway.

    `dropped` and `zeros` hold the pruned weights and the original zeros of each tensor. To give a tensor its minimum,
    more weights are pruned from the others, which may push these below their minimum in turn. They reach it in a known
    order: by the threshold at which each tensor keeps just its minimum. The number of fixed tensors is searched for.
    """
    most = most_dropped(plan, zeros)
    starved = sum(dropped[name] > count for name, count in most.items())
    if not starved or method.pattern is not None or method.not_finite is NonFinitePolicy.ZERO:
        return plan
    scored = TensorScores(model, method, plan, None, is_wide=is_wide(plan), is_joint=True)
    joint = [cut for cut in plan.cuts if cut.drop is None]
    order = sorted(joint, key=lambda cut: _threshold(scored, [cut], most[cut.tensor.name]).key)

    def with_fixed(number: int) -> Plan:
        names = {cut.tensor.name for cut in order[:number]}
        cuts = (replace(cut, drop=most[cut.tensor.name]) if cut.tensor.name in names else cut for cut in plan.cuts)
        return replace(plan, cuts=tuple(cuts))

    def is_enough(number: int) -> bool:
        floored = with_fixed(number)
        rest, drop = [cut for cut in floored.cuts if cut.drop is None], _joint_drop(floored)
        if drop <= 0:
            return True
        limit = _threshold(scored, rest, drop)
        maskers = ((cut.tensor, limit.masker(index)) for index, cut in enumerate(rest))
        return all(
            sum(int(np.count_nonzero(masker.mask(scores))) for scores in scored.scores(tensor)) <= most[tensor.name]
            for tensor, masker in maskers
        )

    low, high, step = starved - 1, starved, 1
    while not is_enough(high):
        low, high, step = high, min(high + step, len(order) - 1), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return with_fixed(high)


def _joint_drop(plan: Plan) -> int:
    """How many weights are pruned in the tensors that are ranked together."""
    return plan.drop - sum(cut.drop or 0 for cut in plan.cuts)


def _threshold(scored: TensorScores, cuts: Sequence[TensorPlan], drop: int) -> Threshold:
    sources = [partial(scored.scores, cut.tensor) for cut in cuts]
    samples = [partial(scored.sample, cut.tensor) for cut in cuts]
    return threshold(sources, drop, sum(cut.tensor.size for cut in cuts), samples)


def joint_sources(
    model: ModelFile, plan: Plan, method: PruningMethod, scratch: Path, *, is_wide: bool
) -> Sequence[Source]:
    """The scores of each tensor of a plan, to be ranked with those of other plans; in 64 bits if `is_wide`."""
    scored = TensorScores(model, method, plan, scratch, is_wide=is_wide, is_joint=True)
    return [partial(scored.scores, cut.tensor) for cut in plan.cuts]


def is_wide(plan: Plan) -> bool:
    """Whether scores that are ranked together are compared in 64 bits."""
    return any(cut.tensor.dtype.itemsize == 8 for cut in plan.cuts)


def _per_tensor_threshold(scored: TensorScores, cut: TensorPlan) -> ThresholdMasker:
    return _threshold(scored, [cut], cut.drop or 0).masker(0)


def _pruned_unstructured(
    scored: TensorScores, tensor: Tensor, make_masker: Callable[[], ThresholdMasker], originals: dict[str, _Original]
) -> Pruned:
    masker = make_masker()
    original = _Original()
    for block, scores, zeroed in scored.blocks(tensor):
        original.add(block)
        dropped = masker.mask(scores)
        check_pruned_nonfinite(scores, dropped, scored.method.not_finite, label(scored.model, tensor))
        yield _zero_pruned(block, dropped if zeroed is None else dropped | zeroed), dropped
    # Stored only when complete, since a copy of the tensor in the file may be pruned concurrently.
    originals[tensor.name] = original


def _pruned_in_pattern(
    model: ModelFile, cut: TensorPlan, method: PruningMethod, originals: dict[str, _Original]
) -> Pruned:
    tensor, pattern = cut.tensor, method.pattern
    original = _Original()
    if isinstance(pattern, NMPattern) and tensor.strides is None and method.strategy.is_elementwise:
        yield from _pruned_in_groups(model, tensor, method, pattern, original)
        originals[tensor.name] = original
        return
    weights = model.read(tensor)
    for block in iter_blocks(weights):
        original.add(block)
    originals[tensor.name] = original
    scores, zeroed = rank_nonfinite(
        method.strategy.score(weights, BlockContext(tensor.name, 0, method.seed)),
        method.not_finite,
        label(model, tensor),
    )
    if isinstance(pattern, NMPattern):
        assert tensor.reduction_axis is not None
        dropped = lowest_per_group(scores, tensor.reduction_axis, pattern.zeros, pattern.group)
    else:
        assert pattern is not None
        assert tensor.out_axis is not None
        size = (pattern.rows, pattern.columns)
        dropped = lowest_blocks(scores, tensor.out_axis, size, method.pool, (cut.drop or 0) / tensor.size)
    check_pruned_nonfinite(scores, dropped, method.not_finite, label(model, tensor))
    if zeroed is not None:
        dropped |= zeroed
    yield in_storage_order(tensor, _zero_pruned(weights, dropped)), dropped


def _pruned_in_groups(
    model: ModelFile, tensor: Tensor, method: PruningMethod, pattern: NMPattern, original: _Original
) -> Pruned:
    """Prune slab by slab: no group spans two slabs."""
    axis = tensor.reduction_axis
    assert axis is not None
    row = tensor.size // tensor.shape[0]
    for begin, slab in iter_slabs(model, tensor, pattern.group if axis == 0 else 1):
        original.add(slab)
        scores = method.strategy.score(slab, BlockContext(tensor.name, begin * row, method.seed))
        ranked, zeroed = rank_nonfinite(scores, method.not_finite, label(model, tensor))
        dropped = lowest_per_group(ranked, axis, pattern.zeros, pattern.group)
        check_pruned_nonfinite(ranked, dropped, method.not_finite, label(model, tensor))
        yield _zero_pruned(slab, dropped if zeroed is None else dropped | zeroed), dropped


def _zero_pruned(weights: Array, dropped: Mask) -> Array:
    """Weights with the masked ones set to +0.0 and the others bit-identical."""
    kept = weights if weights.flags.writeable and weights.flags.c_contiguous else weights.copy(order="C")
    # The bits as integers times 0 or 1: ten times as fast as masked assignment, and kept NaN stay bit-identical.
    bits = kept.view(f"u{kept.dtype.itemsize}")
    np.multiply(bits, ~dropped, out=bits)
    return kept


def with_model_scores(model: ModelFile, selection: Selection, method: PruningMethod) -> tuple[PruningMethod, Selection]:
    """The method with the scores of a model-wide strategy computed, and the selection of the scored tensors."""
    strategy = method.strategy
    if strategy.score_all is None:
        return method, selection
    scored = strategy.score_all({tensor.name: model.read(tensor) for tensor in selection.tensors})
    scores_by_name: Mapping[str, Array] = {name: scores for name, scores in scored.items() if scores is not None}
    if not scores_by_name:
        raise UsageError(f"the strategy {strategy.name} scores no tensor of {model.path}")

    def score(_: Array, context: BlockContext) -> Array:
        return scores_by_name[context.name]

    reason = f"not scored by {strategy.name}"
    skips = tuple(
        SkippedTensor(tensor.name, reason) for tensor in selection.tensors if tensor.name not in scores_by_name
    )
    tensors = tuple(tensor for tensor in selection.tensors if tensor.name in scores_by_name)
    layer_ratios = {name: sparsity for name, sparsity in selection.layer_ratios.items() if name in scores_by_name}
    # The scores have the shape of the tensor, which is therefore scored as a whole.
    own_method = replace(
        method, strategy=replace(strategy, score=score, score_all=None, is_elementwise=False, is_precomputed=True)
    )
    return own_method, Selection(tensors, (*selection.skips, *skips), layer_ratios)


def keep_masks(
    model: ModelFile, plan: Plan, method: PruningMethod, selection: Selection, weights: Mapping[str, Array]
) -> dict[str, Mask]:
    """Keep masks by tensor, computed from weights in memory."""
    in_memory = replace(model, decode=lambda tensor: weights[tensor.name])
    cuts = tuple(TensorPlan(_memory_tensor(cut.tensor, weights[cut.tensor.name]), cut.drop) for cut in plan.cuts)
    method, _ = with_model_scores(in_memory, replace(selection, tensors=tuple(cut.tensor for cut in cuts)), method)
    plan = replace(plan, cuts=cuts)
    masks = _keep_masks(in_memory, plan, method)
    dropped = {name: mask.size - int(np.count_nonzero(mask)) for name, mask in masks.items()}
    zeros = {name: weights[name].size - int(np.count_nonzero(weights[name])) for name in masks}
    floored = with_floors(in_memory, plan, method, dropped, zeros)
    return masks if floored is plan else _keep_masks(in_memory, floored, method)


def _keep_masks(model: ModelFile, plan: Plan, method: PruningMethod) -> dict[str, Mask]:
    masks = {}
    for cut, make in zip(plan.cuts, pruned_blocks(model, plan, method), strict=True):
        dropped = [np.array(pruned).reshape(-1) for _, pruned in make()]
        masks[cut.tensor.name] = ~np.concatenate(dropped).reshape(cut.tensor.shape)
    return masks


def _memory_tensor(tensor: Tensor, array: Array) -> Tensor:
    # `_zero_pruned` works in place on writable blocks, but these weights must not change.
    array.setflags(write=False)
    return replace(
        tensor,
        storage=Storage(tensor.name, array.nbytes, None, array.nbytes),
        dtype=array.dtype,
        start=0,
        strides=None,
    )
