"""Wrappers in files of numbered weights: which variables are masks of tfmot, and which are second copies of weights.

A wrapper of tfmot keeps its layer in the folder `layer`, and variables of its own in `vars`: a second copy of each
weight that it prunes, then a mask and a threshold for each of them, then the pruning step.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, NamedTuple

from prunectl.formats.base import Role
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import WRAPPER, LayerConfig, inner_layer, object_in, string_in
from prunectl.formats.keras.hdf5 import Dataset
from prunectl.formats.keras.roles import name_by_position, position

_PRUNED = frozenset({"kernel", "recurrent_kernel", "pointwise_kernel", "embeddings"})
"""The weights that tfmot prunes in the layers that it knows; in other layers it may be any weight."""
_ATTENTION = ("query", "key", "value", "output")
"""The order in which tfmot prunes the kernels of an attention; the file has them in alphabetical order."""
_WRAPPER_FOLDER = re.compile(r"prune_low_magnitude(_\d+)?")
_QUANTIZE_FOLDER = re.compile(r"quantize_wrapper(_v2)?(_\d+)?")
_SPECTRAL_FOLDER = re.compile(r"spectral_normalization(_\d+)?")
_MOST_QUANTIZED = 8
"""Most weights of a layer that tfmot quantizes; most layers have one, or two for each cell."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight or a mask: where it lies in the file."""

    path: str
    name: str
    shape: tuple[int, ...]


class MasksNotAppliedError(Exception):
    """The file does not say which weight a mask is for, or where a weight without its wrapper belongs."""


def match_masks(masks: Sequence[Weight], weights: Sequence[Weight]) -> dict[str, str]:
    """The mask of each weight that has one, by their paths."""
    unmasked: defaultdict[tuple[int, ...], deque[Weight]] = defaultdict(deque)
    for weight in sorted(weights, key=lambda weight: weight.name not in _PRUNED):
        unmasked[weight.shape].append(weight)
    mask_paths: dict[str, str] = {}
    for mask in masks:
        if not unmasked[mask.shape]:
            raise MasksNotAppliedError(
                f"its mask {mask.path} has the shape {list(mask.shape)}, but no weight of its layer has this shape"
            )
        mask_paths[unmasked[mask.shape].popleft().path] = mask.path
    return mask_paths


_MOST_NESTED = 8
"""Most `layer` folders on the path to a weight that are looked at, from the innermost outwards."""


def datasets_below(datasets: Sequence[Dataset]) -> Mapping[str, list[Dataset]]:
    """Datasets in each `vars` group and below each `layer` group."""
    below: defaultdict[str, list[Dataset]] = defaultdict(list)
    for dataset in datasets:
        folder = dataset.name.rpartition("/")[0]
        if folder.rpartition("/")[2] == "vars":
            below[folder].append(dataset)
        path = f"/{folder}/"
        end = len(path)
        for _ in range(_MOST_NESTED):
            # The slash at the end of one folder may be the slash at the beginning of the next.
            end = path.rfind("/layer/", 0, end + 1)
            if end < 0:
                break
            below[path[1 : end + len("/layer")]].append(dataset)
    return below


def masks_among(variables: Sequence[Dataset]) -> list[Dataset]:
    """The masks among the ordered variables of a wrapper: each is followed by its threshold, a scalar."""
    masks: list[Dataset] = []
    index = len(variables) - 3
    while index >= 0 and variables[index].shape and not variables[index + 1].shape:
        masks.insert(0, variables[index])
        index -= 2
    return masks


def layer_weights(datasets: Sequence[Dataset], wrapper: str, wrapped: Mapping[str, Any]) -> list[Weight]:
    """The weights of a wrapped layer, under the names that its class gives them."""
    siblings = Counter(dataset.name.rpartition("/")[0] for dataset in datasets)
    weights = []
    for dataset in datasets:
        owner, _, number = dataset.name.rpartition("/vars/")
        is_own = owner == f"{wrapper}/layer"
        slug = (
            keras_config.snake_case(string_in(wrapped, "class_name"))
            if is_own
            else re.sub(r"_\d+$", "", owner.rpartition("/")[2])
        )
        index = position(number)
        settings = object_in(wrapped, "config") if is_own else {}
        count = siblings[dataset.name.rpartition("/")[0]]
        weights.append(
            Weight(dataset.name, name_by_position(slug, index, count, dataset.shape, settings), dataset.shape)
        )
    return weights


def by_number(dataset: Dataset) -> list[tuple[int, str]]:
    """Sort key: paths by their numbers, the parts of an attention by their use."""
    steps = re.split(r"(\d+)", dataset.name)
    # Numbers are compared by length, then by digits, since a hostile file may have one that int() refuses.
    digits = [(len(step.lstrip("0")), step.lstrip("0")) if step.isdecimal() else (0, step) for step in steps]
    rank = next((index for index, name in enumerate(_ATTENTION) if f"/_{name}_dense/" in dataset.name), -1)
    return [(rank, ""), *digits]


@dataclass(slots=True)
class WrappedLayers:
    """The wrapped layers of a file."""

    folders: set[str] = field(default_factory=set)
    """The folders of the wrappers."""
    layers: dict[str, LayerConfig] = field(default_factory=dict)
    """The layers of the configuration inside the wrappers, by their folders."""
    variables: dict[str, tuple[str, Role]] = field(default_factory=dict)
    """The names and roles of the wrappers' own variables, by their paths."""
    copies: dict[str, str] = field(default_factory=dict)
    """The paths of second copies of weights, with the paths of the originals, which Keras loads last."""


