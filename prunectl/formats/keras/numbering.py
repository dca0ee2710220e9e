"""Which folder of `model.weights.h5` holds which layer? Keras numbers the layers of a class, in two ways.

Keras 3, and Keras 2 from 2.14 on, count each layer once: `conv2d`, `conv2d_1`. Keras 2.12 and 2.13 walk a list in which
a layer with weights stands twice, so that it takes two numbers: `conv2d`, `conv2d_2`. Either is held against the shapes
that the configuration says; what fits neither keeps its folder for a name.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import Layer
from prunectl.formats.keras.hdf5 import Dataset

TWICE = "_layer_checkpoint_dependencies"
"""The list in which layers with weights stood twice."""
CONTAINERS = ("layers", TWICE)
_NUMBERED = re.compile(r"(.+?)(?:_(\d{1,6}))?")
_CONVOLUTION = re.compile(r"(Depthwise|Separable)?Conv[123]D(Transpose)?")
_GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3, "SimpleRNN": 1, "SimpleRNNCell": 1}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    """What a file holds, folder by folder."""

    folders: Mapping[str, frozenset[str]]
    """The folders in each container, by its path."""
    kernels: Mapping[str, Shape]
    """The shapes of what is called 0, by the path of the folder that its layer has."""


@dataclass(slots=True)
class _Slots:
    """The layers of folders under one way to count."""

    layers: dict[str, Layer] = field(default_factory=dict)
    misfits: set[str] = field(default_factory=set)
    """Containers whose folders are not those of the configuration."""


def slots_of(config: Any, datasets: Sequence[Dataset]) -> Mapping[str, Layer]:
    """Return the layers of a configuration by the folders that hold them, as far as there is no doubt."""
    held = _held(datasets)
    once, twice = (_assigned(config, held, is_twice=is_twice) for is_twice in (False, True))
    if once.misfits and not twice.misfits:
        return twice.layers
    if not once.misfits and twice.misfits:
        return once.layers
    if once.misfits:
        # Of the containers that fit by one count, none is proof that the others do not fit by the other.
        return {path: layer for path, layer in once.layers.items() if not _is_below(path, once.misfits)}
    return {path: layer for path, layer in once.layers.items() if twice.layers.get(path) == layer}


def folders_today(config: Any, slots: Mapping[str, Layer]) -> Mapping[str, str]:
    """The folder in which Keras looks for each layer now, by the one that a file has: every layer counted once."""
    old = {id(layer.config): path for path, layer in slots.items()}
    found: dict[str, str] = {}
    todo = [("", config, 0)]
    while todo:
        prefix, model, depth = todo.pop()
        used: Counter[str] = Counter()
        for layer in keras_config.children(model):
            slug = keras_config.snake_case(layer.kind)
            new = f"{prefix}{CONTAINERS[0]}/{slug}_{used[slug]}" if used[slug] else f"{prefix}{CONTAINERS[0]}/{slug}"
            used[slug] += 1
            if id(layer.config) in old:
                found[old[id(layer.config)]] = new
                todo += _models_in(layer, new, depth)
    return found


def doubtful(config: Any, slots: Mapping[str, Layer], names: Iterable[str]) -> frozenset[str]:
    """Return the containers with folders that belong to a layer of the configuration, and nobody knows to which."""
    kinds = {keras_config.snake_case(layer.kind) for layer in keras_config.layers(config)}
    found = set()
    for name in names:
        steps = name.split("/")
        for at, step in enumerate(steps[:-1]):
            path = "/".join(steps[: at + 2])
            slug, _ = _parted(steps[at + 1])
            if step in CONTAINERS and path not in slots and slug in kinds:
                found.add("/".join(steps[: at + 1]))
    return frozenset(found)


def _held(datasets: Sequence[Dataset]) -> _Held:
    folders: defaultdict[str, set[str]] = defaultdict(set)
    kernels: dict[str, Shape] = {}
    for found in datasets:
        steps = found.name.split("/")
        for at, step in enumerate(steps[:-1]):
            if step in CONTAINERS:
                folders["/".join(steps[: at + 1])].add(steps[at + 1])
        if steps[-2:] == ["vars", "0"]:
            # The weights of a recurrent layer are its cell's.
            kernels["/".join(steps[:-2]).removesuffix("/cell")] = found.shape
    return _Held({path: frozenset(names) for path, names in folders.items()}, kernels)


def _assigned(config: Any, held: _Held, *, is_twice: bool) -> _Slots:
    found = _Slots()
    todo = [("", config, 0)]
    while todo:
        prefix, model, depth = todo.pop()
        of_kind: defaultdict[str, list[Layer]] = defaultdict(list)
        for layer in keras_config.children(model):
            of_kind[keras_config.snake_case(layer.kind)].append(layer)
        for container in CONTAINERS:
            path = f"{prefix}{container}"
            for slug, layers in of_kind.items():
                numbers = sorted(_numbers(slug, held.folders.get(path, frozenset())))
                for place, number in enumerate(numbers):
                    at = number - place if is_twice and container == TWICE else number
                    folder = f"{path}/{slug}_{number}" if number else f"{path}/{slug}"
                    before = numbers[place - 1] - place + 1 if place else -1
                    is_stuck = is_twice and container == TWICE and at <= before
                    if at >= len(layers) or is_stuck or not _fits(layers[at], held.kernels.get(folder)):
                        found.misfits.add(path)
                        continue
                    found.layers[folder] = layers[at]
                    todo += _models_in(layers[at], folder, depth)
    return found


def _models_in(layer: Layer, folder: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    """Yield a layer as the model that it may be, and the one that it may be wrapped around, each with its prefix."""
    if depth < keras_config.MAX_DEPTH:
        yield f"{folder}/", {"config": layer.config}, depth + 1
        wrapped = keras_config.part(layer.config, "layer")
        if wrapped:
            yield f"{folder}/layer/", wrapped, depth + 1


def _numbers(slug: str, folders: Iterable[str]) -> Iterator[int]:
    for folder in folders:
        name, number = _parted(folder)
        if slug in {name, folder}:
            yield 0 if folder == slug else number


def _parted(folder: str) -> tuple[str, int]:
    """Return the class in snake case and the number: 0 where there is none."""
    match = _NUMBERED.fullmatch(folder)
    return (match[1], int(match[2] or 0)) if match is not None else (folder, 0)


def _is_below(path: str, containers: Iterable[str]) -> bool:
    return any(path.startswith(f"{container}/") for container in containers)


def _fits(layer: Layer, kernel: Shape | None) -> bool:
    """Whether a kernel has the shape that its layer says, as far as it says one."""
    if kernel is None:
        return True
    said = layer.config
    kind = layer.kind.rpartition(">")[2]
    units, filters, size = said.get("units"), said.get("filters"), said.get("kernel_size")
    if kind in _GATES and isinstance(units, int):
        return len(kernel) == 2 and kernel[-1] == units * _GATES[kind]
    if kind == "Dense" and isinstance(units, int):
        return len(kernel) == 2 and kernel[-1] == units
    if kind == "Embedding" and isinstance(said.get("input_dim"), int):
        return kernel[0] == int(said["input_dim"])
    if _CONVOLUTION.fullmatch(kind) and len(kernel) > 2:
        window = tuple(size) if isinstance(size, list | tuple) else kernel[:-2]
        channels = kernel[-2] if kind.endswith("Transpose") else kernel[-1]
        is_counted = kind.startswith("Conv") and isinstance(filters, int)
        return kernel[:-2] == window and (not is_counted or channels == filters)
    return True
