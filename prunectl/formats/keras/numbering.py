"""Which folder of `model.weights.h5` holds which layer? Keras numbers the layers of a class, in one of two ways.

Keras 3, and Keras 2 from 2.14 on, count each layer once: `conv2d`, `conv2d_1`. Keras 2.12 and 2.13 walk a list in which
a layer with weights occurs twice, so that it takes two numbers: `conv2d`, `conv2d_2`. Both ways are checked against the
shapes in the configuration; a layer that fits neither is named by its folder.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunectl.formats import budgets, zip_write
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import LayerConfig
from prunectl.formats.keras.hdf5 import Dataset, rewrite
from prunectl.formats.keras.hdf5.rewrite import H5Edits
from prunectl.formats.keras.layouts import CONTAINERS, TWICE
from prunectl.formats.keras.model import WEIGHTS, inflate
from prunectl.formats.safe_json import parse_object
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.zip_read import open_archive

_NUMBERED = re.compile(r"(.+?)(?:_(\d{1,6}))?")
_CONVOLUTION = re.compile(r"(Depthwise|Separable)?Conv[123]D(Transpose)?")
_GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3, "SimpleRNN": 1, "SimpleRNNCell": 1}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _StoredFolders:
    """Folders of layers in a file."""

    folders: Mapping[str, frozenset[str]]
    """The folders in each container, by its path."""
    kernels: Mapping[str, Shape]
    """The shape of each layer's variable 0, by the path of the layer's folder."""


@dataclass(slots=True)
class _FolderAssignment:
    """The layers by their folders, under one of the two ways of counting."""

    layers: dict[str, LayerConfig] = field(default_factory=dict)
    misfits: set[str] = field(default_factory=set)
    """Containers whose folders are not those of the configuration."""


def layers_by_folder(config: Any, datasets: Sequence[Dataset]) -> Mapping[str, LayerConfig]:
    """The layers of a configuration by their folders, without those whose folder is in doubt."""
    stored = _stored_folders(datasets)
    once, twice = (_assigned(config, stored, is_twice=is_twice) for is_twice in (False, True))
    if once.misfits and not twice.misfits:
        return twice.layers
    if not once.misfits and twice.misfits:
        return once.layers
    if once.misfits:
        # Containers that fit one way of counting do not prove that the others were not counted the other way.
        return {path: layer for path, layer in once.layers.items() if not _is_below(path, once.misfits)}
    return {path: layer for path, layer in once.layers.items() if twice.layers.get(path) == layer}


def current_folders(config: Any, slots: Mapping[str, LayerConfig]) -> Mapping[str, str]:
    """By a layer's folder in the file: its folder in current versions of Keras, which count every layer once."""
    old = {id(layer.config): path for path, layer in slots.items()}
    folders: dict[str, str] = {}
    pending = [("", config, 0)]
    while pending:
        prefix, model, depth = pending.pop()
        used: Counter[str] = Counter()
        for layer in keras_config.children(model):
            slug = keras_config.snake_case(layer.kind)
            new = f"{prefix}{CONTAINERS[0]}/{numbered_folder(slug, used[slug])}"
            used[slug] += 1
            if id(layer.config) in old:
                folders[old[id(layer.config)]] = new
                pending += _models_in(layer, new, depth)
    return folders


def numbered_folder(slug: str, number: int) -> str:
    """The folder of a layer: its class in snake case, with a number from the second layer of the class on."""
    return f"{slug}_{number}" if number else slug


def ambiguous_containers(config: Any, slots: Mapping[str, LayerConfig], names: Iterable[str]) -> frozenset[str]:
    """The containers with a folder of some layer in the configuration, where it is unknown of which one."""
    kinds = {keras_config.snake_case(layer.kind) for layer in keras_config.layers(config)}
    containers = set()
    for name in names:
        steps = name.split("/")
        for index, step in enumerate(steps[:-1]):
            path = "/".join(steps[: index + 2])
            slug, _ = _split_number(steps[index + 1])
            if step in CONTAINERS and path not in slots and slug in kinds:
                containers.add("/".join(steps[: index + 1]))
    return frozenset(containers)


def _stored_folders(datasets: Sequence[Dataset]) -> _StoredFolders:
    folders: defaultdict[str, set[str]] = defaultdict(set)
    kernels: dict[str, Shape] = {}
    for dataset in datasets:
        steps = dataset.name.split("/")
        for index, step in enumerate(steps[:-1]):
            if step in CONTAINERS:
                folders["/".join(steps[: index + 1])].add(steps[index + 1])
        if steps[-2:] == ["vars", "0"]:
            # The weights of a recurrent layer are those of its cell.
            kernels["/".join(steps[:-2]).removesuffix("/cell")] = dataset.shape
    return _StoredFolders({path: frozenset(names) for path, names in folders.items()}, kernels)


