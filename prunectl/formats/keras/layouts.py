"""The two layouts of weights in HDF5: listed by layer name (`.h5`), and numbered in folders (`.weights.h5`)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from prunectl.errors import InputError, abbreviated
from prunectl.formats import budgets
from prunectl.formats.base import ModelFile, Role, Tensor
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import (
    PRUNED_PREFIX,
    LayerConfig,
    layers,
    modern_name,
    upgrade_class_name,
    upgrade_config,
)
from prunectl.formats.keras.hdf5 import Dataset, H5Contents
from prunectl.formats.keras.roles import (
    kernel_axes,
    looks_channels_first,
    name_by_position,
    position,
    quantised_names,
    strip_cells,
    weight_class,
    weight_role,
)

_OPTIMIZER_GROUP = "optimizer_weights"
_WHOLE_MODEL = ""
TWICE = "_layer_checkpoint_dependencies"
"""The container in which layers with weights are listed twice, in Keras 2.12 and 2.13."""
CONTAINERS = ("layers", TWICE)
"""Folders that hold the folders of layers, in `.weights.h5`."""


def layer_names_group(contents: H5Contents) -> str | None:
    """The group that lists the layers by name; None where weights have only numbers."""
    keys = ("layer_names", "layer_names0")
    groups = ("model_weights", "")
    return next((group for group in groups if any(contents.attribute(group, key) is not None for key in keys)), None)


def tensors_by_layer_name(contents: H5Contents, root: str, config: Mapping[str, Any] | None) -> tuple[Tensor, ...]:
    """The weights in the order of the layers, then all other datasets of the file."""
    layers_by_owner = _layers_by_owner(config)
    datasets = {dataset.name: dataset for dataset in contents.datasets}
    listed_weights = {path: (group, weight) for group, weight, path in _listed_weights(contents, root)}
    named = [(group, weight, datasets[path]) for path, (group, weight) in listed_weights.items() if path in datasets]
    repeated = Counter(weight for _, weight, _ in named)
    tensors = [
        _named_tensor(
            dataset,
            group,
            weight if repeated[weight] == 1 else f"{group}/{weight}",
            layers_by_owner.get(group) or layers_by_owner.get(_WHOLE_MODEL, {}),
        )
        for group, weight, dataset in named
    ]
    listed = {dataset.name for _, _, dataset in named}
    return (*tensors, *(_unlisted_tensor(dataset) for dataset in contents.datasets if dataset.name not in listed))


def _layers_by_owner(config: Mapping[str, Any] | None) -> Mapping[str, Mapping[str, LayerConfig]]:
    """By the name of a layer or model: all layers inside it, itself included, by their names."""
    layers_by_owner: defaultdict[str, dict[str, LayerConfig]] = defaultdict(dict)
    for layer in keras_config.layers(config):
        for owner in (_WHOLE_MODEL, *layer.path, layer.name):
            layers_by_owner[owner][layer.name] = layer
    return layers_by_owner


def missing_weights(contents: H5Contents, root: str) -> tuple[str, ...]:
    """A note on weights that the file lists but does not hold, as Keras leaves them when saving fails half-way."""
    stored = {dataset.name for dataset in contents.datasets}
    missing = [weight for _, weight, path in _listed_weights(contents, root) if path not in stored]
    if not missing:
        return ()
    if len(missing) == 1:
        return (f"The file is incomplete: {abbreviated(missing[0])} is named in it, but missing.",)
    first = abbreviated(missing[0])
    return (f"The file is incomplete: {len(missing)} weights named in it are missing, such as {first}.",)


def _listed_weights(contents: H5Contents, root: str) -> Iterator[tuple[str, str, str]]:
    """Yield each weight's group, its name and the path of its dataset."""
    for group, weights in weight_names(contents, root).items():
        for weight in weights:
            yield group, weight, f"{joined(root, group)}/{weight}"


