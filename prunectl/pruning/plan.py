"""The plan: how many weights of each tensor are pruned, and why others are skipped. A dry run prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prunectl.analysis.patterns import BlockPattern, NMPattern
from prunectl.analysis.stats import find_tied_tensors
from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.patch import is_writable
from prunectl.formats.selectors import select_names
from prunectl.pruning.hashing import fnv1a, splitmix64
from prunectl.pruning.policies import Policy, non_float_reason

Allocation = Callable[[Sequence[Tensor], int], Sequence[int]]
"""From the tensors and the number of weights to prune in all to the number in each."""

BIASES = ("late", "early", "uniform")
_BIAS_ODDS = (0.3, 0.6)
"""Up to the first of these numbers late layers lose most, up to the second early ones."""


def proportional_counts(sizes: Sequence[int], rates: Sequence[float], total: int) -> list[int]:
    """Counts proportional to size times rate, capped at the size, that sum to the total (largest remainders)."""
    saturated: set[int] = set()
    while True:
        rest = [index for index in range(len(sizes)) if index not in saturated]
        left = total - sum(sizes[index] for index in saturated)
        mass = sum(sizes[index] * rates[index] for index in rest)
        above = {index for index in rest if rates[index] * left > mass}
        if not above:
            break
        saturated |= above
    ideal = {index: sizes[index] * rates[index] * left / mass for index in rest} if left else dict.fromkeys(rest, 0.0)
    counts = [sizes[index] if index in saturated else int(ideal[index]) for index in range(len(sizes))]
    # What rounding down left over goes to the largest remainders.
    for index in sorted(rest, key=lambda index: (int(ideal[index]) - ideal[index], index))[: total - sum(counts)]:
        counts[index] += 1
    return counts


def erk(tensors: Sequence[Tensor], drop: int) -> Sequence[int]:
    """Counts by Erdos-Renyi-Kernel (RigL, Evci et al. 2020): density goes with a shape's sum over its product."""
    sizes = [tensor.size for tensor in tensors]
    densities = [(sum(tensor.shape) or 1) / tensor.size for tensor in tensors]
    kept = proportional_counts(sizes, densities, sum(sizes) - drop)
    return [size - keep for size, keep in zip(sizes, kept, strict=True)]


def depth_biased(tensors: Sequence[Tensor], drop: int, *, seed: int, bias: str = "") -> Sequence[int]:
    """Counts that rise or fall evenly from the first layer to the last, or that are the same share of each."""
    layers = list(dict.fromkeys(tensor.layer for tensor in tensors))
    depths = [layers.index(tensor.layer) for tensor in tensors]
    rates = {
        "late": [1.0 + depth for depth in depths],
        "early": [float(len(layers) - depth) for depth in depths],
        "uniform": [1.0] * len(depths),
    }[bias or sample_depth_bias(seed)]
    return proportional_counts([tensor.size for tensor in tensors], rates, drop)


def sample_depth_bias(seed: int) -> str:
    """The bias drawn by a seed: late or early with odds of 30 % each, else uniform."""
    number = float(splitmix64(fnv1a(f"{seed}/bias")) >> 11) / (1 << 53)
    return BIASES[sum(number >= odds for odds in _BIAS_ODDS)]


class Scope(StrEnum):
    """Among which weights scores are ranked."""

    LAYER = "layer"
    GLOBAL = "global"
    ERK = "erk"
    """In each layer, but more in big layers than in small ones."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How many weights of a tensor are pruned."""

    tensor: Tensor
    drop: int | None
    """None where all tensors are ranked together."""


@dataclass(frozen=True, slots=True)
class SkippedTensor:
    """A tensor that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Every tensor that is pruned, and every one that is skipped."""

    cuts: tuple[TensorPlan, ...]
    skips: tuple[SkippedTensor, ...]
    drop: int
    """Number of weights that are pruned in all."""

    @property
    def size(self) -> int:
        """Number of weights of the pruned tensors."""
        return sum(cut.tensor.size for cut in self.cuts)


@dataclass(frozen=True, slots=True)
class Selection:
    """The tensors that are pruned, and why the others are not."""

    tensors: tuple[Tensor, ...]
    skips: tuple[SkippedTensor, ...]
    layer_ratios: Mapping[str, float]
    """Sparsities set by --layer, by tensor."""


@dataclass(frozen=True, slots=True)
class PruneSelection:
    """Which tensors are pruned, in which scope and pattern; everything but how much."""

    scope: Scope
    policy: Policy
    only: str = ""
    exclude: tuple[str, ...] = ()
    pattern: NMPattern | BlockPattern | None = None
    layers: tuple[tuple[str, float], ...] = ()
    """Sparsities for the tensors that selectors match; the last match wins."""
    allocation: Allocation | None = None
    """Number of weights to prune in each tensor, if not the same share of each."""


