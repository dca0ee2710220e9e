"""The plan: how many weights of each tensor are pruned, and why others are skipped. A dry run prints it."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prunectl.analysis.patterns import BlockPattern, NMPattern
from prunectl.analysis.stats import find_tied_tensors, whole_weights
from prunectl.errors import UsageError, abbreviated
from prunectl.formats.base import PRUNABLE, QUANTISED, ModelFile, Role, Tensor, select_names
from prunectl.formats.patch import is_writable
from prunectl.formats.registry import by_name
from prunectl.pruning.masks import Threshold
from prunectl.pruning.strategies import call_plugin

Allocation = Callable[[Sequence[Tensor], int], Sequence[int]]
"""Distributes the number of weights to prune in all over the tensors."""


class Scope(StrEnum):
    """The set of weights within which scores are ranked."""

    AUTO = "auto"
    """Global or layer, whichever loses less accuracy in most models for the strategy and pattern."""
    LAYER = "layer"
    GLOBAL = "global"
    ERK = "erk"
    """Within each layer, with higher sparsity in big layers than in small ones (Erdos-Renyi-Kernel)."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How many weights of a tensor are pruned."""

    tensor: Tensor
    drop: int | None
    """None if the tensor is ranked together with others."""


@dataclass(frozen=True, slots=True)
class SkippedTensor:
    """A tensor that is not pruned, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Every tensor that is pruned, and every one that is skipped."""

    cuts: tuple[TensorPlan, ...]
    skips: tuple[SkippedTensor, ...]
    drop: int
    """Number of weights that are pruned in all."""
    threshold: Threshold | None = None
    """The joint threshold, if tensors outside this plan are ranked with its own (a shard of a model); else None."""

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
class PlanCriteria:
    """Which tensors are pruned, in which scope and pattern, but not how much of them."""

    scope: Scope
    policy: Policy
    only: str = ""
    exclude: tuple[str, ...] = ()
    pattern: NMPattern | BlockPattern | None = None
    layers: tuple[tuple[str, float], ...] = ()
    """Sparsities for the tensors that selectors match; the last match wins."""
    allocation: Allocation | None = None
    """Number of weights to prune in each tensor, if not the same share of each."""


def select_tensors(model: ModelFile, criteria: PlanCriteria) -> Selection:
    """The tensors that the policy and the selectors allow, and the reasons why others are skipped."""
    skip_reason = criteria.policy.skip_reason(model)
    layer_ratios = {
        name: sparsity for selector, sparsity in criteria.layers for name in _selected(model, selector, skip_reason)
    }
    tensors, skips = _partition(model, criteria, skip_reason, layer_ratios)
    if not tensors:
        raise _nothing_to_prune(model, skips)
    if not (criteria.only or criteria.layers or criteria.exclude) and criteria.policy is POLICIES[0]:
        _check_not_quantised(model, tensors, skips)
    return Selection(
        tensors, skips, {tensor.name: layer_ratios[tensor.name] for tensor in tensors if tensor.name in layer_ratios}
    )


def make_plan(selection: Selection, criteria: PlanCriteria, sparsity: float) -> Plan:
    """The plan for a selection at a sparsity."""
    drop = whole_weights(sparsity, sum(tensor.size for tensor in selection.tensors))
    if criteria.scope is Scope.GLOBAL:
        return Plan(tuple(TensorPlan(tensor, None) for tensor in selection.tensors), selection.skips, drop)
    if isinstance(criteria.pattern, NMPattern):
        counts: Sequence[int] = [_nm_count(tensor, criteria.pattern) for tensor in selection.tensors]
    elif criteria.allocation is not None:
        counts = criteria.allocation(selection.tensors, drop)
    else:
        counts = [
            whole_weights(selection.layer_ratios.get(tensor.name, sparsity), tensor.size)
            for tensor in selection.tensors
        ]
    cuts = tuple(TensorPlan(tensor, count) for tensor, count in zip(selection.tensors, counts, strict=True))
    return Plan(cuts, selection.skips, sum(counts))


