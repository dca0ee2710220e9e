"""Plan the edits that strip an HDF5 file, in both layouts: weights listed by layer name, and weights by path."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.errors import abbreviated
from prunectl.formats.base import RemovedItem, StripOptions, StripPart
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import PRUNED_PREFIX, inner_layer, object_in, string_in
from prunectl.formats.keras.hdf5 import Dataset, H5Contents
from prunectl.formats.keras.hdf5.rewrite import H5Edits, merge
from prunectl.formats.keras.layouts import CONTAINERS, TWICE, joined, weight_names
from prunectl.formats.keras.numbering import numbered_folder
from prunectl.formats.keras.wrapped import (
    MasksNotAppliedError,
    Weight,
    by_number,
    datasets_below,
    layer_weights,
    masks_among,
    match_masks,
)

_OPTIMIZER = "optimizer_weights"
_TRAINING = "training_config"
_WRAPPER_WEIGHT = re.compile(r"(mask|threshold|pruning_step)(_\d+)?")
_FLOATS = frozenset({"float32", "float64"})


def plan_by_layer_name(contents: H5Contents, root: str, options: StripOptions, *, is_unwrapped: bool) -> H5Edits:
    """The edits of a file whose layers are listed by name (any `.h5` but `.weights.h5`), without its configuration."""
    names = weight_names(contents, root)
    pieces = list(_training(contents, options))
    if is_unwrapped and any(_scopes(weights) for weights in names.values()):
        pieces += _unwrapped_named(contents, root, names)
    if options.to_half:
        dropped = {path for piece in pieces for path in piece.drops}
        dtypes = {dataset.name: dataset.dtype.name for dataset in contents.datasets}
        listed_paths = {joined(root, group, weight) for group, weights in names.items() for weight in weights}
        pieces.append(H5Edits(halves=frozenset(path for path in listed_paths - dropped if dtypes.get(path) in _FLOATS)))
    return merge(pieces)


def _training(contents: H5Contents, options: StripOptions) -> Iterator[H5Edits]:
    """Yield the edits that remove the optimizer state (a group) and the training configuration (an attribute)."""
    state = [dataset for dataset in contents.datasets if dataset.name.startswith(f"{_OPTIMIZER}/")]
    has_state = bool(state) or _OPTIMIZER in contents.attributes
    if StripPart.OPTIMIZER in options.parts and has_state:
        removed = tuple(
            RemovedItem(dataset.name, StripPart.OPTIMIZER, dataset.storage.stored_bytes) for dataset in state
        )
        yield H5Edits(removed=removed, drops=(_OPTIMIZER,))
    text = contents.attribute("", _TRAINING)
    if StripPart.TRAINING in options.parts and isinstance(text, str):
        removed = (RemovedItem(_TRAINING, StripPart.TRAINING, len(text.encode())),)
        yield H5Edits(removed=removed, attributes={("", _TRAINING): None})


def _unwrapped_named(contents: H5Contents, root: str, names: dict[str, list[str]]) -> Iterator[H5Edits]:
    stored = {dataset.name: dataset for dataset in contents.datasets}
    yield _renamed_lists(contents, root, "layer_names", set())
    for group, weights in names.items():
        path = joined(root, group)
        for weight in weights:
            if f"{path}/{weight}" not in stored:
                raise MasksNotAppliedError(
                    f"the file is incomplete: it names {abbreviated(weight)} but does not hold it"
                )
        members = {weight: stored[f"{path}/{weight}"] for weight in weights}
        scopes = _scopes(weights)
        wrapper_weights = [weight for weight in members if _is_wrapper_weight(weight, scopes)]
        layer_weights = [weight for weight in members if not _is_wrapper_weight(weight, scopes)]
        yield _renamed_lists(contents, path, "weight_names", set(wrapper_weights))
        yield H5Edits(
            removed=tuple(_removed_item(weight, members[weight]) for weight in wrapper_weights),
            drops=tuple(members[weight].name for weight in wrapper_weights),
            moves=dict(_moves(root, group, layer_weights)),
        )
        masks = [weight for weight in wrapper_weights if _leaf(weight).startswith("mask")]
        for wrapper_masks, candidates in _wrapped(scopes, masks, layer_weights):
            yield H5Edits(
                masks=match_masks(
                    [_weight(members[name], name) for name in wrapper_masks],
                    [_weight(members[name], name) for name in candidates],
                )
            )


def _wrapped(scopes: Iterable[str], masks: list[str], weights: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the masks of each wrapper with the weights inside it, whose names may lack the wrapper's prefix."""
    by_step: defaultdict[str, list[str]] = defaultdict(list)
    for weight in weights:
        for step in dict.fromkeys(_plain(weight).split("/")[:-1]):
            by_step[step].append(weight)
    by_scope: defaultdict[str, list[str]] = defaultdict(list)
    for mask in masks:
        by_scope[_scope(mask)].append(mask)
    for scope in scopes:
        scope_path = f"/{_plain(scope)}/"
        inside = [weight for weight in by_step[_plain(scope).rpartition("/")[2]] if scope_path in f"/{_plain(weight)}"]
        yield by_scope[scope], inside or weights


