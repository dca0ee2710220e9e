"""Check whether XNNPACK can run a Keras model sparsely: supported layers from a first convolution to a global pooling.

The rules are those of `PruneForLatencyOnXNNPack` in tfmot; see "Fast Sparse ConvNets" (Elsen et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile, Role
from prunectl.formats.keras.config import PRUNED_PREFIX, layer_entries, model_ends, name_of, object_in, parse_calls

_ALWAYS = frozenset({"Add", "Multiply", "ZeroPadding2D", "ReLU", "LeakyReLU", "ELU", "Dropout", "SpatialDropout2D"})
_ACTIVATIONS = frozenset({"relu", "relu6", "leaky_relu", "elu", "sigmoid"})
_OPERATORS = frozenset({"identity", "add", "subtract", "multiply"})


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str
    kind: str
    config: Mapping[str, Any]
    producers: tuple[str, ...]

    def is_padded_by(self, layers: Mapping[str, _Layer], width: int) -> bool:
        """Whether its only input is a ZeroPadding2D of this width on each side."""
        if len(self.producers) != 1:
            return False
        before = layers[self.producers[0]]
        return before.kind == "ZeroPadding2D" and before.config.get("padding") == [[width, width]] * 2


def check_sparse_inference(model: ModelFile) -> None:
    """Refuse a model that XNNPACK would run densely, as far as its configuration shows."""
    config = model.about.keras
    if config is None:
        return
    if not layer_entries(config):
        raise UsageError(f"the configuration of {model.path} lists no layers, so XNNPACK's sparse path cannot be found")
    layers = _layers(config)
    kernels = (tensor for tensor in model.tensors if tensor.role is Role.KERNEL and len(tensor.shape) == 4)
    channels = {tensor.layer: tensor.shape[2] for tensor in kernels}
    consumers: dict[str, list[str]] = {name: [] for name in layers}
    for layer in layers.values():
        for producer in layer.producers:
            consumers[producer].append(layer.name)
    inputs = [name for name, layer in layers.items() if not layer.producers]
    starts = _first_matches(inputs, lambda name: _is_first_conv(layers[name], layers, channels), consumers.__getitem__)
    if not starts:
        raise _unsupported(
            model, "a 3x3 convolution of 3 channels, strides 2, padding valid, behind a ZeroPadding2D of 1"
        )
    outputs = [source.layer for source in model_ends(config, "output_layers") if source.layer in layers] or [
        list(layers)[-1]
    ]
    stops = _first_matches(
        outputs, lambda name: layers[name].kind == "GlobalAveragePooling2D", lambda name: layers[name].producers
    )
    if not stops:
        raise _unsupported(model, "a GlobalAveragePooling2D before each output")
    between = [name for start in starts for name in consumers[start]]
    for name in _nodes_between(between, stops, consumers):
        if not _is_supported(layers[name], layers):
            raise _unsupported(model, f"another layer than {name} ({layers[name].kind})")


def _unsupported(model: ModelFile, missing: str) -> UsageError:
    return UsageError(
        f"XNNPACK would not run {model.path} as a sparse model: it needs {missing}",
        hint="prune without --policy xnnpack, or with --layers",
    )


def _layers(config: Mapping[str, Any]) -> Mapping[str, _Layer]:
    """The layers of a model by name, each with the layers whose outputs it takes."""
    layers: dict[str, _Layer] = {}
    is_graph = any(layer.get("inbound_nodes") for layer in layer_entries(config))
    if is_graph:
        for call in parse_calls(config):
            before = layers[call.layer].producers if call.layer in layers else ()
            producers = dict.fromkeys((*before, *(source.layer for source in call.sources)))
            layers[call.layer] = _layer(call.layer, call.description, tuple(producers))
    else:
        for layer in layer_entries(config):
            layers[name_of(layer)] = _layer(name_of(layer), layer, tuple(layers)[-1:])
    names = layers.keys()
    return {
        name: _Layer(
            name, layer.kind, layer.config, tuple(producer for producer in layer.producers if producer in names)
        )
        for name, layer in layers.items()
    }


def _layer(name: str, config: Mapping[str, Any], producers: tuple[str, ...]) -> _Layer:
    is_wrapped = config.get("class_name") == "PruneLowMagnitude"
    inner = object_in(object_in(config, "config"), "layer") if is_wrapped else config
    return _Layer(name, str(inner.get("class_name")), object_in(inner, "config"), producers)


def _first_matches(
    begin: Iterable[str], is_end: Callable[[str], bool], after: Callable[[str], Iterable[str]]
) -> set[str]:
    """The first matching layer on every path from `begin`; an empty set if a path ends without a match."""
    waiting, seen, matches = list(begin), set(begin), set()
    while waiting:
        name = waiting.pop()
        if is_end(name):
            matches.add(name)
            continue
        further = list(after(name))
        if not further:
            return set()
        waiting += [following for following in dict.fromkeys(further) if following not in seen]
        seen.update(further)
    return matches


def _nodes_between(begin: Iterable[str], stops: set[str], after: Mapping[str, Iterable[str]]) -> list[str]:
    """The layers on the paths from `begin` to `stops`, without `stops`."""
    waiting, seen = list(dict.fromkeys(begin))[::-1], set[str]()
    order = []
    while waiting:
        name = waiting.pop()
        if name in seen or name in stops:
            continue
        seen.add(name)
        order.append(name)
        waiting += list(after[name])
    return order


def _is_first_conv(layer: _Layer, layers: Mapping[str, _Layer], channels: Mapping[str, int]) -> bool:
    config = layer.config
    return (
        layer.kind == "Conv2D"
        and config.get("kernel_size") == [3, 3]
        and channels.get(layer.name.removeprefix(PRUNED_PREFIX)) == 3
        and config.get("strides") == [2, 2]
        and config.get("padding") == "valid"
        and layer.is_padded_by(layers, 1)
    )


def _is_supported(layer: _Layer, layers: Mapping[str, _Layer]) -> bool:
    config = layer.config
    if layer.kind == "DepthwiseConv2D":
        return _is_supported_depthwise(layer, layers)
    if layer.kind == "Conv2D":
        plain = config.get("groups", 1) == 1 and config.get("dilation_rate", [1, 1]) == [1, 1]
        return plain and config.get("kernel_size") == [1, 1] and config.get("strides") == [1, 1]
    facts = {
        "GlobalAveragePooling2D": config.get("keepdims") is True,
        "BatchNormalization": config.get("axis") in ([3], 3, -1),
        "UpSampling2D": config.get("interpolation") == "bilinear",
        "Activation": str(config.get("activation")) in _ACTIVATIONS,
        "TFOpLambda": str(config.get("function")).rpartition(".")[2] in _OPERATORS,
    }
    return layer.kind in _ALWAYS or facts.get(layer.kind, False)


def _is_supported_depthwise(layer: _Layer, layers: Mapping[str, _Layer]) -> bool:
    config = layer.config
    window, strides, padding = config.get("kernel_size"), config.get("strides"), config.get("padding")
    if config.get("depth_multiplier") != 1 or config.get("dilation_rate") != [1, 1] or window not in ([3, 3], [5, 5]):
        return False
    if padding == "same":
        return strides == [1, 1]
    return strides in ([1, 1], [2, 2]) and layer.is_padded_by(layers, 1 if window == [3, 3] else 2)