def _nothing_to_prune(model: ModelFile, skips: Iterable[SkippedTensor]) -> UsageError:
    reasons = Counter(skip.reason for skip in skips)
    # The most telling first: that the kernels are quantised says more than that biases are not kernels.
    shown = sorted(reasons, key=_most_telling(reasons))[:3]
    listed = ", ".join(counted_reason(reason, reasons[reason]) for reason in shown)
    hint = f"select tensors with --layers or --policy all; list them with: prunectl inspect {model.path}"
    if not any(tensor.is_float for tensor in model.tensors):
        hint = f"only floating-point weights are pruned; see what the file holds: prunectl inspect {model.path}"
    if any(reason.startswith(_QUANTISED) for reason in reasons) and not any(t.is_prunable for t in model.tensors):
        hint = _BEFORE_QUANTISING
    if _CLUSTERED in reasons:
        hint = "prune the model that was clustered, and cluster the result with preserve_sparsity"
    return UsageError(f"{model.path} has nothing to prune: it holds {listed or 'no tensors'}", hint=hint)


def _check_not_quantised(model: ModelFile, chosen: Sequence[Tensor], skips: Iterable[SkippedTensor]) -> None:
    """Refuse a model of which quantisation left little as floats, such as the output layer: only that would suffer."""
    names = {skip.name for skip in skips if skip.reason.startswith(_QUANTISED)}
    if not names:
        return
    layers = {match[1] for tensor in model.tensors if (match := QUANTISER.fullmatch(tensor.name))}
    # Integers named as a weight may also be a table, such as the colours of a palette.
    quantised = [
        tensor
        for tensor in model.tensors
        if tensor.name in names and tensor.role is not Role.EMBEDDING and not _TABLE.search(tensor.layer)
        if tensor.role in PRUNABLE or not tensor.name.endswith(".weight") or tensor.name[: -len(".weight")] in layers
    ]
    # An integer of 32 bits packs at least four weights.
    weights = sum(tensor.size * tensor.dtype.itemsize for tensor in quantised)
    if weights > sum(tensor.size for tensor in chosen):
        largest = max(chosen, key=lambda tensor: tensor.size)
        few = f"{abbreviated(chosen[0].name)} alone" if len(chosen) == 1 else f"only {len(chosen)} of its tensors"
        raise UsageError(
            f"most weights of {model.path} are quantised, so that {few} would be pruned",
            hint=f"{_BEFORE_QUANTISING}; or name what to prune: --layers {shlex.quote(largest.name)}",
        )


def _most_telling(reasons: Counter[str]) -> Callable[[str], tuple[bool, int]]:
    return lambda reason: (not reason.startswith((_QUANTISED, _CLUSTERED)), -reasons[reason])


KEPT_SHARE = 0.01
"""The minimum share of weights that a jointly ranked tensor keeps, so that none becomes all zeros."""


def least_kept(plan: Plan, tensor: Tensor) -> int:
    """The minimum number of weights that a tensor keeps, whatever their rank: at most half the average kept share."""
    kept = plan.size - plan.drop
    if kept < 2 * len(plan.cuts):
        return 0
    return max(int(tensor.size * min(KEPT_SHARE, kept / plan.size / 2)), 1)


def most_dropped(plan: Plan, zeros: Mapping[str, int]) -> dict[str, int]:
    """The most weights that may be pruned in each jointly ranked tensor; all its original zeros may be."""
    return {
        cut.tensor.name: max(cut.tensor.size - least_kept(plan, cut.tensor), zeros[cut.tensor.name])
        for cut in plan.cuts
        if cut.drop is None and cut.tensor.name in zeros
    }


