"""Masked weights in a state dict, recognised by their names, and their names without the pruning wrappers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

_PARAMETRIZATIONS = ".parametrizations."
_MASK = "_mask"


@dataclass(frozen=True, slots=True)
class MaskedParam:
    """A weight that is stored apart from its masks."""

    plain: str
    """Name without the wrapper: `fc.weight` for a stored `fc.weight_orig`."""
    original: str
    masks: tuple[str, ...]
    wrapper: str
    """Prefix of the names in the wrapper."""


def find(names: Collection[str], ao_masks: Mapping[str, str]) -> tuple[MaskedParam, ...]:
    """The masked weights of one state dict.

    `ao_masks` are the masks that a sparsifier of torch.ao.pruning stores elsewhere, by the name of their weight.
    """
    all_names = frozenset(names)
    weights = [*_of_torch_prune(all_names), *_of_parametrize(all_names, ao_masks), *_of_nni(all_names)]
    return tuple(weight for weight in weights if weight.plain not in all_names)


def _of_torch_prune(names: frozenset[str]) -> list[MaskedParam]:
    plain = [name.removesuffix(_MASK) for name in sorted(names) if name.endswith(_MASK)]
    return [
        MaskedParam(name, f"{name}_orig", (f"{name}{_MASK}",), f"{name}_orig")
        for name in plain
        if f"{name}_orig" in names
    ]


def _of_parametrize(names: frozenset[str], ao_masks: Mapping[str, str]) -> list[MaskedParam]:
    """Weights whose only parametrizations are masks."""
    beside: dict[str, list[str]] = {}
    for name in sorted(names):
        layer, between, rest = f".{name}".partition(_PARAMETRIZATIONS)
        if between:
            tensor, _, leaf = rest.partition(".")
            beside.setdefault(f"{layer}{between}{tensor}"[1:], []).append(leaf)
    weights = []
    for wrapper, leaves in beside.items():
        layer, _, tensor = f".{wrapper}".partition(_PARAMETRIZATIONS)
        plain = f"{layer}.{tensor}".lstrip(".")
        masks = [leaf for leaf in leaves if leaf != "original"]
        mask_names = [f"{wrapper}.{leaf}" for leaf in masks] or ([ao_masks[plain]] if plain in ao_masks else [])
        is_masked = all(leaf.split(".", 1)[0].isdigit() and leaf.endswith(".mask") for leaf in masks)
        if "original" in leaves and is_masked and mask_names:
            weights.append(MaskedParam(plain, f"{wrapper}.original", tuple(mask_names), wrapper))
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
    """The names without wrappers; those of NNI are part of every name in their layer."""
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
