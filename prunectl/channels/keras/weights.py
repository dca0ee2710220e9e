"""The weights of a Keras file with their paths in HDF5, inside an archive or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.formats.base import ModelFile, Role, Tensor
from prunectl.formats.keras.archive import WEIGHTS
from prunectl.formats.keras.config import LayerConfig, part, text, upgrade_class_name
from prunectl.formats.keras.flops.recurrent import GATES
from prunectl.formats.keras.hdf5 import read
from prunectl.formats.keras.hdf5.child import H5Location
from prunectl.formats.keras.hdf5.read import H5Contents
from prunectl.formats.keras.inbound import name_of
from prunectl.formats.keras.layouts import layer_names_group
from prunectl.formats.scratch import Scratch
from prunectl.formats.zip_read import open_archive


class WeightFile:
    """What a file holds: a scratch copy of the weights of an archive lives as long as this."""

    def __init__(self, model: ModelFile) -> None:
        self.model = model
        self._scratch: Scratch | None = None
        self.file = model.path if model.format == "keras-h5" else self._taken_out()
        self.contents: H5Contents = read.read_contents(H5Location(self.file, 0, self.file.stat().st_size))
        self.root = layer_names_group(self.contents)
        self._keys = {found.storage.key: found.name for found in self.contents.datasets}

    def _taken_out(self) -> Path:
        self._scratch = Scratch()
        weights = self._scratch.path / WEIGHTS
        archive = open_archive(self.model.path)
        with weights.open("wb") as file:
            file.writelines(archive.pieces(archive.entries[WEIGHTS]))
        return weights

    def path(self, tensor: Tensor) -> str:
        """Return where a tensor stands in the HDF5 file."""
        return self._keys[tensor.storage.key]

    @property
    def numbered(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Weights that have only numbers, by their layer's path."""
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for tensor in self.model.tensors:
            owner, marker, number = self.path(tensor).rpartition("/vars/")
            if marker and number.isdecimal() and tensor.role is not Role.OPTIMIZER:
                found.setdefault(owner, []).append((int(number), tensor))
        return {owner: tuple(tensor for _, tensor in sorted(some, key=_first_stored)) for owner, some in found.items()}

    @property
    def named(self) -> Mapping[str, tuple[NamedWeight, ...]]:
        """Weights that have names, by the layer of the model that they are in, in the order of Keras."""
        tensors = {self.path(tensor): tensor for tensor in self.model.tensors}
        root = self.root or ""
        found: dict[str, tuple[NamedWeight, ...]] = {}
        for group in self.contents.names(root, "layer_names"):
            inside = f"{root}/{group}" if root else group
            names = self.contents.names(inside, "weight_names")
            held = [(name, tensors.get(f"{inside}/{name}")) for name in names]
            found[group] = tuple(NamedWeight(*_steps(name), tensor) for name, tensor in held if tensor is not None)
        return found


@dataclass(frozen=True, slots=True)
class NamedWeight:
    """A weight with the name that Keras gives it."""

    steps: tuple[str, ...]
    """Names on the way to it."""
    leaf: str
    tensor: Tensor


def _steps(name: str) -> tuple[tuple[str, ...], str]:
    *steps, leaf = re.sub(r":\d+$", "", name).split("/")
    return tuple(steps), leaf


def _first_stored(pair: tuple[int, Tensor]) -> int:
    return pair[0]


ConfigPath = tuple[str | int, ...]
"""Keys on the way to a layer."""
ROOT: ConfigPath = ()
_SPOT_WRAPPERS = (("layer", ("layer", "forward_layer")), ("backward_layer", ("backward_layer",)))
"""What a wrapper says is in it, and the attributes that it keeps it in."""
_MAX_DEPTH = 40
_PLAIN = frozenset({"name"})