def weight_names(contents: H5Contents, root: str) -> dict[str, list[str]]:
    """The names of the weights in each group, by the name of the group."""
    # The last group holds weights of a subclassed model that belong to none of its layers.
    groups = dict.fromkeys([*contents.names(root, "layer_names"), "top_level_model_weights"])
    return {group: contents.names(joined(root, group), "weight_names") for group in groups}


def joined(*steps: str) -> str:
    """The path of some steps in a file, without the empty ones."""
    return "/".join(step for step in steps if step)


def _named_tensor(dataset: Dataset, group: str, name: str, known: Mapping[str, LayerConfig]) -> Tensor:
    parts = name.removesuffix(":0").rsplit("/", budgets.MAX_KERAS_DEPTH)
    layer = _layer(parts[:-1], known) or known.get(group)
    if layer is not None and layer.kind == "PruneLowMagnitude":
        layer = known.get(layer.name.removeprefix(PRUNED_PREFIX), layer)
    kind = weight_class(layer)
    leaf = parts[-1] if len(parts) > 1 else modern_name(parts[-1])
    is_theano = layer.config.get("dim_ordering") == "th" if layer else looks_channels_first(parts[-1], dataset.shape)
    weight = weight_role(leaf, kind, dataset, is_channels_first=is_theano)
    axes = kernel_axes(weight, parts[-2] if len(parts) > 1 else "", layer, dataset.shape)
    shown_layer = layer.name if layer is not None else _plain_layer(parts[:-1], group)
    return Tensor(
        name=name,
        layer=shown_layer.removeprefix(PRUNED_PREFIX),
        shape=dataset.shape,
        dtype=dataset.dtype,
        role=weight.role,
        storage=dataset.storage,
        kind=kind,
        out_axis=axes.out_axis,
        in_axis=axes.in_axis,
    )


def _layer(steps: list[str], known: Mapping[str, LayerConfig]) -> LayerConfig | None:
    """The innermost layer on the path to a weight; a layer may have slashes in its name."""
    for end in range(len(steps), 0, -1):
        for begin in range(max(end - budgets.MAX_NAME_SLASHES, 0), end):
            if (name := "/".join(steps[begin:end])) in known:
                return known[name]
    return None


def _plain_layer(steps: list[str], group: str) -> str:
    """The layer's name without a configuration: the group, and the steps inside it."""
    for begin in range(len(steps)):
        if f"{'/'.join(steps[begin:])}/".startswith(f"{group}/"):
            return "/".join(strip_cells(steps[begin:]))
    return "/".join(strip_cells(steps)) or group


def _unlisted_tensor(dataset: Dataset) -> Tensor:
    role = Role.OPTIMIZER if dataset.name.startswith(f"{_OPTIMIZER_GROUP}/") else Role.OTHER
    return Tensor(dataset.name, dataset.name.rpartition("/")[0], dataset.shape, dataset.dtype, role, dataset.storage)


_COUNTER = re.compile(r"_\d+$")
_TRAINING = frozenset({"optimizer", "metrics", "_metrics", "compile_metrics"})


@dataclass(frozen=True, slots=True)
class _Owner:
    """The layer that a path leads to."""

    names: tuple[str, ...]
    slug: str
    """The last step of the path, without its number: the class in snake case, or an attribute."""
    layer: LayerConfig | None
    """The layer of the configuration at the path, or around it."""
    is_layer: bool
    """Whether the path leads to that layer itself, not to a part of it."""

    @property
    def display_name(self) -> str:
        """The layer's name as a user knows it."""
        if self.layer is not None:
            return self.layer.name.removeprefix(PRUNED_PREFIX)
        return "/".join(strip_cells(self.names))

    @property
    def kind(self) -> str:
        return weight_class(self.layer)


class NumberedWeights(NamedTuple):
    """The weights of a file that only numbers them."""

    tensors: tuple[Tensor, ...]
    copies: Mapping[str, str]
    """The names of second copies of weights in wrappers, with the names of their originals."""


