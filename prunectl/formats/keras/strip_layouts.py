"""What is to go where groups of layers name their weights: in every `.h5` but `.weights.h5`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.errors import abbreviated
from prunectl.formats.base import RemovedItem, StripOptions, StripPart
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import PRUNED_PREFIX, part, text
from prunectl.formats.keras.hdf5.read import Dataset, H5Contents
from prunectl.formats.keras.hdf5.rewrite import H5Edits, merge
from prunectl.formats.keras.layouts import CONTAINERS, TWICE
from prunectl.formats.keras.roles import name_by_position
from prunectl.formats.keras.unwrap import inner_layer

_PRUNED = frozenset({"kernel", "recurrent_kernel", "pointwise_kernel", "embeddings"})
"""What tfmot prunes in the layers that it knows; in others it may be anything."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight or a mask: where it lies in the file."""

    path: str
    leaf: str
    shape: tuple[int, ...]


class UnmatchedMaskError(Exception):
    """A mask fits no weight of its layer."""

    def __init__(self, mask: Weight) -> None:
        super().__init__(f"its mask {mask.path} has the shape {list(mask.shape)}, which no weight of its layer has")


def match_masks(masks: Sequence[Weight], weights: Sequence[Weight]) -> dict[str, str]:
    """Return the mask of each weight that has one, by their paths."""
    left: defaultdict[tuple[int, ...], deque[Weight]] = defaultdict(deque)
    for weight in sorted(weights, key=lambda weight: weight.leaf not in _PRUNED):
        left[weight.shape].append(weight)
    found: dict[str, str] = {}
    for mask in masks:
        if not left[mask.shape]:
            raise UnmatchedMaskError(mask)
        found[left[mask.shape].popleft().path] = mask.path
    return found


_OPTIMIZER = "optimizer_weights"
_TRAINING = "training_config"
_TOP = "top_level_model_weights"
_OWN = re.compile(r"(mask|threshold|pruning_step)(_\d+)?")
_FLOATS = frozenset({"float32", "float64"})


class MissingWeightError(Exception):
    """A weight or a mask is named, but not there."""


def root_of(contents: H5Contents) -> str | None:
    """Return the group that names the layers; None where weights have only numbers."""
    keys = ("layer_names", "layer_names0")
    roots = ("model_weights", "")
    return next((root for root in roots if any(contents.attribute(root, key) is not None for key in keys)), None)


def find_named(contents: H5Contents, root: str, wish: StripOptions, *, is_unwrapped: bool) -> H5Edits:
    """Return what changes in such a file, but for the configuration of the model."""
    groups = contents.names(root, "layer_names")
    names = {group: contents.names(_joined(root, group), "weight_names") for group in dict.fromkeys([*groups, _TOP])}
    pieces = list(_training(contents, wish))
    if is_unwrapped and any(_scopes(weights) for weights in names.values()):
        pieces += _unwrapped_named(contents, root, names)
    if wish.to_half:
        gone = {path for piece in pieces for path in piece.drops}
        held = {found.name: found.dtype.name for found in contents.datasets}
        promised = {_joined(root, group, weight) for group, weights in names.items() for weight in weights}
        pieces.append(H5Edits(halves=frozenset(path for path in promised - gone if held.get(path) in _FLOATS)))
    return merge(pieces)


def _training(contents: H5Contents, wish: StripOptions) -> Iterator[H5Edits]:
    """Yield what goes of the training: the losses and the optimizer's name stand in one attribute, its state apart."""
    state = [found for found in contents.datasets if found.name.startswith(f"{_OPTIMIZER}/")]
    has_state = bool(state) or _OPTIMIZER in contents.attributes
    if StripPart.OPTIMIZER in wish.parts and has_state:
        gone = tuple(RemovedItem(found.name, StripPart.OPTIMIZER, found.storage.stored_bytes) for found in state)
        yield H5Edits(removed=gone, drops=(_OPTIMIZER,))
    said = contents.attribute("", _TRAINING)
    if StripPart.TRAINING in wish.parts and isinstance(said, str):
        gone = (RemovedItem(_TRAINING, StripPart.TRAINING, len(said.encode())),)
        yield H5Edits(removed=gone, attributes={("", _TRAINING): None})


