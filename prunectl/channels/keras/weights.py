"""The weights of a Keras file: their paths in HDF5, and the layer of the configuration that each belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from prunectl.formats import budgets
from prunectl.formats.base import ModelFile, Role, Tensor
from prunectl.formats.keras import hdf5
from prunectl.formats.keras.config import LayerConfig, name_of, object_in, string_in, upgrade_class_name
from prunectl.formats.keras.flops.sequences import CONV_LSTM, GATES
from prunectl.formats.keras.hdf5 import H5Contents, H5Location
from prunectl.formats.keras.layouts import layer_names_group
from prunectl.formats.keras.model import WEIGHTS
from prunectl.formats.scratch import Scratch
from prunectl.formats.zip_read import open_archive


class WeightFile:
    """The HDF5 file with the weights of a model; that of a .keras archive is extracted to a scratch file."""

    def __init__(self, model: ModelFile) -> None:
        self.model = model
        self._scratch: Scratch | None = None
        self.file = model.path if model.format == "keras-h5" else self._extract()
        self.contents: H5Contents = hdf5.read_contents(H5Location(self.file, 0, self.file.stat().st_size))
        self.root = layer_names_group(self.contents)
        self._keys = {dataset.storage.key: dataset.name for dataset in self.contents.datasets}

    def _extract(self) -> Path:
        self._scratch = Scratch()
        path = self._scratch.path / WEIGHTS
        archive = open_archive(self.model.path)
        with path.open("wb") as file:
            file.writelines(archive.pieces(archive.entries[WEIGHTS]))
        return path

    def path(self, tensor: Tensor) -> str:
        """The path of a tensor in the HDF5 file."""
        return self._keys[tensor.storage.key]

    @property
    def numbered(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Weights that are numbered (`vars/0`), in order, by the path of their layer."""
        by_layer: dict[str, list[tuple[int, Tensor]]] = {}
        for tensor in self.model.tensors:
            owner, marker, number = self.path(tensor).rpartition("/vars/")
            if marker and number.isdecimal() and tensor.role is not Role.OPTIMIZER:
                by_layer.setdefault(owner, []).append((int(number), tensor))
        return {
            owner: tuple(tensor for _, tensor in sorted(weights, key=itemgetter(0)))
            for owner, weights in by_layer.items()
        }

    @property
    def named(self) -> Mapping[str, tuple[NamedWeight, ...]]:
        """Weights that have names, by their top-level layer, in the order of Keras."""
        tensors = {self.path(tensor): tensor for tensor in self.model.tensors}
        root = self.root or ""
        by_layer: dict[str, tuple[NamedWeight, ...]] = {}
        for group in self.contents.names(root, "layer_names"):
            inside = f"{root}/{group}" if root else group
            names = self.contents.names(inside, "weight_names")
            weights = [(name, tensors.get(f"{inside}/{name}")) for name in names]
            by_layer[group] = tuple(
                NamedWeight(*_steps(name), tensor) for name, tensor in weights if tensor is not None
            )
        return by_layer


@dataclass(frozen=True, slots=True)
class NamedWeight:
    """A weight with its name in Keras, such as `block/conv/kernel:0`."""

    steps: tuple[str, ...]
    """The scopes in front of the last name, such as `block` and `conv`."""
    leaf: str
    """The last name, such as `kernel`."""
    tensor: Tensor


def _steps(name: str) -> tuple[tuple[str, ...], str]:
    *steps, leaf = re.sub(r":\d+$", "", name).split("/")
    return tuple(steps), leaf


ConfigPath = tuple[str | int, ...]
"""The keys and indices that lead to a layer in the configuration."""
ROOT: ConfigPath = ()
_WRAPPED_LAYERS = (("layer", ("layer", "forward_layer")), ("backward_layer", ("backward_layer",)))
"""The settings of a wrapper that hold its inner layers, and the attributes that hold them in its object."""
_NAME_ONLY = frozenset({"name"})


@dataclass(frozen=True, slots=True)
class LayerLocation:
    """A layer, and its path in the configuration."""

    path: ConfigPath
    layer: Mapping[str, Any]
    names: tuple[str, ...]
    """The names of the models and wrappers around it, and its own name."""
    slots: tuple[str, ...]
    """The HDF5 groups in which Keras may store its weights if they are numbered."""


