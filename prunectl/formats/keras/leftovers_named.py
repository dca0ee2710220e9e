"""What is to go where groups of layers name their weights: in every `.h5` but `.weights.h5`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from prunectl.errors import abbreviated
from prunectl.formats.keras.config import PRUNED_PREFIX
from prunectl.formats.keras.edits import Edits, merged
from prunectl.formats.keras.hdf5 import Contents, Dataset
from prunectl.formats.keras.masked import Weight, matched
from prunectl.formats.stripping import Part, Removed, Wish

_OPTIMIZER = "optimizer_weights"
_TRAINING = "training_config"
_TOP = "top_level_model_weights"
_OWN = re.compile(r"(mask|threshold|pruning_step)(_\d+)?")
_FLOATS = frozenset({"float32", "float64"})


class IncompleteError(Exception):
    """A weight or a mask is named, but not there."""


def root_of(contents: Contents) -> str | None:
    """Return the group that names the layers; None where weights have only numbers."""
    keys = ("layer_names", "layer_names0")
    roots = ("model_weights", "")
    return next((root for root in roots if any(contents.attribute(root, key) is not None for key in keys)), None)


def find(contents: Contents, root: str, wish: Wish, *, is_unwrapped: bool) -> Edits:
    """Return what changes in such a file, but for the configuration of the model."""
    groups = contents.names(root, "layer_names")
    names = {group: contents.names(_joined(root, group), "weight_names") for group in dict.fromkeys([*groups, _TOP])}
    pieces = list(_training(contents, wish))
    if is_unwrapped and any(_scopes(weights) for weights in names.values()):
        pieces += _unwrapped(contents, root, names)
    if wish.is_half:
        gone = {path for piece in pieces for path in piece.drops}
        held = {found.name: found.dtype.name for found in contents.datasets}
        promised = {_joined(root, group, weight) for group, weights in names.items() for weight in weights}
        pieces.append(Edits(halves=frozenset(path for path in promised - gone if held.get(path) in _FLOATS)))
    return merged(pieces)


def _training(contents: Contents, wish: Wish) -> Iterator[Edits]:
    """Yield what goes of the training: the losses and the optimizer's name stand in one attribute, its state apart."""
    state = [found for found in contents.datasets if found.name.startswith(f"{_OPTIMIZER}/")]
    has_state = bool(state) or _OPTIMIZER in contents.attributes
    if Part.OPTIMIZER in wish.parts and has_state:
        gone = tuple(Removed(found.name, Part.OPTIMIZER, found.storage.stored_bytes) for found in state)
        yield Edits(removed=gone, drops=(_OPTIMIZER,))
    said = contents.attribute("", _TRAINING)
    if Part.TRAINING in wish.parts and isinstance(said, str):
        gone = (Removed(_TRAINING, Part.TRAINING, len(said.encode())),)
        yield Edits(removed=gone, attributes={("", _TRAINING): None})


def _unwrapped(contents: Contents, root: str, names: dict[str, list[str]]) -> Iterator[Edits]:
    held = {found.name: found for found in contents.datasets}
    yield _renamed_lists(contents, root, "layer_names", set())
    for group, weights in names.items():
        inside = _joined(root, group)
        for weight in weights:
            if f"{inside}/{weight}" not in held:
                raise IncompleteError(f"the file is incomplete, it names {abbreviated(weight)}, but does not hold it")
        here = {weight: held[f"{inside}/{weight}"] for weight in weights}
        scopes = _scopes(weights)
        own = [weight for weight in here if _is_own(weight, scopes)]
        rest = [weight for weight in here if not _is_own(weight, scopes)]
        yield _renamed_lists(contents, inside, "weight_names", set(own))
        yield Edits(
            removed=tuple(_gone(weight, here[weight]) for weight in own),
            drops=tuple(here[weight].name for weight in own),
            moves=dict(_moves(root, group, rest)),
        )
        masks = [weight for weight in own if _leaf(weight).startswith("mask")]
        for mine, near in _wrapped(scopes, masks, rest):
            yield Edits(
                masks=matched(
                    [_weight(here[name], name) for name in mine], [_weight(here[name], name) for name in near]
                )
            )


def _wrapped(scopes: Iterable[str], masks: list[str], weights: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the masks of each wrapper with the weights in it: by their names, with or without the wrapper's."""
    by_step: defaultdict[str, list[str]] = defaultdict(list)
    for weight in weights:
        for step in dict.fromkeys(_plain(weight).split("/")[:-1]):
            by_step[step].append(weight)
    by_scope: defaultdict[str, list[str]] = defaultdict(list)
    for mask in masks:
        by_scope[_scope(mask)].append(mask)
    for scope in scopes:
        around = f"/{_plain(scope)}/"
        near = [weight for weight in by_step[_plain(scope).rpartition("/")[2]] if around in f"/{_plain(weight)}"]
        yield by_scope[scope], near or weights


def _scopes(weights: list[str]) -> dict[str, None]:
    """Return the scopes of wrappers, in their order: each has counted its steps."""
    return dict.fromkeys(_scope(weight) for weight in weights if _leaf(weight).startswith("pruning_step"))


def _is_own(weight: str, scopes: Mapping[str, None]) -> bool:
    return _scope(weight) in scopes and _OWN.fullmatch(_leaf(weight)) is not None


def _moves(root: str, group: str, weights: list[str]) -> Iterator[tuple[str, str]]:
    old, new = _joined(root, group), _joined(root, _plain(group))
    if old != new:
        yield old, new
    for weight in weights:
        if _plain(weight) != weight:
            yield f"{old}/{weight}", f"{new}/{_plain(weight)}"


def _renamed_lists(contents: Contents, group: str, key: str, gone: set[str]) -> Edits:
    """Return the lists of names without some of them, the others without the wrapper's prefix."""
    changed: dict[tuple[str, str], str | list[str] | None] = {}
    for said, names in contents.attributes.get(group, {}).items():
        if re.fullmatch(rf"{key}\d*", said) and isinstance(names, list):
            left = [_plain(str(name)) for name in names if str(name) not in gone]
            if left != names:
                changed[group, said] = list(left)
    return Edits(attributes=changed)


def _plain(path: str) -> str:
    return "/".join(step.removeprefix(PRUNED_PREFIX) for step in path.split("/"))


def _scope(weight: str) -> str:
    return weight.rpartition("/")[0]


def _leaf(weight: str) -> str:
    return weight.rpartition("/")[2].removesuffix(":0")


def _weight(found: Dataset, name: str) -> Weight:
    return Weight(found.name, _leaf(name), found.shape)


def _gone(weight: str, found: Dataset) -> Removed:
    kind = Part.MASKS if _leaf(weight).startswith("mask") else Part.WRAPPERS
    return Removed(weight, kind, found.storage.stored_bytes)


def _joined(*steps: str) -> str:
    return "/".join(step for step in steps if step)