def _unwrapped_named(contents: H5Contents, root: str, names: dict[str, list[str]]) -> Iterator[H5Edits]:
    held = {found.name: found for found in contents.datasets}
    yield _renamed_lists(contents, root, "layer_names", set())
    for group, weights in names.items():
        inside = _joined(root, group)
        for weight in weights:
            if f"{inside}/{weight}" not in held:
                raise MissingWeightError(
                    f"the file is incomplete, it names {abbreviated(weight)}, but does not hold it"
                )
        here = {weight: held[f"{inside}/{weight}"] for weight in weights}
        scopes = _scopes(weights)
        own = [weight for weight in here if _is_own(weight, scopes)]
        rest = [weight for weight in here if not _is_own(weight, scopes)]
        yield _renamed_lists(contents, inside, "weight_names", set(own))
        yield H5Edits(
            removed=tuple(_drop_paths(weight, here[weight]) for weight in own),
            drops=tuple(here[weight].name for weight in own),
            moves=dict(_moves(root, group, rest)),
        )
        masks = [weight for weight in own if _leaf(weight).startswith("mask")]
        for mine, near in _wrapped(scopes, masks, rest):
            yield H5Edits(
                masks=match_masks(
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


def _renamed_lists(contents: H5Contents, group: str, key: str, gone: set[str]) -> H5Edits:
    """Return the lists of names without some of them, the others without the wrapper's prefix."""
    changed: dict[tuple[str, str], str | list[str] | None] = {}
    for said, names in contents.attributes.get(group, {}).items():
        if re.fullmatch(rf"{key}\d*", said) and isinstance(names, list):
            left = [_plain(str(name)) for name in names if str(name) not in gone]
            if left != names:
                changed[group, said] = list(left)
    return H5Edits(attributes=changed)


def _plain(path: str) -> str:
    return "/".join(step.removeprefix(PRUNED_PREFIX) for step in path.split("/"))


def _scope(weight: str) -> str:
    return weight.rpartition("/")[0]


def _leaf(weight: str) -> str:
    return weight.rpartition("/")[2].removesuffix(":0")


def _weight(found: Dataset, name: str) -> Weight:
    return Weight(found.name, _leaf(name), found.shape)


def _drop_paths(weight: str, found: Dataset) -> RemovedItem:
    kind = StripPart.MASKS if _leaf(weight).startswith("mask") else StripPart.WRAPPERS
    return RemovedItem(weight, kind, found.storage.stored_bytes)


def _joined(*steps: str) -> str:
    return "/".join(step for step in steps if step)


_MODEL = rf"(?:(?:{'|'.join(CONTAINERS)})/[^/]+/)*"
_PARTS = {
    StripPart.OPTIMIZER: re.compile(rf"{_MODEL}optimizer(?=/)"),
    StripPart.TRAINING: re.compile(rf"{_MODEL}(?:_?metrics|_?compile_metrics|_loss_tracker|_loss)(?=/)"),
}

_ATTENTION = ("query", "key", "value", "output")
"""The order in which an attention's kernels are pruned; that of the file is the alphabet's."""


class UnknownWrappedLayerError(Exception):
    """The file does not say of which classes the wrapped layers are, which their new places depend on."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a layer of the configuration lies, and where it will."""

    old: str
    new: str
    wrapped: Mapping[str, Any] | None


def find_numbered(
    contents: H5Contents, config: Mapping[str, Any] | None, wish: StripOptions, *, is_unwrapped: bool
) -> H5Edits:
    """Return what changes in such a file."""
    pieces = [_dropped(contents, kind, pattern) for kind, pattern in _PARTS.items() if kind in wish.parts]
    if is_unwrapped:
        pieces += _unwrapped_numbered(contents, config)
    if wish.to_half:
        gone = {path for piece in pieces for path in piece.drops}
        halves = frozenset(found.name for found in contents.datasets if _is_halved(found, gone))
        pieces.append(H5Edits(halves=halves))
    return merge(pieces)


def _is_halved(found: Dataset, gone: set[str]) -> bool:
    is_weight = "vars" in found.name.split("/") and not any(kind.match(found.name) for kind in _PARTS.values())
    return is_weight and found.dtype.name in _FLOATS and found.name.rpartition("/")[0] not in gone


def _dropped(contents: H5Contents, kind: StripPart, pattern: re.Pattern[str]) -> H5Edits:
    matches = [(found, pattern.match(found.name)) for found in contents.datasets]
    gone = [(found, match[0]) for found, match in matches if match]
    removed = tuple(RemovedItem(found.name, kind, found.storage.stored_bytes) for found, _ in gone)
    return H5Edits(removed=removed, drops=tuple(dict.fromkeys(group for _, group in gone)))


def _unwrapped_numbered(contents: H5Contents, config: Mapping[str, Any] | None) -> Iterator[H5Edits]:
    container = next((name for name in reversed(CONTAINERS) if _holds(contents, name)), "")
    slots = list(_slots(config, container)) if config is not None else []
    if not any(slot.wrapped for slot in slots):
        if config is None and any(PRUNED_PREFIX.rstrip("_") in found.name for found in contents.datasets):
            raise UnknownWrappedLayerError("the file holds weights alone, and does not say what its wrapped layers are")
        return
    below = _below(contents)
    if container == TWICE and any(slot.wrapped and not below.get(f"{slot.old}/layer") for slot in slots):
        raise UnknownWrappedLayerError("its layers are numbered as Keras 2.13 did it, twice for each that has weights")
    for slot in slots:
        if slot.wrapped is None:
            yield H5Edits(moves={slot.old: slot.new})
        else:
            yield H5Edits(moves={f"{slot.old}/layer": slot.new})
            yield _unwrapped_variables(below, slot.old, slot.wrapped)


def _below(contents: H5Contents) -> Mapping[str, list[Dataset]]:
    """Return what lies anywhere in the variables or in the inside of each layer."""
    below: defaultdict[str, list[Dataset]] = defaultdict(list)
    for found in contents.datasets:
        steps = found.name.split("/")
        for at, step in enumerate(steps[:-1], 1):
            if step in {"vars", "layer"}:
                below["/".join(steps[:at])].append(found)
    return below


def _holds(contents: H5Contents, container: str) -> bool:
    return any(found.name.startswith(f"{container}/") for found in contents.datasets)


def _slots(config: Any, container: str) -> Iterator[_Slot]:
    """Yield the layers whose place changes: the wrapped ones, and those whose number does."""
    waiting = [(config, "", "")]
    while waiting:
        model, old_place, new_place = waiting.pop()
        old_names, new_names = Counter[str](), Counter[str]()
        for found in _layers(model):
            wrapped = inner_layer(found)
            plain = found if wrapped is None else wrapped
            old = _numbered(old_names, found["class_name"])
            new = _numbered(new_names, plain["class_name"])
            old_path, new_path = f"{old_place}{container}/{old}", f"{new_place}{container}/{new}"
            if wrapped is not None:
                yield _Slot(old_path, new_path, wrapped)
                continue
            if old != new:
                yield _Slot(old_path, new_path, None)
            waiting.append((found, f"{old_path}/", f"{new_path}/"))
            # Other wrappers, such as TimeDistributed, may be around a wrapped layer or a model.
            inside = part(part(found, "config"), "layer")
            wrapped = inner_layer(inside)
            if wrapped is not None:
                yield _Slot(f"{old_path}/layer", f"{new_path}/layer", wrapped)
            elif inside:
                waiting.append((inside, f"{old_path}/layer/", f"{new_path}/layer/"))


def _layers(model: Any) -> list[dict[str, Any]]:
    listed = part(model, "config").get("layers")
    found = listed if isinstance(listed, list) else []
    return [layer for layer in found if isinstance(layer, dict) and isinstance(layer.get("class_name"), str)]


def _numbered(used: Counter[str], kind: str) -> str:
    """Return the step of the path that Keras gives to the next layer of a class."""
    slug = keras_config.snake_case(kind.rpartition(">")[2])
    used[slug] += 1
    return slug if used[slug] == 1 else f"{slug}_{used[slug] - 1}"


def _unwrapped_variables(below: Mapping[str, list[Dataset]], wrapper: str, wrapped: Mapping[str, Any]) -> H5Edits:
    """Return what becomes of the variables of a wrapper: weights again, then masks with thresholds, then the step."""
    own = sorted(below.get(f"{wrapper}/vars", []), key=_order)
    inside = sorted(below.get(f"{wrapper}/layer", []), key=_order)
    masks: list[Dataset] = []
    at = len(own) - 3
    while at >= 0 and own[at].shape and not own[at + 1].shape:
        masks.insert(0, own[at])
        at -= 2
    parts = {found.name: StripPart.MASKS for found in masks}
    return H5Edits(
        removed=tuple(
            RemovedItem(found.name, parts.get(found.name, StripPart.WRAPPERS), found.storage.stored_bytes)
            for found in own
        ),
        drops=(f"{wrapper}/vars",),
        masks=match_masks(
            [Weight(found.name, "mask", found.shape) for found in masks], _weights(inside, wrapper, wrapped)
        ),
    )


def _weights(inside: Sequence[Dataset], wrapper: str, wrapped: Mapping[str, Any]) -> list[Weight]:
    siblings = Counter(found.name.rpartition("/")[0] for found in inside)
    found = []
    for one in inside:
        owner, _, number = one.name.rpartition("/vars/")
        is_whole = owner == f"{wrapper}/layer"
        slug = (
            keras_config.snake_case(text(wrapped, "class_name"))
            if is_whole
            else re.sub(r"_\d+$", "", owner.rpartition("/")[2])
        )
        index = int(number) if number.isdecimal() else 0
        settings = part(wrapped, "config") if is_whole else {}
        count = siblings[one.name.rpartition("/")[0]]
        found.append(Weight(one.name, name_by_position(slug, index, count, one.shape, settings), one.shape))
    return found


def _order(found: Dataset) -> list[tuple[int, str]]:
    """Return what sorts paths by their numbers, and the parts of an attention by their use."""
    steps = re.split(r"(\d+)", found.name)
    digits = [(int(step), "") if step.isdecimal() else (0, step) for step in steps]
    turn = next((at for at, name in enumerate(_ATTENTION) if f"/_{name}_dense/" in found.name), -1)
    return [(turn, ""), *digits]
