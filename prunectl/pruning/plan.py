"""What will be done: every cut, and why the rest is left alone. A dry run prints it, a run obeys it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.names import select
from prunectl.formats.writing import is_writable
from prunectl.measuring.patterns import Block, ZerosOf
from prunectl.measuring.ties import ties
from prunectl.pruning.policies import Policy


class Scope(StrEnum):
    """Among which weights the lowest scores are sought."""

    LAYER = "layer"
    GLOBAL = "global"
    ERK = "erk"
    """In each layer, but more in big layers than in small ones."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How many weights of a tensor go."""

    tensor: Tensor
    drop: int | None
    """None where all tensors are ranked together."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A tensor that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Every cut that will be made."""

    cuts: tuple[Cut, ...]
    skips: tuple[Skip, ...]
    drop: int
    """How many weights go in all."""

    @property
    def size(self) -> int:
        """Number of weights that the cuts are made in."""
        return sum(cut.tensor.size for cut in self.cuts)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asks for."""

    sparsity: float
    scope: Scope
    policy: Policy
    only: str = ""
    exclude: tuple[str, ...] = ()
    pattern: ZerosOf | Block | None = None
    layers: tuple[tuple[str, float], ...] = ()
    """Sparsities of their own for what selectors match; the last that matches wins."""


def make(model: ModelFile, wish: Wish, *, can_reencode: bool) -> Plan:
    """Return the plan that grants a wish; a container that re-encodes can change what does not lie flat."""
    own = _own_sparsities(model, wish.layers)
    chosen, skips = _choose(model, wish, own, can_reencode=can_reencode)
    if not chosen:
        raise UsageError(f"nothing in {model.path} is left to prune", hint=f"see: prunectl inspect {model.path}")
    wanted = {tensor.name: own.get(tensor.name, wish.sparsity) for tensor in chosen}
    if wish.scope is Scope.GLOBAL:
        if own:
            raise UsageError("--layer sets the sparsity of a layer, --scope global ranks all layers together")
        drop = round(wish.sparsity * sum(tensor.size for tensor in chosen))
        return Plan(tuple(Cut(tensor, None) for tensor in chosen), skips, drop)
    counts: Mapping[str, int] = {}
    if isinstance(wish.pattern, ZerosOf):
        counts = {tensor.name: _in_groups(tensor, wish.pattern) for tensor in chosen}
    elif wish.scope is Scope.ERK:
        counts = _erk(chosen, wish.sparsity)
    cuts = [Cut(tensor, counts.get(tensor.name, round(wanted[tensor.name] * tensor.size))) for tensor in chosen]
    return Plan(tuple(cuts), skips, sum(cut.drop or 0 for cut in cuts))


def _in_groups(tensor: Tensor, pattern: ZerosOf) -> int:
    """Return how many weights go; a short group at the end is filled up with zeros that count as gone."""
    length = tensor.shape[tensor.inputs_axis or 0]
    whole, rest = divmod(length, pattern.group)
    short = max(pattern.zeros - (pattern.group - rest), 0) if rest else 0
    return (whole * pattern.zeros + short) * (tensor.size // length)


def _own_sparsities(model: ModelFile, layers: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {tensor.name: sparsity for selector, sparsity in layers for tensor in select(model, selector)}


def _choose(
    model: ModelFile, wish: Wish, own: Mapping[str, float], *, can_reencode: bool
) -> tuple[tuple[Tensor, ...], tuple[Skip, ...]]:
    judge = wish.policy.judge(model)
    only = {tensor.name for tensor in select(model, wish.only)} if wish.only else None
    excluded = {tensor.name for selector in wish.exclude for tensor in select(model, selector)}
    reasons: dict[str, str] = {}
    for tensor in model.tensors:
        if tensor.name in excluded:
            reasons[tensor.name] = "excluded"
        elif tensor.name not in own:
            # What was named by --only was meant, even if it is no kernel.
            reasons[tensor.name] = judge(tensor) if only is None else "" if tensor.name in only else "not among --only"
        if tensor.name in model.copies:
            reasons[tensor.name] = "a second copy of a variable, changed as the first is"
        reasons[tensor.name] = reasons.get(tensor.name) or _impossible(tensor, wish, can_reencode=can_reencode)
    willing = [tensor for tensor in model.tensors if not reasons[tensor.name]]
    reasons |= {name: f"tied to {other}, which is pruned" for name, other in ties(willing).items()}
    chosen = tuple(tensor for tensor in willing if not reasons[tensor.name])
    return chosen, tuple(Skip(name, reason) for name, reason in reasons.items() if reason)


def _impossible(tensor: Tensor, wish: Wish, *, can_reencode: bool) -> str:
    """Return why a tensor cannot be pruned whatever the user wants."""
    if not tensor.is_float:
        return f"of type {tensor.dtype.name}: prune the float model, before it is quantised"
    if not tensor.size:
        return "empty"
    if isinstance(wish.pattern, ZerosOf) and tensor.inputs_axis is None:
        return "without an axis of inputs for the pattern"
    if isinstance(wish.pattern, Block) and tensor.out_axis is None:
        return "no matrix of inputs by outputs"
    if tensor.storage.extent is None:
        covers = tensor.start == 0 and tensor.nbytes == tensor.storage.nbytes
        return "" if can_reencode and covers else "stored in a way that cannot be changed in place"
    return "" if is_writable(tensor) else "a view with gaps or repeats"


def _erk(tensors: Sequence[Tensor], sparsity: float) -> dict[str, int]:
    """Return counts by Erdos-Renyi-Kernel: a layer's density goes with the sum of its sizes over their product."""
    total = sum(tensor.size for tensor in tensors)
    keep = total - round(sparsity * total)
    dense: set[str] = set()
    while True:
        raw = {tensor.name: sum(tensor.shape) / tensor.size for tensor in tensors if tensor.name not in dense}
        left = keep - sum(tensor.size for tensor in tensors if tensor.name in dense)
        weight = sum(raw[tensor.name] * tensor.size for tensor in tensors if tensor.name in raw)
        full = {name for name, density in raw.items() if density * left > weight}
        if not full:
            break
        dense |= full
    kept = {
        tensor.name: raw[tensor.name] * tensor.size * left / weight if weight else 0.0
        for tensor in tensors
        if tensor.name in raw
    }
    drops = {tensor.name: 0 if tensor.name in dense else tensor.size - int(kept[tensor.name]) for tensor in tensors}
    # What rounding down kept too few of goes to the layers with the largest remainders.
    missing = sum(drops.values()) - (total - keep)
    for name in sorted(kept, key=lambda name: (int(kept[name]) - kept[name], name))[:missing]:
        drops[name] -= 1
    return drops