def wrapped_layers(datasets: Sequence[Dataset], slots: Mapping[str, LayerConfig]) -> WrappedLayers:
    """The wrapped layers among datasets; ``slots`` are the layers of the configuration by their folders."""
    wrapped = WrappedLayers()
    below = datasets_below(datasets)
    for group, members in below.items():
        folder, _, last = group.rpartition("/")
        layer = slots.get(folder)
        if last == "vars" and _QUANTIZE_FOLDER.fullmatch(folder.rpartition("/")[2]):
            copies = _listed_twice(members)
            wrapped.copies |= copies
            wrapped.variables |= dict.fromkeys(copies, ("copy", Role.OTHER))
        if last == "vars" and _is_spectral_normalization(folder, layer):
            copies = _kernel_of_wrapper(members, below.get(f"{folder}/layer", []))
            wrapped.copies |= copies
            wrapped.variables |= dict.fromkeys(copies, ("copy", Role.OTHER))
        if last != "vars" or (layer is not None and layer.kind.rpartition(">")[2] != WRAPPER):
            continue
        variables = _wrapper_variables(members)
        # Without a configuration, and in subclassed models, the class of the layer is unknown.
        if layer is not None or _looks_like_wrapper(folder, variables, has_layer=f"{folder}/layer" in below):
            _add(wrapped, folder, layer, variables, below.get(f"{folder}/layer", []))
    return wrapped


def _listed_twice(members: Sequence[Dataset]) -> dict[str, str]:
    """The weights that a quantization wrapper lists a second time, after all trained weights of its layer."""
    weights = list(takewhile(lambda dataset: dataset.dtype.kind == "f", sorted(members, key=by_number)))
    for count in range(min(len(weights) // 2, _MOST_QUANTIZED), 0, -1):
        first = iter(weights[:-count])
        copies = {
            copy.name: next((weight.name for weight in first if weight.shape == copy.shape), "")
            for copy in weights[-count:]
            if len(copy.shape) > 1
        }
        if len(copies) == count and all(copies.values()):
            return copies
    return {}


def _is_spectral_normalization(folder: str, layer: LayerConfig | None) -> bool:
    kind = keras_config.snake_case(layer.kind) if layer is not None else folder.rpartition("/")[2]
    return _SPECTRAL_FOLDER.fullmatch(kind) is not None


def _kernel_of_wrapper(members: Sequence[Dataset], below_layer: Sequence[Dataset]) -> dict[str, str]:
    """The kernel of its layer that a spectral normalization stores first among its own variables."""
    copy = min(members, key=by_number)
    weights = sorted(below_layer, key=by_number)
    original = next((weight.name for weight in weights if weight.shape == copy.shape), "")
    return {copy.name: original} if original and len(copy.shape) > 1 else {}


class _WrapperVariables(NamedTuple):
    """The own variables of a wrapper, in the order of their numbers."""

    copies: Sequence[Dataset]
    masks: Sequence[Dataset]
    thresholds: Sequence[Dataset]
    step: Sequence[Dataset]
    """The last variable."""


def _wrapper_variables(members: Sequence[Dataset]) -> _WrapperVariables:
    variables = sorted(members, key=by_number)
    masks = masks_among(variables)
    num_copies = max(len(variables) - 1 - 2 * len(masks), 0)
    return _WrapperVariables(variables[:num_copies], masks, variables[num_copies + 1 : -1 : 2], variables[-1:])


def _looks_like_wrapper(folder: str, variables: _WrapperVariables, *, has_layer: bool) -> bool:
    copies, masks = variables.copies, variables.masks
    has_masks = bool(masks) and [mask.shape for mask in masks] == [copy.shape for copy in copies]
    has_step = any(not step.shape and step.dtype.kind == "i" for step in variables.step)
    is_named_so = _WRAPPER_FOLDER.fullmatch(folder.rpartition("/")[2]) is not None
    return has_step and (is_named_so or (has_masks and has_layer))


def _add(
    wrapped: WrappedLayers,
    folder: str,
    layer: LayerConfig | None,
    variables: _WrapperVariables,
    below_layer: Sequence[Dataset],
) -> None:
    inner = inner_layer({"class_name": WRAPPER, "config": layer.config}) if layer is not None else None
    weights = sorted(below_layer, key=by_number)
    wrapped.folders.add(folder)
    if layer is not None and inner is not None:
        wrapped.layers[f"{folder}/layer"] = replace(
            layer,
            name=string_in(object_in(inner, "config"), "name") or layer.name,
            kind=string_in(inner, "class_name"),
            config=object_in(inner, "config"),
        )
    for leaf, role, group in (
        ("weight", Role.SCHEDULE, variables.copies),
        ("mask", Role.MASK, variables.masks),
        ("threshold", Role.SCHEDULE, variables.thresholds),
        ("pruning_step", Role.SCHEDULE, variables.step),
    ):
        for number, dataset in enumerate(group):
            wrapped.variables[dataset.name] = (f"{leaf}_{number}" if number else leaf, role)
    try:
        originals = match_masks(
            [Weight(copy.name, "", copy.shape) for copy in variables.copies],
            layer_weights(weights, folder, inner or {}),
        )
    except MasksNotAppliedError:
        return  # A custom class, whose weights lie elsewhere.
    wrapped.copies |= {copy: original for original, copy in originals.items()}
