"""Weights that a state dict keeps beside their masks, as told by names, and what they are called without wrappers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

_BETWEEN = ".parametrizations."
_MASK = "_mask"


@dataclass(frozen=True, slots=True)
class MaskedParam:
    """A weight as pruning keeps it."""

    plain: str
    """What it is called without a wrapper."""
    original: str
    masks: tuple[str, ...]
    wrapper: str
    """What the names of the wrapper begin with."""


def find(names: Collection[str], others: Mapping[str, str]) -> tuple[MaskedParam, ...]:
    """The weights of one state dict that are kept beside their masks.

    The others are masks that a sparsifier keeps elsewhere, by the name of the weight that they belong to.
    """
    there = frozenset(names)
    weights = [*_of_torch_prune(there), *_of_parametrize(there, others), *_of_nni(there)]
    return tuple(weight for weight in weights if weight.plain not in there)


def _of_torch_prune(names: frozenset[str]) -> list[MaskedParam]:
    plain = [name.removesuffix(_MASK) for name in sorted(names) if name.endswith(_MASK)]
    return [
        MaskedParam(name, f"{name}_orig", (f"{name}{_MASK}",), f"{name}_orig")
        for name in plain
        if f"{name}_orig" in names
    ]


def _of_parametrize(names: frozenset[str], others: Mapping[str, str]) -> list[MaskedParam]:
    """Weights with masks and nothing else between them and their layer."""
    beside: dict[str, list[str]] = {}
    for name in sorted(names):
        layer, between, rest = f".{name}".partition(_BETWEEN)
        if between:
            tensor, _, leaf = rest.partition(".")
            beside.setdefault(f"{layer}{between}{tensor}"[1:], []).append(leaf)
    weights = []
    for wrapper, leaves in beside.items():
        layer, _, tensor = f".{wrapper}".partition(_BETWEEN)
        plain = f"{layer}.{tensor}".lstrip(".")
        masks = [leaf for leaf in leaves if leaf != "original"]
        kept = [f"{wrapper}.{leaf}" for leaf in masks] or ([others[plain]] if plain in others else [])
        is_masked = all(leaf.split(".", 1)[0].isdigit() and leaf.endswith(".mask") for leaf in masks)
        if "original" in leaves and is_masked and kept:
            weights.append(MaskedParam(plain, f"{wrapper}.original", tuple(kept), wrapper))
    return weights


def _of_nni(names: frozenset[str]) -> list[MaskedParam]:
    weights = []
    for name in sorted(names):
        layer, dot, leaf = name.removesuffix(_MASK).rpartition(".")
        inner = f"{layer}{dot}module.{leaf}"
        if name.endswith(_MASK) and inner in names:
            weights.append(MaskedParam(f"{layer}{dot}{leaf}", inner, (name,), f"{layer}{dot}module"))
    return weights


def renamed(names: Collection[str], wrapped: Collection[MaskedParam]) -> dict[str, str]:
    """What names are called once the wrappers are gone: NNI's stand in every name of their layer."""
    plain = {weight.original: weight.plain for weight in wrapped}
    inside = {weight.wrapper for weight in wrapped if weight.wrapper == f"{_owner(weight.plain)}module"}
    for name in names:
        owner, between, leaf = name.partition("module.") if name.startswith("module.") else name.partition(".module.")
        wrapper = f"{owner}{between.rstrip('.')}"
        if name not in plain and between and wrapper in inside:
            plain[name] = f"{owner}.{leaf}".lstrip(".")
    return {name: plain.get(name, name) for name in names}


def _owner(name: str) -> str:
    owner, dot, _ = name.rpartition(".")
    return f"{owner}{dot}"
