"""Which families may lose channels, and why the others may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from prunectl.channels.choose import Candidate
from prunectl.channels.couple import Family
from prunectl.channels.cutting import Cutting
from prunectl.channels.scores import Scores, at_random, of_family
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.names import select
from prunectl.pruning.plan import Skip


def candidates(
    model: ModelFile, families: Sequence[Family], weights: Mapping[str, Array], cutting: Cutting
) -> tuple[tuple[Candidate, ...], tuple[Skip, ...]]:
    """Return the families that are asked for and may be cut, and why the others are left alone."""
    only = _names(model, (cutting.only,)) if cutting.only else None
    excluded = _names(model, cutting.exclude)
    own = {tensor.name: ratio for selector, ratio in cutting.layers for tensor in select(model, selector)}
    found, skips = [], []
    for family in families:
        reason = _reason(family, only, excluded)
        scores = None if reason else _scores(family, weights, cutting)
        if scores is None:
            skips.append(Skip(family.name, reason or "nothing that the strategy looks at"))
        else:
            ratios = [own[name] for name in family.makers if name in own]
            found.append(Candidate(family, scores, ratios[-1] if ratios else None))
    if not found:
        reasons = Counter(skip.reason for skip in skips)
        told = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common(3))
        raise UsageError(
            f"{model.path} has no channels to cut: {told or 'no weight makes any'}",
            hint=f"prunectl inspect {model.path} --groups",
        )
    return tuple(found), tuple(skips)


def _names(model: ModelFile, selectors: Sequence[str]) -> set[str]:
    return {tensor.name for selector in selectors for tensor in select(model, selector)}


def _reason(family: Family, only: set[str] | None, excluded: set[str]) -> str:
    if family.reason:
        return family.reason
    if excluded.intersection(family.makers):
        return "excluded"
    return "" if only is None or only.intersection(family.makers) else "not among --only"


def _scores(family: Family, weights: Mapping[str, Array], cutting: Cutting) -> Scores | None:
    if cutting.measure is None:
        return at_random(family, cutting.seed)
    return of_family(family, weights, cutting.measure)
