"""The layout of Keras 1 and 2, and of Keras 3's `.h5`: groups of layers that name their weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.errors import abbreviated
from prunectl.formats.base import Role, Tensor
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import PRUNED_PREFIX, Layer
from prunectl.formats.keras.hdf5 import Contents, Dataset
from prunectl.formats.keras.roles import looks_channels_first, meaning, modern_name, without_cells

_OPTIMIZER_GROUP = "optimizer_weights"
_ANYWHERE = ""
_MAX_STEPS, _MAX_SLASHES = 40, 8
"""Models around a layer, and slashes in its name: more than any model has."""


def describe(contents: Contents, root: str, config: Mapping[str, Any] | None) -> tuple[Tensor, ...]:
    """Return the weights in the order of the layers, then whatever else the file holds."""
    inside = _inside(config)
    datasets = {found.name: found for found in contents.datasets}
    promised = {path: (group, weight) for group, weight, path in _promised(contents, root)}
    named = [(group, weight, datasets[path]) for path, (group, weight) in promised.items() if path in datasets]
    repeated = Counter(weight for _, weight, _ in named)
    tensors = [
        _tensor(found, group, weight if repeated[weight] == 1 else f"{group}/{weight}", _known(inside, group))
        for group, weight, found in named
    ]
    listed = {found.name for _, _, found in named}
    return (*tensors, *(_other(found) for found in contents.datasets if found.name not in listed))


def _inside(config: Mapping[str, Any] | None) -> Mapping[str, Mapping[str, Layer]]:
    """Return the layers in each layer and model, itself among them, by their names."""
    inside: defaultdict[str, dict[str, Layer]] = defaultdict(dict)
    for layer in keras_config.layers(config):
        for owner in (_ANYWHERE, *layer.path, layer.name):
            inside[owner][layer.name] = layer
    return inside


def _known(inside: Mapping[str, Mapping[str, Layer]], group: str) -> Mapping[str, Layer]:
    """Return the layers that the weights of a group can belong to."""
    return inside.get(group) or inside.get(_ANYWHERE, {})


def broken_promises(contents: Contents, root: str) -> tuple[str, ...]:
    """Say which weights the file names but does not hold, as Keras leaves them when saving fails half-way."""
    held = {found.name for found in contents.datasets}
    missing = [weight for _, weight, path in _promised(contents, root) if path not in held]
    if not missing:
        return ()
    lacking = "a weight" if len(missing) == 1 else f"{len(missing)} weights"
    return (f"The file is incomplete: it names {lacking} that it does not hold, such as {abbreviated(missing[0])}.",)


def _promised(contents: Contents, root: str) -> Iterator[tuple[str, str, str]]:
    """Yield each weight's group, its name and the path of its dataset."""
    groups = contents.names(root, "layer_names")
    # Weights of a subclassed model that belong to none of its layers.
    for group in (*groups, *([] if "top_level_model_weights" in groups else ["top_level_model_weights"])):
        inside = f"{root}/{group}" if root else group
        for weight in contents.names(inside, "weight_names"):
            yield group, weight, f"{inside}/{weight}"


def _tensor(found: Dataset, group: str, name: str, known: Mapping[str, Layer]) -> Tensor:
    parts = name.removesuffix(":0").rsplit("/", _MAX_STEPS)
    layer = _layer(parts[:-1], known) or known.get(group)
    if layer is not None and layer.kind == "PruneLowMagnitude":
        layer = known.get(layer.name.removeprefix(PRUNED_PREFIX), layer)
    kind = layer.kind if layer is not None else ""
    leaf = parts[-1] if len(parts) > 1 else modern_name(parts[-1])
    is_theano = layer.config.get("dim_ordering") == "th" if layer else looks_channels_first(parts[-1], found.shape)
    is_float = found.dtype.kind not in "iub"
    what = meaning(leaf, kind, found.shape, is_float=is_float, is_channels_first=is_theano)
    shown = layer.name if layer is not None else _plain_layer(parts[:-1], group)
    return Tensor(
        name=name,
        layer=shown.removeprefix(PRUNED_PREFIX),
        shape=found.shape,
        dtype=found.dtype,
        role=what.role,
        storage=found.storage,
        kind=kind,
        out_axis=what.out_axis,
        in_axis=what.in_axis,
    )


def _layer(steps: list[str], known: Mapping[str, Layer]) -> Layer | None:
    """Return the innermost layer on the way to a weight; some layers have a slash in their name."""
    for end in range(len(steps), 0, -1):
        for begin in range(max(end - _MAX_SLASHES, 0), end):
            if (name := "/".join(steps[begin:end])) in known:
                return known[name]
    return None


def _plain_layer(steps: list[str], group: str) -> str:
    """Return the layer where only names tell: the group, and what is inside it."""
    for begin in range(len(steps)):
        if f"{'/'.join(steps[begin:])}/".startswith(f"{group}/"):
            return "/".join(without_cells(steps[begin:]))
    return "/".join(without_cells(steps)) or group


def _other(found: Dataset) -> Tensor:
    role = Role.OPTIMIZER if found.name.startswith(f"{_OPTIMIZER_GROUP}/") else Role.OTHER
    return Tensor(found.name, found.name.rpartition("/")[0], found.shape, found.dtype, role, found.storage)