def select_tensors(model: ModelFile, criteria: PruneSelection, *, can_reencode: bool) -> Selection:
    """The tensors that policy and selectors allow; a container that re-encodes can change what is not contiguous."""
    layer_ratios = {
        tensor.name: sparsity for selector, sparsity in criteria.layers for tensor in select_names(model, selector)
    }
    tensors, skips = _partition(model, criteria, layer_ratios, can_reencode=can_reencode)
    if not tensors:
        raise UsageError(
            _nothing_to_prune(model, skips), hint=f"--only and --policy choose; see: prunectl inspect {model.path}"
        )
    return Selection(
        tensors, skips, {tensor.name: layer_ratios[tensor.name] for tensor in tensors if tensor.name in layer_ratios}
    )


def make_plan(selection: Selection, criteria: PruneSelection, sparsity: float) -> Plan:
    """The plan for a selection at a sparsity."""
    drop = round(sparsity * sum(tensor.size for tensor in selection.tensors))
    if criteria.scope is Scope.GLOBAL:
        return Plan(tuple(TensorPlan(tensor, None) for tensor in selection.tensors), selection.skips, drop)
    if isinstance(criteria.pattern, NMPattern):
        counts: Sequence[int] = [_nm_count(tensor, criteria.pattern) for tensor in selection.tensors]
    elif criteria.allocation is not None:
        counts = criteria.allocation(selection.tensors, drop)
    else:
        counts = [
            round(selection.layer_ratios.get(tensor.name, sparsity) * tensor.size) for tensor in selection.tensors
        ]
    cuts = tuple(TensorPlan(tensor, count) for tensor, count in zip(selection.tensors, counts, strict=True))
    return Plan(cuts, selection.skips, sum(counts))


def _nothing_to_prune(model: ModelFile, skips: Iterable[SkippedTensor]) -> str:
    reasons = Counter(skip.reason for skip in skips)
    # That kernels are no floats tells more than that biases are no kernels.
    listed = ", ".join(f"{reason} ({reasons[reason]})" for reason in sorted(reasons, key=_most_telling(reasons))[:3])
    return f"{model.path} has nothing to prune: {listed or 'it holds no tensors'}"


def _most_telling(reasons: Counter[str]) -> Callable[[str], tuple[bool, int]]:
    return lambda reason: (not reason.startswith("quantised"), -reasons[reason])


def _nm_count(tensor: Tensor, pattern: NMPattern) -> int:
    """Number of weights that N:M prunes; a short group at the end is padded with zeros that count."""
    length = tensor.shape[tensor.reduction_axis or 0]
    groups, remainder = divmod(length, pattern.group)
    short = max(pattern.zeros - (pattern.group - remainder), 0) if remainder else 0
    return (groups * pattern.zeros + short) * (tensor.size // length)


def _partition(
    model: ModelFile, criteria: PruneSelection, layer_ratios: Mapping[str, float], *, can_reencode: bool
) -> tuple[tuple[Tensor, ...], tuple[SkippedTensor, ...]]:
    skip_reason = criteria.policy.skip_reason(model)
    only = {tensor.name for tensor in select_names(model, criteria.only)} if criteria.only else None
    excluded = {tensor.name for selector in criteria.exclude for tensor in select_names(model, selector)}
    reasons: dict[str, str] = {}
    for tensor in model.tensors:
        if tensor.name in excluded:
            reasons[tensor.name] = "excluded"
        elif tensor.name not in layer_ratios:
            # What was named by --only was meant, even if it is no kernel.
            reasons[tensor.name] = (
                skip_reason(tensor) if only is None else "" if tensor.name in only else "not among --only"
            )
        if tensor.name in model.duplicates:
            reasons[tensor.name] = "a second copy of a variable, changed as the first is"
        reasons[tensor.name] = reasons.get(tensor.name) or _obstacle(tensor, criteria, can_reencode=can_reencode)
    candidates = {tensor.name for tensor in model.tensors if not reasons[tensor.name]}
    # Also what nobody wants pruned is, if it shares its numbers with what is.
    tied = {
        name: original
        for name, original in find_tied_tensors(model.tensors, candidates).items()
        if original in candidates
    }
    reasons |= {name: f"tied to {original}, which is pruned" for name, original in tied.items()}
    chosen = tuple(tensor for tensor in model.tensors if not reasons[tensor.name])
    return chosen, tuple(SkippedTensor(name, reason) for name, reason in reasons.items() if reason)


def _obstacle(tensor: Tensor, criteria: PruneSelection, *, can_reencode: bool) -> str:
    """Why a tensor cannot be pruned at all."""
    if not tensor.is_float:
        return non_float_reason(tensor)
    if not tensor.size:
        return "empty"
    if isinstance(criteria.pattern, NMPattern) and tensor.reduction_axis is None:
        return "without an axis of inputs for the pattern"
    if isinstance(criteria.pattern, BlockPattern) and tensor.out_axis is None:
        return "no matrix of inputs by outputs"
    if tensor.storage.extent is None:
        covers = tensor.start == 0 and tensor.nbytes == tensor.storage.nbytes
        return "" if can_reencode and covers else "stored in a way that cannot be changed in place"
    return "" if is_writable(tensor) else "a view with gaps or repeats"