def _nm_count(tensor: Tensor, pattern: NMPattern) -> int:
    """Number of weights that N:M prunes; a short group at the end is padded, and the padding counts as pruned."""
    length = tensor.shape[tensor.reduction_axis or 0]
    groups, remainder = divmod(length, pattern.group)
    short = max(pattern.zeros - (pattern.group - remainder), 0) if remainder else 0
    return (groups * pattern.zeros + short) * (tensor.size // length)


def _selected(model: ModelFile, selector: str, skip_reason: Callable[[Tensor], Verdict]) -> frozenset[str]:
    """The tensors that a selector chooses: those of its matches that the policy allows.

    If it allows none, as when a selector names a bias, the selector wins: its kernels are chosen, or else all matches.
    """
    matched = select_names(model, selector)
    allowed = [tensor.name for tensor in matched if not skip_reason(tensor)]
    kernels = [tensor.name for tensor in matched if tensor.is_prunable]
    return frozenset(allowed or kernels or (tensor.name for tensor in matched))


def _partition(
    model: ModelFile,
    criteria: PlanCriteria,
    skip_reason: Callable[[Tensor], Verdict],
    layer_ratios: Mapping[str, float],
) -> tuple[tuple[Tensor, ...], tuple[SkippedTensor, ...]]:
    can_reencode = by_name(model.format).can_reencode
    matched = {tensor.name for tensor in select_names(model, criteria.only)} if criteria.only else None
    only = _selected(model, criteria.only, skip_reason) if criteria.only else None
    excluded = {tensor.name for selector in criteria.exclude for tensor in select_names(model, selector)}
    excluded |= {model.duplicates[name] for name in excluded & model.duplicates.keys()}
    reasons: dict[str, str] = {}
    kept: dict[str, str] = {}
    clustered = _clustered(model)
    for tensor in model.tensors:
        if tensor.name in excluded:
            reasons[tensor.name], kept[tensor.name] = "excluded", "is excluded"
        elif tensor.name not in layer_ratios:
            is_unmatched = matched is not None and tensor.name not in matched
            is_chosen = only is not None and tensor.name in only
            reasons[tensor.name] = (
                "not selected by --layers" if is_unmatched else "" if is_chosen else skip_reason(tensor)
            )
            if reasons[tensor.name] and not is_unmatched and tensor.role is Role.EMBEDDING:
                kept[tensor.name] = "is an embedding"
        if tensor.name in model.duplicates and tensor.name not in excluded:
            reasons[tensor.name] = "a copy of another variable, pruned with it"
        if tensor.name in clustered:
            reasons[tensor.name] = _CLUSTERED
        reasons[tensor.name] = reasons.get(tensor.name) or _obstacle(tensor, criteria, can_reencode=can_reencode)
    # Tensors tied to kept ones are kept too: the output layer may share the weights of an embedding.
    for name, owner in find_tied_tensors(model.tensors, kept).items():
        is_named = name in layer_ratios and owner not in excluded
        if owner in kept and not reasons[name] and not is_named:
            reasons[name] = f"tied to {owner}, which {kept[owner]}"
    candidates = {tensor.name for tensor in model.tensors if not reasons[tensor.name]}
    # Tensors tied to pruned ones are pruned with them, even if they were not selected.
    tied = {
        name: original
        for name, original in find_tied_tensors(model.tensors, candidates).items()
        if original in candidates
    }
    reasons |= {name: f"tied to {original}, which is pruned" for name, original in tied.items()}
    chosen = tuple(tensor for tensor in model.tensors if not reasons[tensor.name])
    return chosen, tuple(SkippedTensor(name, reason) for name, reason in reasons.items() if reason)


_CLUSTERED = "clustered by tfmot: prune before clustering"
_CLUSTERING_LAYER = re.compile(r"(cluster|quant(ize)?)_")


def _clustered(model: ModelFile) -> frozenset[str]:
    """Weights in tfmot's clustering wrappers, which replace each weight, also a pruned one, by the nearest centroid.

    Such a wrapper has the indices of the centroids as another tensor of the weight's shape.
    """
    layers = {tensor.name: _CLUSTERING_LAYER.sub("", tensor.layer, count=1) for tensor in model.tensors}
    indices = {
        (layers[tensor.name], tensor.shape)
        for tensor in model.tensors
        if tensor.dtype.name in {"int32", "int64"} and len(tensor.shape) > 1 and _CLUSTERING_LAYER.match(tensor.layer)
    }
    return frozenset(
        tensor.name
        for tensor in model.tensors
        if tensor.is_float and tensor.role is not Role.OPTIMIZER and (layers[tensor.name], tensor.shape) in indices
    )


def _obstacle(tensor: Tensor, criteria: PlanCriteria, *, can_reencode: bool) -> str:
    """Why a tensor cannot be pruned, whatever the policy; empty if it can."""
    if not tensor.is_float:
        return non_float_reason(tensor)
    if not tensor.size:
        return "empty"
    if isinstance(criteria.pattern, NMPattern) and tensor.reduction_axis is None:
        return "without an input axis for the pattern"
    if isinstance(criteria.pattern, BlockPattern) and tensor.out_axis is None:
        return "not a matrix of inputs by outputs"
    if tensor.storage.extent is None:
        covers = tensor.start == 0 and tensor.nbytes == tensor.storage.nbytes
        return "" if can_reencode and covers else "stored in a way that cannot be changed in place"
    return "" if is_writable(tensor) else "a view with gaps or repeats"


MIN_SIZE = "min-size:"
UNKNOWN = "unknown role"
"""Reason to skip a tensor whose role neither its name nor its use shows."""
_ROLE_REASONS = {
    Role.EMBEDDING: "an embedding",
    Role.OPTIMIZER: "optimizer state",
    Role.OTHER: UNKNOWN,
}
_QUANTISED = "quantised to"
_BEFORE_QUANTISING = "prune the model that was quantised, and quantise the result"
_QUANTISED_NAMES = (".weight", ".qweight", ".q_weight", ".W_q", ".weight_packed", ".weight._data", "_proj_blocks")
"""Name endings of packed weights of bitsandbytes, GPTQ, AWQ, EXL2, HQQ, compressed-tensors, Quanto and MXFP4."""
QUANTISER = re.compile(r"(.+?)\.(?:weight[._])?(?:SCB|absmax|quant_state\..*|\w*scales?(_inv)?|\w*zero_point|q?zeros)")
"""Names of the scales and offsets of quantised weights, after that of their layer."""
_TABLE = re.compile(r"(^|[._])(emb|embed\w*|wte|wpe)$")
_NOUNS = {
    "a bias": ("bias", "biases"),
    "a norm": ("norm parameter", "norm parameters"),
    "a state": ("statistic or other state", "statistics and other state"),
    "a mask": ("mask", "masks"),
    "a schedule": ("pruning schedule", "pruning schedules"),
    "an embedding": ("embedding", "embeddings"),
    "a router": ("router of experts", "routers of experts"),
    "optimizer state": ("optimizer slot", "optimizer slots"),
    "a kernel with a single axis": ("kernel with a single axis", "kernels with a single axis"),
    UNKNOWN: ("tensor of unknown role", "tensors of unknown role"),
}


def counted_reason(reason: str, number: int) -> str:
    """The number of tensors that were skipped for a reason, as text."""
    if reason in _NOUNS:
        return f"{number} {_NOUNS[reason][number != 1]}"
    return f"{number} tensor{'s' * (number != 1)} ({reason})"


Verdict = str
"""Reason to skip a tensor; empty if it may be pruned."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule that selects tensors."""

    name: str
    skip_reason: Callable[[ModelFile], Callable[[Tensor], Verdict]]
    summary: str
    """What the policy selects, in a line."""


def _among_kernels(reason: Callable[[Tensor], Verdict]) -> Callable[[Tensor], Verdict]:
    """Skip reasons of a policy on kernels: `reason` for kernels, and why other tensors are not eligible."""
    return lambda tensor: reason(tensor) if tensor.is_prunable else _ineligible(tensor)


def _all(_: ModelFile) -> Callable[[Tensor], Verdict]:
    dead = {Role.MASK, Role.SCHEDULE, Role.OPTIMIZER}
    return lambda tensor: _ineligible(tensor) if tensor.role in dead else ""


def _skip_first_last(model: ModelFile) -> Callable[[Tensor], Verdict]:
    layers = _prunable_layers(model)
    return _all_except(dict.fromkeys(layers[:1], "the first layer") | dict.fromkeys(layers[-1:], "the last layer"))


def _skip_classifier(model: ModelFile) -> Callable[[Tensor], Verdict]:
    return _all_except(dict.fromkeys(_prunable_layers(model)[-1:], "the classifier"))


def _xnnpack(model: ModelFile) -> Callable[[Tensor], Verdict]:
    # Imported for this policy only, since it reads Keras configurations.
    importlib.import_module("prunectl.pruning.xnnpack").check_sparse_inference(model)
    return _among_kernels(lambda tensor: "" if is_pointwise(tensor) else "not a 1x1 convolution")


def is_pointwise(tensor: Tensor) -> bool:
    """Whether a tensor is the kernel of a 1x1 convolution."""
    axes = {tensor.out_axis, tensor.reduction_axis}
    window = [size for axis, size in enumerate(tensor.shape) if axis not in axes]
    return len(tensor.shape) == 4 and None not in axes and all(size == 1 for size in window)


def min_size(spec: str) -> Policy:
    """The policy named by `min-size:N`."""
    text = spec.removeprefix(MIN_SIZE)
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{spec!r} is not a policy", hint=f"write {MIN_SIZE}1000 to skip tensors with fewer weights")
    least = int(text)
    skip_reason = _among_kernels(lambda tensor: f"fewer than {least:,} weights" if tensor.size < least else "")
    return Policy(spec, lambda _: skip_reason, f"kernels of at least {least:,} weights")


def adapt_policy(plugin: object) -> Policy:
    """A built-in policy, or a user's function (from a tensor to a reason to skip it) wrapped as a policy."""
    if isinstance(plugin, Policy):
        return plugin
    if not callable(plugin):
        raise UsageError(
            f"the policy is a value of type {type(plugin).__name__}, not a function",
            hint="it takes a tensor, and returns why that is not pruned, or an empty string",
        )
    function: Callable[[Tensor], str | None] = plugin

    def skip_reasons(_: ModelFile) -> Callable[[Tensor], str]:
        return lambda tensor: str(
            call_plugin(function, getattr(plugin, "__name__", "policy"), tensor.name, tensor) or ""
        )

    return Policy(getattr(plugin, "__name__", "policy"), skip_reasons, inspect.getdoc(plugin) or "")


def _all_except(skipped: dict[str, str]) -> Callable[[Tensor], Verdict]:
    return _among_kernels(lambda tensor: skipped.get(tensor.layer, ""))


def _prunable_layers(model: ModelFile) -> Sequence[str]:
    return list(dict.fromkeys(tensor.layer for tensor in model.tensors if tensor.is_prunable))


def non_float_reason(tensor: Tensor) -> Verdict:
    """Why a tensor that is not floating-point cannot be pruned; empty for floats."""
    name = tensor.dtype.name
    if tensor.is_float:
        return ""
    return _quantised_to(name) if name in QUANTISED else f"of type {name}"


def _quantised_to(dtype: str) -> str:
    return f"{_QUANTISED} {dtype}: prune before quantising"


def _ineligible(tensor: Tensor) -> Verdict:
    """Why the default policy skips a tensor."""
    role = tensor.role
    if role in PRUNABLE:
        return non_float_reason(tensor) or "a kernel with a single axis"
    wide = {"int32", "uint32"} if not tensor.name.endswith(".weight") else set()
    is_packed = tensor.dtype.name in QUANTISED | wide
    if is_packed and len(tensor.shape) > 1 and tensor.name.endswith(_QUANTISED_NAMES):
        return _quantised_to(tensor.dtype.name)
    if role is Role.OTHER and not tensor.is_float:
        return f"of type {tensor.dtype.name}"
    return _ROLE_REASONS.get(role, f"a {role}")


POLICIES = (
    Policy("default", lambda _: _among_kernels(lambda _: ""), "kernels, not biases, norms or embeddings"),
    Policy("all", _all, "every floating-point tensor, also biases, norms and embeddings"),
    Policy("skip-first-last", _skip_first_last, "kernels, except in the first and the last layer"),
    Policy("skip-classifier", _skip_classifier, "kernels, except in the last layer"),
    Policy("xnnpack", _xnnpack, "kernels of 1x1 convolutions, which XNNPACK runs faster if sparse (ARM, WASM, RISC-V)"),
)