@dataclass(frozen=True, slots=True)
class LayerLocation:
    """A layer, and where it stands."""

    spot: ConfigPath
    found: Mapping[str, Any]
    names: tuple[str, ...]
    """Of the models and wrappers around it, and its own."""
    slots: tuple[str, ...]
    """Paths that Keras may keep its weights under where these have only numbers."""


def located(config: Mapping[str, Any], slots: Mapping[str, LayerConfig]) -> tuple[LayerLocation, ...]:
    """Return every layer of a model in the order of Keras; the slots are the folders that weights have only numbers in.

    Which folder is whose, `formats/keras/numbering.py` knows; the rest have none.
    """
    return tuple(_inside(config, (), (), {id(layer.config): path for path, layer in slots.items()}))


def get_at(config: Any, spot: ConfigPath) -> Any:
    """Return what stands somewhere in a configuration."""
    for key in spot:
        config = config[key]
    return config


def is_operation(found: Mapping[str, Any]) -> bool:
    """Whether this is a bare function of Keras 3 rather than a layer."""
    if "module" in found:
        return ".ops." in text(found, "module")
    return found.get("config", {}).keys() == _PLAIN if isinstance(found.get("config"), dict) else False


def _inside(
    model: Mapping[str, Any], around: ConfigPath, names: tuple[str, ...], folders: Mapping[int, str]
) -> Iterator[LayerLocation]:
    entries = part(model, "config").get("layers")
    for number, found in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(found, dict):
            folder = folders.get(id(found.get("config")))
            spot = (*around, "config", "layers", number)
            slots = () if folder is None else (folder,)
            yield from _with_inner(LayerLocation(spot, found, (*names, name_of(found)), slots), folders)


def _with_inner(one: LayerLocation, folders: Mapping[int, str]) -> Iterator[LayerLocation]:
    yield one
    if len(one.names) > _MAX_DEPTH:
        return
    yield from _inside(one.found, one.spot, one.names, folders)
    for key, attributes in _SPOT_WRAPPERS:
        inner = part(part(one.found, "config"), key)
        if text(inner, "class_name"):
            slots = tuple(f"{slot}/{attribute}" for slot in one.slots for attribute in attributes)
            names = (*one.names, name_of(inner))
            yield from _with_inner(LayerLocation((*one.spot, "config", key), inner, names, slots), folders)


LayerWeights = Mapping[str, Tensor]
"""The weights of a layer by their own names, such as `kernel`."""


def bind_weights(stored: WeightFile, layers: Sequence[LayerLocation]) -> dict[ConfigPath, LayerWeights]:
    """Return the weights of each layer that the file holds as its class has them."""
    found = _bound_by_name(stored, layers) if stored.root is not None else _by_number(stored, layers)
    return dict(found)


