"""Which weights of a file belong to which layer of its configuration?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prunectl.channels.keras.spots import Located, Spot
from prunectl.channels.keras.stored import Named, Stored
from prunectl.formats.base import Tensor
from prunectl.formats.keras.config import part, text
from prunectl.formats.keras.dialect import modern_kind
from prunectl.formats.keras.recurrent import GATES

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
        leaves = expected(layer.found)
        inside = _INSIDE.get(modern_kind(text(layer.found, "class_name")), {})
        for slot in layer.slots if leaves else ():
            tensors = tuple(
                tensor
                for part_of in dict.fromkeys(_front(leaf) for leaf in leaves)
                for tensor in _first(held, [f"{slot}{way}" for way in inside.get(part_of, ("",))])
            )
            if len(tensors) == len(leaves):
                yield layer.spot, dict(zip(leaves, tensors, strict=True))
                break


def _by_name(stored: Stored, layers: Sequence[Located]) -> Iterator[tuple[Spot, Leaves]]:
    held = stored.named
    for layer in layers:
        # Whole numbers are where random ones go on from.
        leaves, group = expected(layer.found), [one for one in held.get(layer.names[0], ()) if one.tensor.is_float]
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


def _is_in(one: Named, layer: Located) -> bool:
    """Whether a weight is named after a layer, or after the wrapper around it."""
    names = layer.names[-2:] if layer.spot[-1] in _WRAPPED else layer.names[-1:]
    way = "/".join(("", *one.steps))
    has_parts = modern_kind(text(layer.found, "class_name")) in _INSIDE
    return any(way.endswith(f"/{name}") or (has_parts and f"/{name}/" in way) for name in names)


def _front(leaf: str) -> str:
    """Return the part of a layer that a weight is in."""
    return leaf.rpartition("/")[0]


def _first(held: Mapping[str, tuple[Tensor, ...]], slots: Sequence[str]) -> tuple[Tensor, ...]:
    return next((held[slot] for slot in slots if slot in held), ())


def _agreement(one: Named, names: tuple[str, ...]) -> int:
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
    return tuple(f"{way}/{leaf}" for way, found in ways for leaf in expected(found))


def _heads(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{one}/{leaf}" for one in ("query", "key", "value", "output") for leaf in _with_bias("kernel")(config)
    )


def _affine(config: Mapping[str, Any]) -> tuple[str, ...]:
    switches = (("gamma", "scale"), ("beta", "center"))
    return tuple(leaf for leaf, switch in switches if config.get(switch) is not False)


_BIAS = ("bias",)
_WRAPPED = ("layer", "backward_layer")
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