def _scopes(weights: list[str]) -> dict[str, None]:
    """The scopes of wrappers, in their order: those that hold a pruning step."""
    return dict.fromkeys(_scope(weight) for weight in weights if _leaf(weight).startswith("pruning_step"))


def _is_wrapper_weight(weight: str, scopes: Mapping[str, None]) -> bool:
    return _scope(weight) in scopes and _WRAPPER_WEIGHT.fullmatch(_leaf(weight)) is not None


def _moves(root: str, group: str, weights: list[str]) -> Iterator[tuple[str, str]]:
    old, new = joined(root, group), joined(root, _plain(group))
    if old != new:
        yield old, new
    for weight in weights:
        if _plain(weight) != weight:
            yield f"{old}/{weight}", f"{new}/{_plain(weight)}"


def _renamed_lists(contents: H5Contents, group: str, key: str, dropped: set[str]) -> H5Edits:
    """The edits of lists of names: some names are dropped, the others lose the wrapper's prefix."""
    changed: dict[tuple[str, str], str | list[str] | None] = {}
    for attribute, names in contents.attributes.get(group, {}).items():
        if re.fullmatch(rf"{key}\d*", attribute) and isinstance(names, list):
            kept = [_plain(str(name)) for name in names if str(name) not in dropped]
            if kept != names:
                changed[group, attribute] = list(kept)
    return H5Edits(attributes=changed)


def _plain(path: str) -> str:
    return "/".join(step.removeprefix(PRUNED_PREFIX) for step in path.split("/"))


def _scope(weight: str) -> str:
    return weight.rpartition("/")[0]


def _leaf(weight: str) -> str:
    return weight.rpartition("/")[2].removesuffix(":0")


def _weight(dataset: Dataset, name: str) -> Weight:
    return Weight(dataset.name, _leaf(name), dataset.shape)


def _removed_item(weight: str, dataset: Dataset) -> RemovedItem:
    kind = StripPart.MASKS if _leaf(weight).startswith("mask") else StripPart.WRAPPERS
    return RemovedItem(weight, kind, dataset.storage.stored_bytes)


_MODEL = rf"(?:(?:{'|'.join(CONTAINERS)})/[^/]+/)*"
_PARTS = {
    StripPart.OPTIMIZER: re.compile(rf"{_MODEL}optimizer(?=/)"),
    StripPart.TRAINING: re.compile(rf"{_MODEL}(?:_?metrics|_?compile_metrics|_loss_tracker|_loss)(?=/)"),
}


@dataclass(frozen=True, slots=True)
class _Relocation:
    """A layer that moves from an old to a new path, with the layer inside it if it is a pruning wrapper."""

    old: str
    new: str
    wrapped: Mapping[str, Any] | None


def plan_by_path(
    contents: H5Contents, config: Mapping[str, Any] | None, options: StripOptions, *, is_unwrapped: bool
) -> H5Edits:
    """The edits of a file whose weights are numbered by path (`.weights.h5`, `.keras`)."""
    pieces = [_dropped(contents, kind, pattern) for kind, pattern in _PARTS.items() if kind in options.parts]
    if is_unwrapped:
        pieces += _unwrapped_numbered(contents, config)
    if options.to_half:
        dropped = {path for piece in pieces for path in piece.drops}
        halves = frozenset(dataset.name for dataset in contents.datasets if _is_halved(dataset, dropped))
        pieces.append(H5Edits(halves=halves))
    return merge(pieces)


def _is_halved(dataset: Dataset, dropped: set[str]) -> bool:
    is_weight = "vars" in dataset.name.split("/") and not any(kind.match(dataset.name) for kind in _PARTS.values())
    return is_weight and dataset.dtype.name in _FLOATS and dataset.name.rpartition("/")[0] not in dropped


