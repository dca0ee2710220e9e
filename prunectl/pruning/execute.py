"""Carries out a plan: scores, cuts, writes a copy, reads it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from prunectl.errors import WorkError
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.table import by_name, load, open_model
from prunectl.formats.writing import Rewrite, in_storage_order
from prunectl.measuring.blocks import blocks, pieces, slabs
from prunectl.measuring.patterns import Block, ZerosOf
from prunectl.measuring.survey import Survey, survey
from prunectl.measuring.zeros import nonzero
from prunectl.pruning.masks import Pool, lowest_blocks, lowest_of_each
from prunectl.pruning.not_finite import NotFinite, check_kept, rank
from prunectl.pruning.plan import Cut, Plan
from prunectl.pruning.selection import Dropper, Mask, Source, threshold
from prunectl.pruning.strategies import Place, Strategy


@dataclass(frozen=True, slots=True)
class Method:
    """How weights are ranked, and in what shape they go."""

    strategy: Strategy
    seed: int = 0
    not_finite: NotFinite = NotFinite.ERROR
    pattern: ZerosOf | Block | None = None
    pool: Pool = Pool.AVG
    solver: Solver | None = None
    """What makes new numbers where zeros alone will not do."""


@dataclass(slots=True)
class Tally:
    """What was written of a tensor."""

    dropped: int = 0
    zeros: int = 0


def execute(model: ModelFile, plan: Plan, method: Method, targets: dict[Path, Path]) -> dict[str, Tally]:
    """Write the pruned copy, and return what is in it by tensor."""
    tallies = {cut.tensor.name: Tally() for cut in plan.cuts}
    solution = method.solver(model, plan, method) if method.solver else Solution(makers(model, plan, method))
    made = dict(zip(tallies, solution.made, strict=True))
    rewrites = [
        Rewrite(cut.tensor, partial(_counted, made[cut.tensor.name], tallies[cut.tensor.name])) for cut in plan.cuts
    ]
    # What the file holds once more is written once more, from the same numbers.
    rewrites += [
        Rewrite(tensor, partial(_counted, made[model.copies[tensor.name]], Tally()))
        for tensor in model.tensors
        if model.copies.get(tensor.name) in made
    ]
    rewrites += [
        Rewrite(tensor, partial(_as_stored, tensor, solution.others[name]))
        for tensor in model.tensors
        if (name := model.copies.get(tensor.name, tensor.name)) in solution.others
    ]
    load(by_name(model.format).writer)(model, targets, rewrites)
    if not isinstance(method.pattern, Block) and method.not_finite is not NotFinite.ZERO:
        dropped = sum(tally.dropped for tally in tallies.values())
        if dropped != plan.drop:
            raise WorkError(f"{dropped} weights of {model.path} were dropped instead of {plan.drop}")
    return tallies


def verify(model: ModelFile, written: Path, tallies: dict[str, Tally]) -> Survey:
    """Open what was written, hold it against the input and the counts, and return what is in it."""
    found = open_model(written)
    # Not in their order: what was packed meanwhile may be listed behind the rest.
    if {(tensor.name, tensor.shape, tensor.dtype) for tensor in found.tensors} != {
        (tensor.name, tensor.shape, tensor.dtype) for tensor in model.tensors
    }:
        raise WorkError(f"{model.path} came out with other tensors than it had")
    seen = survey(found, found.tensors, has_channels=False)
    for row in seen.layers:
        if row.name in tallies and row.zeros != tallies[row.name].zeros:
            raise WorkError(f"{row.name} of {model.path} came out with another number of zeros than planned")
    return seen


_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Pruned = Iterator[tuple[Array, Mask]]
"""Blocks of weights in storage order, the dropped ones zeroed, each with what was dropped of it."""


@dataclass(frozen=True, slots=True)
class Solution:
    """What becomes of the tensors of a plan, and of others with them."""

    made: Sequence[Callable[[], Pruned]]
    others: Mapping[str, Array] = field(default_factory=dict)


Solver = Callable[[ModelFile, Plan, Method], Solution]


def _as_stored(tensor: Tensor, value: Array) -> Iterator[Array]:
    yield from pieces(in_storage_order(tensor, value.astype(tensor.dtype, copy=False)))


def _counted(make: Callable[[], Pruned], tally: Tally) -> Iterator[Array]:
    tally.dropped = tally.zeros = 0
    for block, dropped in make():
        tally.dropped += int(np.count_nonzero(dropped))
        tally.zeros += block.size - int(np.count_nonzero(nonzero(block)))
        yield block


def makers(model: ModelFile, plan: Plan, method: Method) -> Sequence[Callable[[], Pruned]]:
    """Return what prunes each tensor of the plan."""
    if method.pattern is not None:
        return [partial(_in_a_pattern, model, cut, method) for cut in plan.cuts]
    joint = any(cut.drop is None for cut in plan.cuts)
    is_wide = joint and any(cut.tensor.dtype.itemsize == 8 for cut in plan.cuts)
    sources = [partial(_scores, model, cut.tensor, method, is_wide=is_wide) for cut in plan.cuts]
    if joint:
        together = threshold(sources, plan.drop)
        droppers = [partial(together.drops, number) for number in range(len(sources))]
    else:
        # Each cut is found just before its tensor is written, while the tensor is still in the caches.
        droppers = [partial(_alone, source, cut) for source, cut in zip(sources, plan.cuts, strict=True)]
    return [
        partial(_unstructured, model, cut.tensor, method, dropper, is_wide=is_wide)
        for cut, dropper in zip(plan.cuts, droppers, strict=True)
    ]


def _alone(source: Source, cut: Cut) -> Dropper:
    return threshold([source], cut.drop or 0).drops(0)


def _scores(model: ModelFile, tensor: Tensor, method: Method, *, is_wide: bool) -> Iterator[Array]:
    for _, ranked, _ in _ranked(model, tensor, method, is_wide=is_wide):
        yield ranked


def _ranked(
    model: ModelFile, tensor: Tensor, method: Method, *, is_wide: bool
) -> Iterator[tuple[Array, Array, Mask | None]]:
    """Yield blocks of weights in storage order, their scores, and what goes whatever its score."""
    for block, scores in _scored(model, tensor, method):
        ranked, doomed = rank(
            scores.astype(np.float64) if is_wide else scores, method.not_finite, _called(model, tensor)
        )
        yield block, ranked, doomed


def _scored(model: ModelFile, tensor: Tensor, method: Method) -> Iterator[tuple[Array, Array]]:
    """Yield blocks of weights in storage order with their scores; strategies that look at more get it in its shape."""
    strategy, begin = method.strategy, 0
    if not strategy.is_elementwise:
        weights = model.read(tensor)
        scores = strategy.score(weights, Place(tensor.name, 0, method.seed))
        yield in_storage_order(tensor, weights), in_storage_order(tensor, scores)
        return
    for block in _blocks(model, tensor):
        yield block, strategy.score(block, Place(tensor.name, begin, method.seed))
        begin += block.size


def _called(model: ModelFile, tensor: Tensor) -> str:
    return f"{model.path}: {tensor.name}"


def _blocks(model: ModelFile, tensor: Tensor) -> Iterator[Array]:
    if tensor.storage.extent is None:
        yield from pieces(in_storage_order(tensor, model.read(tensor)))
    else:
        yield from blocks(model, replace(tensor, shape=(tensor.size,), strides=None))


def _unstructured(
    model: ModelFile, tensor: Tensor, method: Method, make_dropper: Callable[[], Dropper], *, is_wide: bool
) -> Pruned:
    dropper = make_dropper()
    for block, scores, doomed in _ranked(model, tensor, method, is_wide=is_wide):
        dropped = dropper.mark(scores)
        check_kept(scores, dropped, method.not_finite, _called(model, tensor))
        yield _zeroed(block, dropped if doomed is None else dropped | doomed), dropped


def _in_a_pattern(model: ModelFile, cut: Cut, method: Method) -> Pruned:
    tensor, pattern = cut.tensor, method.pattern
    if isinstance(pattern, ZerosOf) and tensor.strides is None and method.strategy.is_elementwise:
        yield from _in_groups(model, tensor, method, pattern)
        return
    weights = model.read(tensor)
    scores, doomed = rank(
        method.strategy.score(weights, Place(tensor.name, 0, method.seed)), method.not_finite, _called(model, tensor)
    )
    if isinstance(pattern, ZerosOf):
        assert tensor.inputs_axis is not None
        dropped = lowest_of_each(scores, tensor.inputs_axis, pattern.zeros, pattern.group)
    else:
        assert pattern is not None
        assert tensor.out_axis is not None
        size = (pattern.rows, pattern.columns)
        dropped = lowest_blocks(scores, tensor.out_axis, size, method.pool, (cut.drop or 0) / tensor.size)
    check_kept(scores, dropped, method.not_finite, _called(model, tensor))
    if doomed is not None:
        dropped |= doomed
    yield in_storage_order(tensor, _zeroed(weights, dropped)), dropped


def _in_groups(model: ModelFile, tensor: Tensor, method: Method, pattern: ZerosOf) -> Pruned:
    """Prune slab by slab: a group never reaches from one slab into the next."""
    axis = tensor.inputs_axis
    assert axis is not None
    row = tensor.size // tensor.shape[0]
    for begin, slab in slabs(model, tensor, pattern.group if axis == 0 else 1):
        scores = method.strategy.score(slab, Place(tensor.name, begin * row, method.seed))
        ranked, doomed = rank(scores, method.not_finite, _called(model, tensor))
        dropped = lowest_of_each(ranked, axis, pattern.zeros, pattern.group)
        check_kept(ranked, dropped, method.not_finite, _called(model, tensor))
        yield _zeroed(slab, dropped if doomed is None else dropped | doomed), dropped


def _zeroed(weights: Array, dropped: Mask) -> Array:
    """Return weights with some of them zero, the others bit for bit as they were."""
    kept = weights if weights.flags.writeable and weights.flags.c_contiguous else weights.copy(order="C")
    # Integers times one or zero: ten times as fast as writing where a mask says so, and NaN stays what it is.
    bits = kept.view(_BITS[kept.dtype.itemsize])
    np.multiply(bits, ~dropped, out=bits)
    return kept