def tensors_by_path(contents: H5Contents, config: Mapping[str, Any] | None) -> NumberedWeights:
    """The weights under the names that Keras gives to variables: `dense/kernel`."""
    from prunectl.formats.keras.numbering import ambiguous_containers, layers_by_folder  # noqa: PLC0415 - of archives
    from prunectl.formats.keras.wrapped import wrapped_layers  # noqa: PLC0415 - of archives

    slots = layers_by_folder(config, contents.datasets)
    siblings: defaultdict[str, list[Dataset]] = defaultdict(list)
    for dataset in contents.datasets:
        siblings[dataset.name.rpartition("/")[0]].append(dataset)
    unclear = ambiguous_containers(config, slots, [dataset.name for dataset in contents.datasets])
    wrapped = wrapped_layers(contents.datasets, slots)
    quantised = {folder: quantised_names(datasets) for folder, datasets in siblings.items()}
    counts = {folder: len(datasets) for folder, datasets in siblings.items()}
    known = {**slots, **wrapped.layers}
    folders = _Folders(contents, known, unclear, frozenset(wrapped.folders), counts, quantised)
    tensors = [_numbered_tensor(dataset, folders, wrapped.variables) for dataset in contents.datasets]
    repeated = Counter(tensor.name for tensor in tensors)
    named = {
        dataset.name: replace(tensor, name=dataset.name) if repeated[tensor.name] > 1 else tensor
        for tensor, dataset in zip(tensors, contents.datasets, strict=True)
    }
    copies = {named[copy].name: named[original].name for copy, original in wrapped.copies.items()}
    return NumberedWeights(tuple(named.values()), copies)