def expected_weights(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the weights of a layer are called, in the order of Keras; nothing for a class without any known."""
    kind, config = upgrade_class_name(text(found, "class_name")), part(found, "config")
    maker = _MAKERS.get(kind)
    return () if maker is None else maker(config)


def _by_number(stored: WeightFile, layers: Sequence[LayerLocation]) -> Iterator[tuple[ConfigPath, LayerWeights]]:
    held = stored.numbered
    for layer in layers:
        leaves = expected_weights(layer.found)
        inside = _INSIDE.get(upgrade_class_name(text(layer.found, "class_name")), {})
        for slot in layer.slots if leaves else ():
            tensors = tuple(
                tensor
                for part_of in dict.fromkeys(_front(leaf) for leaf in leaves)
                for tensor in _first_bound(held, [f"{slot}{way}" for way in inside.get(part_of, ("",))])
            )
            if len(tensors) == len(leaves):
                yield layer.spot, dict(zip(leaves, tensors, strict=True))
                break


def _bound_by_name(stored: WeightFile, layers: Sequence[LayerLocation]) -> Iterator[tuple[ConfigPath, LayerWeights]]:
    held = stored.named
    for layer in layers:
        # Whole numbers are where random ones go on from.
        leaves, group = (
            expected_weights(layer.found),
            [one for one in held.get(layer.names[0], ()) if one.tensor.is_float],
        )
        if not leaves:
            continue
        if len(layer.names) == 1 and len(group) == len(leaves):
            # Keras itself goes by their order.
            yield layer.spot, dict(zip(leaves, (one.tensor for one in group), strict=True))
            continue
        near = [one for one in group if _is_in(one, layer)]
        best = max((_agreement(one, layer.names) for one in near), default=0)
        own = [one for one in near if _agreement(one, layer.names) == best]
        if sorted(one.leaf for one in own) == sorted(leaves):
            yield layer.spot, {one.leaf: one.tensor for one in own}
        elif [one.leaf for one in own] == [leaf.rpartition("/")[2] for leaf in leaves]:
            yield layer.spot, dict(zip(leaves, (one.tensor for one in own), strict=True))


def _is_in(one: NamedWeight, layer: LayerLocation) -> bool:
    """Whether a weight is named after a layer, or after the wrapper around it."""
    names = layer.names[-2:] if layer.spot[-1] in _BOUND_WRAPPERS else layer.names[-1:]
    way = "/".join(("", *one.steps))
    has_parts = upgrade_class_name(text(layer.found, "class_name")) in _INSIDE
    return any(way.endswith(f"/{name}") or (has_parts and f"/{name}/" in way) for name in names)


def _front(leaf: str) -> str:
    """Return the part of a layer that a weight is in."""
    return leaf.rpartition("/")[0]


def _first_bound(held: Mapping[str, tuple[Tensor, ...]], slots: Sequence[str]) -> tuple[Tensor, ...]:
    return next((held[slot] for slot in slots if slot in held), ())


def _agreement(one: NamedWeight, names: tuple[str, ...]) -> int:
    """Return how many of the models around a layer stand in the name of a weight."""
    return len(set(one.steps) & set(names))


def _with_bias(*leaves: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    return lambda config: (*leaves, *(() if config.get("use_bias") is False or config.get("bias") is False else _BIAS))


def _normal(config: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_affine(config), "moving_mean", "moving_variance")


def _both(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the weights of a layer that runs both ways are called; the second may not be described by itself."""
    forward = part(config, "layer")
    ways = (("forward", forward), ("backward", part(config, "backward_layer") or forward))
    return tuple(f"{way}/{leaf}" for way, found in ways for leaf in expected_weights(found))


def _heads(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{one}/{leaf}" for one in ("query", "key", "value", "output") for leaf in _with_bias("kernel")(config)
    )


def _affine(config: Mapping[str, Any]) -> tuple[str, ...]:
    switches = (("gamma", "scale"), ("beta", "center"))
    return tuple(leaf for leaf, switch in switches if config.get(switch) is not False)


_BIAS = ("bias",)
_BOUND_WRAPPERS = ("layer", "backward_layer")
_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "Dense")
_INSIDE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **{kind: {"": ("/cell", "")} for kind in GATES},
    "Bidirectional": {way: (f"/{way}_layer/cell", f"/{way}_layer") for way in ("forward", "backward")},
    "MultiHeadAttention": {one: (f"/{one}_dense", f"/_{one}_dense") for one in ("query", "key", "value", "output")},
}
"""Where layers that are made of others keep the weights of each part."""
_MAKERS: dict[str, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    **dict.fromkeys(_CONVOLUTIONS, _with_bias("kernel")),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _with_bias("depthwise_kernel")),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _with_bias("depthwise_kernel", "pointwise_kernel")),
    **dict.fromkeys(("BatchNormalization", "SyncBatchNormalization"), _normal),
    "Embedding": lambda _: ("embeddings",),
    "PReLU": lambda _: ("alpha",),
    "LayerScale": lambda _: ("gamma",),
    "GroupNormalization": _affine,
    **dict.fromkeys(GATES, _with_bias("kernel", "recurrent_kernel")),
    "Bidirectional": _both,
    "MultiHeadAttention": _heads,
}
