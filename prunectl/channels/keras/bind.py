"""Which weights of a file belong to which layer of its configuration?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prunectl.channels.keras.spots import Located, Spot
from prunectl.channels.keras.stored import Named, Stored
from prunectl.formats.base import Tensor
from prunectl.formats.keras.config import part, text
from prunectl.formats.keras.dialect import modern_kind

Leaves = Mapping[str, Tensor]
"""The weights of a layer by their own names, such as `kernel`."""


def bound(stored: Stored, layers: Sequence[Located]) -> dict[Spot, Leaves]:
    """Return the weights of each layer that the file holds as its class has them."""
    found = _by_name(stored, layers) if stored.root is not None else _by_number(stored, layers)
    return dict(found)


def expected(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the weights of a layer are called, in the order of Keras; nothing for a class without any known."""
    kind, config = modern_kind(text(found, "class_name")), part(found, "config")
    maker = _MAKERS.get(kind)
    return () if maker is None else maker(config)


def _by_number(stored: Stored, layers: Sequence[Located]) -> Iterator[tuple[Spot, Leaves]]:
    held = stored.numbered
    for layer in layers:
        tensors = next((held[slot] for slot in layer.slots if slot in held), ())
        leaves = expected(layer.found)
        if leaves and len(tensors) == len(leaves):
            yield layer.spot, dict(zip(leaves, tensors, strict=True))


def _by_name(stored: Stored, layers: Sequence[Located]) -> Iterator[tuple[Spot, Leaves]]:
    held = stored.named
    for layer in layers:
        leaves, group = expected(layer.found), held.get(layer.names[0], ())
        if not leaves:
            continue
        if len(layer.names) == 1 and len(group) == len(leaves):
            # Keras itself goes by their order.
            yield layer.spot, dict(zip(leaves, (one.tensor for one in group), strict=True))
            continue
        near = [one for one in group if _is_in(one, layer)]
        best = max((_agreement(one, layer.names) for one in near), default=0)
        own = {one.leaf: one.tensor for one in near if _agreement(one, layer.names) == best}
        if own.keys() == set(leaves) and len([one for one in near if _agreement(one, layer.names) == best]) == len(own):
            yield layer.spot, own


def _is_in(one: Named, layer: Located) -> bool:
    """Whether a weight is named after a layer, or after the wrapper around it."""
    names = layer.names[-2:] if layer.spot[-1] in _WRAPPED else layer.names[-1:]
    return any("/".join(("", *one.steps)).endswith(f"/{name}") for name in names)


def _agreement(one: Named, names: tuple[str, ...]) -> int:
    """Return how many of the models around a layer stand in the name of a weight."""
    return len(set(one.steps) & set(names))


def _with_bias(*leaves: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    return lambda config: (*leaves, *(() if config.get("use_bias") is False or config.get("bias") is False else _BIAS))


def _normal(config: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_affine(config), "moving_mean", "moving_variance")


def _affine(config: Mapping[str, Any]) -> tuple[str, ...]:
    switches = (("gamma", "scale"), ("beta", "center"))
    return tuple(leaf for leaf, switch in switches if config.get(switch) is not False)


_BIAS = ("bias",)
_WRAPPED = ("layer", "backward_layer")
_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "Dense")
_MAKERS: dict[str, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    **dict.fromkeys(_CONVOLUTIONS, _with_bias("kernel")),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _with_bias("depthwise_kernel")),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _with_bias("depthwise_kernel", "pointwise_kernel")),
    **dict.fromkeys(("BatchNormalization", "SyncBatchNormalization"), _normal),
    "Embedding": lambda _: ("embeddings",),
    "PReLU": lambda _: ("alpha",),
    "LayerScale": lambda _: ("gamma",),
}