def located(config: Mapping[str, Any], slots: Mapping[str, LayerConfig]) -> tuple[LayerLocation, ...]:
    """Every layer of a model in the order of Keras; `slots` are the groups with numbered weights, by path.

    `formats/keras/numbering.py` finds the layer of each group; layers without weights have none.
    """
    return tuple(_inside(config, (), (), {id(layer.config): path for path, layer in slots.items()}))


def get_at(config: Any, path: ConfigPath) -> Any:
    """The part of a configuration at a path."""
    for key in path:
        config = config[key]
    return config


def is_operation(layer: Mapping[str, Any]) -> bool:
    """Whether an entry of the configuration is an operation of Keras 3, such as `keras.ops.add`, not a layer."""
    if "module" in layer:
        return ".ops." in string_in(layer, "module")
    return layer.get("config", {}).keys() == _NAME_ONLY if isinstance(layer.get("config"), dict) else False


def _inside(
    model: Mapping[str, Any], path: ConfigPath, names: tuple[str, ...], folders: Mapping[int, str]
) -> Iterator[LayerLocation]:
    # Until version 2.2.3, Keras wrote the configuration of a sequential model as a bare list of layers.
    is_bare = isinstance(model.get("config"), list)
    steps: ConfigPath = ("config",) if is_bare else ("config", "layers")
    entries = model["config"] if is_bare else object_in(model, "config").get("layers")
    for number, layer in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(layer, dict):
            folder = folders.get(id(layer.get("config")))
            layer_path = (*path, *steps, number)
            slots = () if folder is None else (folder,)
            yield from _with_inner(LayerLocation(layer_path, layer, (*names, name_of(layer)), slots), folders)


def _with_inner(location: LayerLocation, folders: Mapping[int, str]) -> Iterator[LayerLocation]:
    yield location
    if len(location.names) > budgets.MAX_KERAS_DEPTH:
        return
    yield from _inside(location.layer, location.path, location.names, folders)
    for key, attributes in _WRAPPED_LAYERS:
        inner = object_in(object_in(location.layer, "config"), key)
        if string_in(inner, "class_name"):
            slots = tuple(f"{slot}/{attribute}" for slot in location.slots for attribute in attributes)
            names = (*location.names, name_of(inner))
            yield from _with_inner(LayerLocation((*location.path, "config", key), inner, names, slots), folders)


LayerWeights = Mapping[str, Tensor]
"""The weights of a layer by their names in it, such as `kernel`."""


def bind_weights(stored: WeightFile, layers: Sequence[LayerLocation]) -> dict[ConfigPath, LayerWeights]:
    """The weights of each layer whose weights in the file fit its class, by the path of the layer."""
    bound = _bound_by_name(stored, layers) if stored.root is not None else _bound_by_number(stored, layers)
    return dict(bound)