def unmatched_note(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """A note if weights are named by their folders, since it is unknown which layers they belong to."""
    if not any(tensor.name.startswith(tuple(f"{container}/" for container in CONTAINERS)) for tensor in tensors):
        return ()
    return ("The weights do not match the layers of the configuration, so they are named by their paths in the file.",)


@dataclass(frozen=True, slots=True)
class _Folders:
    """Facts about the folders of a file."""

    contents: H5Contents
    layers: Mapping[str, LayerConfig]
    """The layers of the configuration, by their folders."""
    unclear: frozenset[str]
    """Containers of layers whose folders cannot be told apart."""
    wrappers: frozenset[str]
    """Folders of pruning wrappers."""
    counts: Mapping[str, int]
    """How many datasets are in each folder."""
    quantised: Mapping[str, Sequence[str]]
    """The names of the weights in each folder, in order; empty unless its layer is quantised."""


def _numbered_tensor(dataset: Dataset, folders: _Folders, of_wrappers: Mapping[str, tuple[str, Role]]) -> Tensor:
    steps = dataset.name.split("/")
    if steps[0] in _TRAINING or "vars" not in steps:
        role = Role.OPTIMIZER if steps[0] in _TRAINING else Role.OTHER
        return Tensor(dataset.name, "/".join(steps[:-1]), dataset.shape, dataset.dtype, role, dataset.storage)
    owner = _owner(steps[: steps.index("vars")], folders)
    folder = "/".join(steps[:-1])
    if dataset.name in of_wrappers:
        leaf, role = of_wrappers[dataset.name]
        prefix = PRUNED_PREFIX if owner.layer and folder.rpartition("/")[0] in folders.wrappers else ""
        names = (*owner.names[:-1], f"{prefix}{owner.names[-1]}", leaf)
        return Tensor("/".join(names), owner.display_name, dataset.shape, dataset.dtype, role, dataset.storage)
    index = position(steps[-1])
    settings = owner.layer.config if owner.layer is not None and owner.is_layer else {}
    if quantised := folders.quantised[folder]:
        leaf = quantised[index].replace("kernel", "embeddings" if owner.slug == "embedding" else "kernel")
    else:
        leaf = name_by_position(owner.slug, index, folders.counts[folder], dataset.shape, settings)
    if leaf == "bias" and len(dataset.shape) > 1 and owner.slug == "layer" and owner.layer is None:
        leaf = f"weight_{index}"  # Of a wrapped layer whose class is unknown.
    weight = weight_role(leaf, owner.kind or owner.slug, dataset)
    axes = kernel_axes(weight, owner.names[-1], owner.layer, dataset.shape)
    return Tensor(
        name="/".join((*owner.names, leaf)),
        layer=owner.display_name,
        shape=dataset.shape,
        dtype=dataset.dtype,
        role=weight.role,
        storage=dataset.storage,
        kind=owner.kind,
        out_axis=axes.out_axis,
        in_axis=axes.in_axis,
    )


def _owner(steps: list[str], folders: _Folders) -> _Owner:
    names: list[str] = []
    layer, is_layer, parent = None, False, ""
    for end in range(1, len(steps) + 1):
        path = "/".join(steps[:end])
        variable_name = folders.contents.attribute(f"{path}/vars", "name")
        is_layer = path in folders.layers
        if is_layer:
            layer = folders.layers[path]
        if parent in folders.wrappers and steps[end - 1] == "layer":
            pass  # It has the name of its wrapper already.
        elif is_layer and layer is not None:
            names.append(layer.name.removeprefix(PRUNED_PREFIX))
        elif isinstance(variable_name, str):
            names.append(variable_name.removeprefix(PRUNED_PREFIX))
        elif steps[end - 1] not in CONTAINERS or path in folders.unclear:
            names.append(steps[end - 1])
        parent = path
    slug = _COUNTER.sub("", steps[-1]) if steps else ""
    if parent.removesuffix("/layer") in folders.wrappers and is_layer and layer is not None:
        slug = keras_config.snake_case(layer.kind)
    elif slug == "layer" and not is_layer and layer is not None and parent.removesuffix("/layer") in folders.layers:
        # Of a wrapper such as TimeDistributed.
        inner = keras_config.object_in(layer.config, "layer")
        if kind := keras_config.string_in(inner, "class_name"):
            layer, is_layer = replace(layer, kind=kind, config=keras_config.object_in(inner, "config")), True
            slug = keras_config.snake_case(kind)
    return _Owner(tuple(names) or ("",), slug, layer, is_layer)


_WIDTHS = {
    "Conv1D": ("filters", 1),
    "Conv2D": ("filters", 1),
    "Conv3D": ("filters", 1),
    "Dense": ("units", 1),
    "Embedding": ("output_dim", 1),
    "GRU": ("units", 3),
    "LSTM": ("units", 4),
    "SimpleRNN": ("units", 1),
}
"""By class: the setting with the width of a layer, and how many gates share the last axis of its kernel."""


def check_widths(model: ModelFile) -> None:
    """Refuse a file with a layer that has another width in the configuration than in its weights, or no weights."""
    if model.format != "keras-h5" or model.about.keras is None:
        # Elsewhere weights are numbered, and which layer they belong to is a guess.
        return
    kernels: defaultdict[str, list[Tensor]] = defaultdict(list)
    for tensor in model.tensors:
        if tensor.role in {Role.KERNEL, Role.EMBEDDING}:
            kernels[tensor.layer].append(tensor)
    every = tuple(layers(model.about.keras))
    names = Counter(layer.name for layer in every)
    for layer in every:
        if not layer.path and names[layer.name] == 1:
            _check_layer(model, layer, kernels.get(layer.name, []))


def _check_layer(model: ModelFile, layer: LayerConfig, kernels: list[Tensor]) -> None:
    kind = upgrade_class_name(layer.kind)
    if kind not in _WIDTHS or keras_config.is_packed(layer.config):
        return
    key, gates = _WIDTHS[kind]
    width, name = upgrade_config(kind, layer.config).get(key), abbreviated(layer.name)
    if type(width) is not int:
        raise InputError(f"{model.path} is damaged: its configuration does not give the {key} of {kind} {name}")
    if not kernels:
        raise InputError(f"{model.path} is damaged: it holds no weights of {kind} {name}")
    for kernel in kernels:
        if not kernel.shape or kernel.shape[-1] != width * gates:
            raise InputError(
                f"{model.path} is damaged: {kind} {name} has {width} {key}, and {abbreviated(kernel.name)} the shape "
                f"{abbreviated(str(kernel.shape))}"
            )