def _assigned(config: Any, stored: _StoredFolders, *, is_twice: bool) -> _FolderAssignment:
    assignment = _FolderAssignment()
    pending = [("", config, 0)]
    while pending:
        prefix, model, depth = pending.pop()
        of_kind: defaultdict[str, list[LayerConfig]] = defaultdict(list)
        for child in keras_config.children(model):
            of_kind[keras_config.snake_case(child.kind)].append(child)
        for container in CONTAINERS:
            path = f"{prefix}{container}"
            for slug, same_kind in of_kind.items():
                numbers = sorted(_numbers(slug, stored.folders.get(path, frozenset())))
                for position, number in enumerate(numbers):
                    index = number - position if is_twice and container == TWICE else number
                    folder = f"{path}/{numbered_folder(slug, number)}"
                    previous = numbers[position - 1] - position + 1 if position else -1
                    is_stuck = is_twice and container == TWICE and index <= previous
                    layer = same_kind[index] if index < len(same_kind) and not is_stuck else None
                    if layer is None or not _shape_fits(layer, stored.kernels.get(folder)):
                        assignment.misfits.add(path)
                        continue
                    assignment.layers[folder] = layer
                    pending += _models_in(layer, folder, depth)
    return assignment


def _models_in(layer: LayerConfig, folder: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    """Yield a layer, which may be a model, and the layer that it may wrap, each with the prefix of its folders."""
    if depth < budgets.MAX_CONFIG_DEPTH:
        yield f"{folder}/", {"config": layer.config}, depth + 1
        wrapped = keras_config.object_in(layer.config, "layer")
        if wrapped:
            yield f"{folder}/layer/", wrapped, depth + 1


def _numbers(slug: str, folders: Iterable[str]) -> Iterator[int]:
    for folder in folders:
        name, number = _split_number(folder)
        if slug in {name, folder}:
            yield 0 if folder == slug else number


def _split_number(folder: str) -> tuple[str, int]:
    """The class in snake case and the number: 0 where there is none."""
    match = _NUMBERED.fullmatch(folder)
    return (match[1], int(match[2] or 0)) if match is not None else (folder, 0)


def _is_below(path: str, containers: Iterable[str]) -> bool:
    return any(path.startswith(f"{container}/") for container in containers)


def _shape_fits(layer: LayerConfig, kernel: Shape | None) -> bool:
    """Whether a kernel has the shape in its layer's configuration, as far as that gives one."""
    if kernel is None:
        return True
    config = layer.config
    kind = layer.kind.rpartition(">")[2]
    if keras_config.is_packed(config):
        return True
    units, filters, size = config.get("units"), config.get("filters"), config.get("kernel_size")
    if kind in _GATES and isinstance(units, int):
        return len(kernel) == 2 and kernel[-1] == units * _GATES[kind]
    if kind == "Dense" and isinstance(units, int):
        return len(kernel) == 2 and kernel[-1] == units
    if kind == "Embedding" and isinstance(config.get("input_dim"), int):
        return kernel[0] == int(config["input_dim"])
    if _CONVOLUTION.fullmatch(kind) and len(kernel) > 2:
        window = tuple(size) if isinstance(size, list | tuple) else kernel[:-2]
        channels = kernel[-2] if kind.endswith("Transpose") else kernel[-1]
        is_counted = kind.startswith("Conv") and isinstance(filters, int)
        return kernel[:-2] == window and (not is_counted or channels == filters)
    return True


def renumber(path: Path, target: Path) -> bool:
    """Write an archive of an older Keras with its layers in the folders of current Keras; False if none has to move.

    Keras 2.12 to 2.15 call the list of layers by another name, and the first two count layers with weights twice.
    """
    archive = open_archive(path)
    config = parse_object(archive.read("config.json", budgets.MAX_JSON_BYTES), path, "its config.json")
    with temporary_folder() as scratch:
        weights, renamed = scratch / WEIGHTS, scratch / "renamed.h5"
        contents = inflate(archive, weights)
        new_folders = current_folders(config, layers_by_folder(config, contents.datasets))
        moves = {old: new for old, new in new_folders.items() if old != new}
        if not moves:
            return False
        rewrite.edit(weights, renamed, H5Edits(moves=moves), contents, path)
        zip_write.rewrite_zip(archive, target, {WEIGHTS: zip_write.file_content(renamed)})
    return True