def expected_weights(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the weights of a layer, in the order of Keras; empty for an unknown class."""
    kind, config = upgrade_class_name(string_in(layer, "class_name")), object_in(layer, "config")
    maker = _WEIGHTS_OF_LAYER.get(kind)
    return () if maker is None else maker(config)


def _bound_by_number(stored: WeightFile, layers: Sequence[LayerLocation]) -> Iterator[tuple[ConfigPath, LayerWeights]]:
    numbered = stored.numbered
    for layer in layers:
        names = expected_weights(layer.layer)
        inside = _SUBLAYERS.get(upgrade_class_name(string_in(layer.layer, "class_name")), {})
        for slot in layer.slots if names else ():
            tensors = tuple(
                tensor
                for sublayer in dict.fromkeys(leaf.rpartition("/")[0] for leaf in names)
                for tensor in _first_bound(numbered, [f"{slot}{suffix}" for suffix in inside.get(sublayer, ("",))])
            )
            if len(tensors) == len(names):
                yield layer.path, dict(zip(names, tensors, strict=True))
                break


def _bound_by_name(stored: WeightFile, layers: Sequence[LayerLocation]) -> Iterator[tuple[ConfigPath, LayerWeights]]:
    named = stored.named
    for layer in layers:
        # Integer weights are left out: they are the states of random generators.
        names, candidates = (
            expected_weights(layer.layer),
            [weight for weight in named.get(layer.names[0], ()) if weight.tensor.is_float],
        )
        if not names:
            continue
        if len(layer.names) == 1 and len(candidates) == len(names):
            # Keras itself assigns the weights of a layer by their order.
            yield layer.path, dict(zip(names, (weight.tensor for weight in candidates), strict=True))
            continue
        nearby = [weight for weight in candidates if _is_in(weight, layer)]
        best = max((_shared_scopes(weight, layer.names) for weight in nearby), default=0)
        matching = [weight for weight in nearby if _shared_scopes(weight, layer.names) == best]
        if sorted(weight.leaf for weight in matching) == sorted(names):
            yield layer.path, {weight.leaf: weight.tensor for weight in matching}
        elif [weight.leaf for weight in matching] == [leaf.rpartition("/")[2] for leaf in names]:
            yield layer.path, dict(zip(names, (weight.tensor for weight in matching), strict=True))


def _is_in(weight: NamedWeight, layer: LayerLocation) -> bool:
    """Whether the name of a weight contains that of a layer, or of the wrapper around it."""
    names = layer.names[-2:] if layer.path[-1] in _BOUND_WRAPPERS else layer.names[-1:]
    path = "/".join(("", *weight.steps))
    has_parts = upgrade_class_name(string_in(layer.layer, "class_name")) in _SUBLAYERS
    return any(path.endswith(f"/{name}") or (has_parts and f"/{name}/" in path) for name in names)


def _first_bound(numbered: Mapping[str, tuple[Tensor, ...]], slots: Sequence[str]) -> tuple[Tensor, ...]:
    return next((numbered[slot] for slot in slots if slot in numbered), ())


def _shared_scopes(weight: NamedWeight, names: tuple[str, ...]) -> int:
    """The number of names of a layer and the models around it that occur in the name of a weight."""
    return len(set(weight.steps) & set(names))


def _with_bias(*leaves: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    return lambda config: (*leaves, *(() if config.get("use_bias") is False or config.get("bias") is False else _BIAS))


def _batch_norm(config: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_affine(config), "moving_mean", "moving_variance")


def _bidirectional(config: Mapping[str, Any]) -> tuple[str, ...]:
    # The backward layer may have no configuration of its own.
    forward = object_in(config, "layer")
    directions = (("forward", forward), ("backward", object_in(config, "backward_layer") or forward))
    return tuple(f"{direction}/{leaf}" for direction, layer in directions for leaf in expected_weights(layer))


def _attention(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{projection}/{leaf}"
        for projection in ("query", "key", "value", "output")
        for leaf in _with_bias("kernel")(config)
    )


def _affine(config: Mapping[str, Any]) -> tuple[str, ...]:
    switches = (("gamma", "scale"), ("beta", "center"))
    return tuple(leaf for leaf, switch in switches if config.get(switch) is not False)


_BIAS = ("bias",)
_BOUND_WRAPPERS = ("layer", "backward_layer")
_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "Dense")
_SUBLAYERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **{kind: {"": ("/cell", "")} for kind in (*GATES, *CONV_LSTM)},
    "Bidirectional": {key: (f"/{key}_layer/cell", f"/{key}_layer") for key in ("forward", "backward")},
    "MultiHeadAttention": {key: (f"/{key}_dense", f"/_{key}_dense") for key in ("query", "key", "value", "output")},
}
"""The HDF5 groups with the weights of the inner layers of some classes, by inner layer."""
_WEIGHTS_OF_LAYER: dict[str, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    **dict.fromkeys(_CONVOLUTIONS, _with_bias("kernel")),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _with_bias("depthwise_kernel")),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _with_bias("depthwise_kernel", "pointwise_kernel")),
    **dict.fromkeys(("BatchNormalization", "SyncBatchNormalization"), _batch_norm),
    "Embedding": lambda _: ("embeddings",),
    "PReLU": lambda _: ("alpha",),
    "LayerScale": lambda _: ("gamma",),
    "GroupNormalization": _affine,
    **dict.fromkeys((*GATES, *CONV_LSTM), _with_bias("kernel", "recurrent_kernel")),
    "Bidirectional": _bidirectional,
    "MultiHeadAttention": _attention,
}
