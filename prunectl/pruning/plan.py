"""What will be done: every cut, and why the rest is left alone. A dry run prints it, a run obeys it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.names import select
from prunectl.formats.writing import is_writable
from prunectl.measuring.patterns import Block, ZerosOf
from prunectl.measuring.ties import ties
from prunectl.pruning.allocation import Allocation
from prunectl.pruning.policies import Policy, integers


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
class Choice:
    """The tensors that are pruned, and why the others are not."""

    tensors: tuple[Tensor, ...]
    skips: tuple[Skip, ...]
    own: Mapping[str, float]
    """Sparsities of their own, by tensor."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asks for, apart from how much."""

    scope: Scope
    policy: Policy
    only: str = ""
    exclude: tuple[str, ...] = ()
    pattern: ZerosOf | Block | None = None
    layers: tuple[tuple[str, float], ...] = ()
    """Sparsities of their own for what selectors match; the last that matches wins."""
    allocation: Allocation | None = None
    """How many weights go in each tensor, if not the same share of each."""


def choose(model: ModelFile, wish: Wish, *, can_reencode: bool) -> Choice:
    """Return what a wish is about; a container that re-encodes can change what does not lie flat."""
    own = {tensor.name: sparsity for selector, sparsity in wish.layers for tensor in select(model, selector)}
    tensors, skips = _sorted_out(model, wish, own, can_reencode=can_reencode)
    if not tensors:
        raise UsageError(
            _nothing_left(model, skips), hint=f"--only and --policy choose; see: prunectl inspect {model.path}"
        )
    return Choice(tensors, skips, {tensor.name: own[tensor.name] for tensor in tensors if tensor.name in own})


def make(choice: Choice, wish: Wish, sparsity: float) -> Plan:
    """Return the plan that grants a wish at a sparsity."""
    drop = round(sparsity * sum(tensor.size for tensor in choice.tensors))
    if wish.scope is Scope.GLOBAL:
        return Plan(tuple(Cut(tensor, None) for tensor in choice.tensors), choice.skips, drop)
    if isinstance(wish.pattern, ZerosOf):
        counts: Sequence[int] = [_in_groups(tensor, wish.pattern) for tensor in choice.tensors]
    elif wish.allocation is not None:
        counts = wish.allocation(choice.tensors, drop)
    else:
        counts = [round(choice.own.get(tensor.name, sparsity) * tensor.size) for tensor in choice.tensors]
    cuts = tuple(Cut(tensor, count) for tensor, count in zip(choice.tensors, counts, strict=True))
    return Plan(cuts, choice.skips, sum(counts))


def _nothing_left(model: ModelFile, skips: Iterable[Skip]) -> str:
    reasons = Counter(skip.reason for skip in skips)
    # That kernels are no floats tells more than that biases are no kernels.
    told = ", ".join(f"{reason} ({reasons[reason]})" for reason in sorted(reasons, key=_telling(reasons))[:3])
    return f"{model.path} has nothing to prune: {told or 'it holds no tensors'}"


def _telling(reasons: Counter[str]) -> Callable[[str], tuple[bool, int]]:
    return lambda reason: (not reason.startswith("quantised"), -reasons[reason])


def _in_groups(tensor: Tensor, pattern: ZerosOf) -> int:
    """Return how many weights go; a short group at the end is filled up with zeros that count as gone."""
    length = tensor.shape[tensor.inputs_axis or 0]
    whole, rest = divmod(length, pattern.group)
    short = max(pattern.zeros - (pattern.group - rest), 0) if rest else 0
    return (whole * pattern.zeros + short) * (tensor.size // length)


def _sorted_out(
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
    willing = {tensor.name for tensor in model.tensors if not reasons[tensor.name]}
    # Also what nobody wants pruned is, if it shares its numbers with what is.
    tied = {name: other for name, other in ties(model.tensors, willing).items() if other in willing}
    reasons |= {name: f"tied to {other}, which is pruned" for name, other in tied.items()}
    chosen = tuple(tensor for tensor in model.tensors if not reasons[tensor.name])
    return chosen, tuple(Skip(name, reason) for name, reason in reasons.items() if reason)


def _impossible(tensor: Tensor, wish: Wish, *, can_reencode: bool) -> str:
    """Return why a tensor cannot be pruned whatever the user wants."""
    if not tensor.is_float:
        return integers(tensor)
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
