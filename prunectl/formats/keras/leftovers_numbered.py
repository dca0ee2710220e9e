"""What is to go where weights have only numbers: in `model.weights.h5`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import PRUNED_PREFIX, part, text
from prunectl.formats.keras.edits import Edits, merged
from prunectl.formats.keras.hdf5 import Contents, Dataset
from prunectl.formats.keras.masked import Weight, matched
from prunectl.formats.keras.numbering import CONTAINERS, TWICE
from prunectl.formats.keras.roles import positional_name
from prunectl.formats.keras.unwrapped import inner_of
from prunectl.formats.stripping import Part, Removed, Wish

_MODEL = rf"(?:(?:{'|'.join(CONTAINERS)})/[^/]+/)*"
_PARTS = {
    Part.OPTIMIZER: re.compile(rf"{_MODEL}optimizer(?=/)"),
    Part.TRAINING: re.compile(rf"{_MODEL}(?:_?metrics|_?compile_metrics|_loss_tracker|_loss)(?=/)"),
}
_FLOATS = frozenset({"float32", "float64"})
_ATTENTION = ("query", "key", "value", "output")
"""The order in which an attention's kernels are pruned; that of the file is the alphabet's."""


class UnknownLayerError(Exception):
    """The file does not say of which classes the wrapped layers are, which their new places depend on."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a layer of the configuration lies, and where it will."""

    old: str
    new: str
    wrapped: Mapping[str, Any] | None


def find(contents: Contents, config: Mapping[str, Any] | None, wish: Wish, *, is_unwrapped: bool) -> Edits:
    """Return what changes in such a file."""
    pieces = [_dropped(contents, kind, pattern) for kind, pattern in _PARTS.items() if kind in wish.parts]
    if is_unwrapped:
        pieces += _unwrapped(contents, config)
    if wish.is_half:
        gone = {path for piece in pieces for path in piece.drops}
        halves = frozenset(found.name for found in contents.datasets if _is_halved(found, gone))
        pieces.append(Edits(halves=halves))
    return merged(pieces)


def _is_halved(found: Dataset, gone: set[str]) -> bool:
    is_weight = "vars" in found.name.split("/") and not any(kind.match(found.name) for kind in _PARTS.values())
    return is_weight and found.dtype.name in _FLOATS and found.name.rpartition("/")[0] not in gone


def _dropped(contents: Contents, kind: Part, pattern: re.Pattern[str]) -> Edits:
    matches = [(found, pattern.match(found.name)) for found in contents.datasets]
    gone = [(found, match[0]) for found, match in matches if match]
    removed = tuple(Removed(found.name, kind, found.storage.stored_bytes) for found, _ in gone)
    return Edits(removed=removed, drops=tuple(dict.fromkeys(group for _, group in gone)))


def _unwrapped(contents: Contents, config: Mapping[str, Any] | None) -> Iterator[Edits]:
    container = next((name for name in reversed(CONTAINERS) if _holds(contents, name)), "")
    slots = list(_slots(config, container)) if config is not None else []
    if not any(slot.wrapped for slot in slots):
        if config is None and any(PRUNED_PREFIX.rstrip("_") in found.name for found in contents.datasets):
            raise UnknownLayerError("the file holds weights alone, and does not say what its wrapped layers are")
        return
    below = _below(contents)
    if container == TWICE and any(slot.wrapped and not below.get(f"{slot.old}/layer") for slot in slots):
        raise UnknownLayerError("its layers are numbered as Keras 2.13 did it, twice for each that has weights")
    for slot in slots:
        if slot.wrapped is None:
            yield Edits(moves={slot.old: slot.new})
        else:
            yield Edits(moves={f"{slot.old}/layer": slot.new})
            yield _taken_off(below, slot.old, slot.wrapped)


def _below(contents: Contents) -> Mapping[str, list[Dataset]]:
    """Return what lies anywhere in the variables or in the inside of each layer."""
    below: defaultdict[str, list[Dataset]] = defaultdict(list)
    for found in contents.datasets:
        steps = found.name.split("/")
        for at, step in enumerate(steps[:-1], 1):
            if step in {"vars", "layer"}:
                below["/".join(steps[:at])].append(found)
    return below


def _holds(contents: Contents, container: str) -> bool:
    return any(found.name.startswith(f"{container}/") for found in contents.datasets)


def _slots(config: Any, container: str) -> Iterator[_Slot]:
    """Yield the layers whose place changes: the wrapped ones, and those whose number does."""
    waiting = [(config, "", "")]
    while waiting:
        model, old_place, new_place = waiting.pop()
        old_names, new_names = Counter[str](), Counter[str]()
        for found in _layers(model):
            wrapped = inner_of(found)
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
            wrapped = inner_of(inside)
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


def _taken_off(below: Mapping[str, list[Dataset]], wrapper: str, wrapped: Mapping[str, Any]) -> Edits:
    """Return what becomes of the variables of a wrapper: weights again, then masks with thresholds, then the step."""
    own = sorted(below.get(f"{wrapper}/vars", []), key=_order)
    inside = sorted(below.get(f"{wrapper}/layer", []), key=_order)
    masks: list[Dataset] = []
    at = len(own) - 3
    while at >= 0 and own[at].shape and not own[at + 1].shape:
        masks.insert(0, own[at])
        at -= 2
    parts = {found.name: Part.MASKS for found in masks}
    return Edits(
        removed=tuple(
            Removed(found.name, parts.get(found.name, Part.WRAPPERS), found.storage.stored_bytes) for found in own
        ),
        drops=(f"{wrapper}/vars",),
        masks=matched([Weight(found.name, "mask", found.shape) for found in masks], _weights(inside, wrapper, wrapped)),
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
        found.append(Weight(one.name, positional_name(slug, index, count, one.shape, settings), one.shape))
    return found


def _order(found: Dataset) -> list[tuple[int, str]]:
    """Return what sorts paths by their numbers, and the parts of an attention by their use."""
    steps = re.split(r"(\d+)", found.name)
    digits = [(int(step), "") if step.isdecimal() else (0, step) for step in steps]
    turn = next((at for at, name in enumerate(_ATTENTION) if f"/_{name}_dense/" in found.name), -1)
    return [(turn, ""), *digits]