def _dropped(contents: H5Contents, kind: StripPart, pattern: re.Pattern[str]) -> H5Edits:
    matches = [(dataset, pattern.match(dataset.name)) for dataset in contents.datasets]
    matched = [(dataset, match[0]) for dataset, match in matches if match]
    removed = tuple(RemovedItem(dataset.name, kind, dataset.storage.stored_bytes) for dataset, _ in matched)
    return H5Edits(removed=removed, drops=tuple(dict.fromkeys(group for _, group in matched)))


def _unwrapped_numbered(contents: H5Contents, config: Mapping[str, Any] | None) -> Iterator[H5Edits]:
    container = next((name for name in reversed(CONTAINERS) if _holds(contents, name)), "")
    relocations = list(_relocations(config, container)) if config is not None else []
    if not any(relocation.wrapped for relocation in relocations):
        if config is None and any(PRUNED_PREFIX.rstrip("_") in dataset.name for dataset in contents.datasets):
            raise MasksNotAppliedError("the file holds only weights and does not describe its wrapped layers")
        return
    below = datasets_below(contents.datasets)
    if container == TWICE and any(
        relocation.wrapped and not below.get(f"{relocation.old}/layer") for relocation in relocations
    ):
        raise MasksNotAppliedError("its layers are numbered as in Keras 2.13, twice for each layer with weights")
    for relocation in relocations:
        if relocation.wrapped is None:
            yield H5Edits(moves={relocation.old: relocation.new})
        else:
            yield H5Edits(moves={f"{relocation.old}/layer": relocation.new})
            yield _unwrapped_variables(below, relocation.old, relocation.wrapped)


def _holds(contents: H5Contents, container: str) -> bool:
    return any(dataset.name.startswith(f"{container}/") for dataset in contents.datasets)


def _relocations(config: Any, container: str) -> Iterator[_Relocation]:
    """Yield the layers whose path changes: wrapped layers, and layers that get another number."""
    pending = [(config, "", "")]
    while pending:
        model, old_prefix, new_prefix = pending.pop()
        old_names, new_names = Counter[str](), Counter[str]()
        for layer in keras_config.layer_entries(model):
            wrapped = inner_layer(layer)
            plain = layer if wrapped is None else wrapped
            old = _next_folder(old_names, string_in(layer, "class_name"))
            new = _next_folder(new_names, string_in(plain, "class_name"))
            old_path, new_path = f"{old_prefix}{container}/{old}", f"{new_prefix}{container}/{new}"
            if wrapped is not None:
                yield _Relocation(old_path, new_path, wrapped)
                continue
            if old != new:
                yield _Relocation(old_path, new_path, None)
            pending.append((layer, f"{old_path}/", f"{new_path}/"))
            # Other wrappers, such as TimeDistributed, may be around a wrapped layer or a model.
            inside = object_in(object_in(layer, "config"), "layer")
            wrapped = inner_layer(inside)
            if wrapped is not None:
                yield _Relocation(f"{old_path}/layer", f"{new_path}/layer", wrapped)
            elif inside:
                pending.append((inside, f"{old_path}/layer/", f"{new_path}/layer/"))


def _next_folder(used: Counter[str], kind: str) -> str:
    """The folder that Keras gives to the next layer of a class."""
    slug = keras_config.snake_case(kind.rpartition(">")[2])
    used[slug] += 1
    return numbered_folder(slug, used[slug] - 1)


def _unwrapped_variables(below: Mapping[str, list[Dataset]], wrapper: str, wrapped: Mapping[str, Any]) -> H5Edits:
    """The edits of a wrapper's own variables: second copies of weights, masks with thresholds, the pruning step."""
    variables = sorted(below.get(f"{wrapper}/vars", []), key=by_number)
    weights = sorted(below.get(f"{wrapper}/layer", []), key=by_number)
    masks = masks_among(variables)
    parts = {dataset.name: StripPart.MASKS for dataset in masks}
    return H5Edits(
        removed=tuple(
            RemovedItem(dataset.name, parts.get(dataset.name, StripPart.WRAPPERS), dataset.storage.stored_bytes)
            for dataset in variables
        ),
        drops=(f"{wrapper}/vars",),
        masks=match_masks(
            [Weight(dataset.name, "mask", dataset.shape) for dataset in masks], layer_weights(weights, wrapper, wrapped)
        ),
    )
