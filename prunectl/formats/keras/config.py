"""Parse a Keras configuration (of Keras 1 to 3): layers and calls, training, pruning wrappers, custom code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import PruningWrapper, Shape

PRUNED_PREFIX = "prune_low_magnitude_"
LORA_PREFIX = "lora_"
"""Prefix of the names of low-rank factors (LoRA), whose product is added to a kernel."""
WRAPPER = "PruneLowMagnitude"
"""The class of tfmot's wrapper around a layer that it prunes."""
_OWN_MODULES = ("keras", "tf_keras", "builtins", "tensorflow", "tensorflow_model_optimization")


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One layer of a configuration, however deep it is nested."""

    name: str
    kind: str
    config: Mapping[str, Any]
    path: tuple[str, ...]
    """Names of the models and wrappers around it."""
    is_custom: bool = False


def size_checked(config: dict[str, Any] | None, path: Path) -> dict[str, Any] | None:
    """The same configuration, refused if it has too many layers, or too long names, to be walked through."""
    count = characters = 0
    pending: list[tuple[Any, int]] = [(config, 0)]
    while pending:
        value, outer_characters = pending.pop()
        if isinstance(value, dict) and value.get("class_name"):
            outer_characters += len(string_in(value, "class_name")) + len(
                string_in(value, "name") or string_in(object_in(value, "config"), "name")
            )
            count, characters = count + 1, characters + outer_characters
            if count > budgets.MAX_KERAS_OBJECTS or characters > budgets.MAX_KERAS_NAME_CHARACTERS:
                raise InputError(f"{path} is refused: its configuration holds more layers than prunectl allows")
        members = value.values() if isinstance(value, dict) else value or ()
        pending += [(inner, outer_characters) for inner in members if isinstance(inner, (dict, list))]
    return config


def layers(config: Any, path: tuple[str, ...] = ()) -> Iterator[LayerConfig]:
    """Yield all layers of a model's configuration, each before the layers that are nested in it."""
    for entry in layer_entries(config):
        layer = _layer(entry, path)
        if layer is None:
            continue
        yield layer
        if len(path) > budgets.MAX_CONFIG_DEPTH:
            return
        for key in ("layer", "backward_layer", "cell"):
            inner = _layer(layer.config.get(key), (*path, layer.name))
            if inner is not None:
                yield inner
                yield from layers(layer.config[key], (*path, layer.name, inner.name))
        yield from layers(entry, (*path, layer.name))


def children(config: Any) -> Iterator[LayerConfig]:
    """Yield the layers of a model, without those nested in them."""
    for entry in layer_entries(config):
        layer = _layer(entry, ())
        if layer is not None:
            yield layer


def layer_entries(model: Any) -> tuple[Mapping[str, Any], ...]:
    """The entries of a model's layers: a list in its configuration or, in Keras 1, the configuration itself."""
    config = model.get("config") if isinstance(model, (dict, Mapping)) else None
    entries = config.get("layers") if isinstance(config, (dict, Mapping)) else config
    return tuple(entry for entry in entries if isinstance(entry, dict)) if isinstance(entries, list) else ()


def wrappers(config: Any) -> tuple[PruningWrapper, ...]:
    """The pruning wrappers of tfmot, each with its schedule."""
    pruned = (layer for layer in layers(config) if layer.kind == WRAPPER)
    return tuple(
        PruningWrapper(
            "tfmot", layer.name.removeprefix(PRUNED_PREFIX), schedule(object_in(layer.config, "pruning_schedule"))
        )
        for layer in pruned
    )


def inner_layer(layer: Any) -> Mapping[str, Any] | None:
    """The layer inside a pruning wrapper; None for any other layer."""
    if string_in(layer, "class_name").rpartition(">")[2] != WRAPPER:
        return None
    inner = object_in(object_in(layer, "config"), "layer")
    return inner if string_in(inner, "class_name") else None


def code(config: Any) -> tuple[str, ...]:
    """Code that Keras would run or import to rebuild the model."""
    facts = []
    for layer in layers(config):
        if layer.kind == "Lambda":
            facts.append(f"Lambda layer {layer.name}")
        elif layer.is_custom or ">" in layer.kind:
            facts.append(f"custom class {layer.kind.rpartition('>')[2]}")
    return tuple(dict.fromkeys(facts))


def schedule(schedule_config: Mapping[str, Any]) -> str:
    """A pruning schedule of tfmot in one line."""
    config = object_in(schedule_config, "config")
    name, begin, end = string_in(schedule_config, "class_name"), config.get("begin_step"), config.get("end_step")
    steps = f"steps {begin}-{end}" if isinstance(end, int) and end >= 0 else f"from step {begin}"
    if "final_sparsity" in config:
        return f"{name}({config.get('initial_sparsity')} -> {config['final_sparsity']}, {steps})"
    return f"{name}({config['target_sparsity']}, {steps})" if "target_sparsity" in config else name


def training(training_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The loss and the metrics of a training configuration."""
    facts = [f"loss {object_name(training_config.get('loss'))}"] if object_name(training_config.get("loss")) else []
    metrics = training_config.get("metrics")
    entries = _flat(metrics if isinstance(metrics, list) else [metrics])
    names = [name for entry in entries if (name := string_in(object_in(entry, "config"), "name") or object_name(entry))]
    return (*facts, f"metrics {', '.join(names)}") if names else tuple(facts)


def optimizer(training_config: Mapping[str, Any]) -> str:
    """The name of the optimizer in a training configuration."""
    return object_name(training_config.get("optimizer_config"))


def object_name(value: Any) -> str:
    """The name of an object, such as a loss, that Keras stores as a name or as a class with its configuration."""
    name = value if isinstance(value, str) else string_in(value, "class_name")
    return name.rpartition(">")[2]


def object_in(facts: Any, key: str) -> Mapping[str, Any]:
    """An object inside another, empty if it is not there."""
    value = facts.get(key) if isinstance(facts, (dict, Mapping)) else None
    return value if isinstance(value, dict) else {}


def is_packed(layer: Mapping[str, Any]) -> bool:
    """Whether a layer packs two weights into a byte, so that the stored shape is not that of its kernel."""
    mode = object_in(object_in(layer, "dtype"), "config").get("mode")
    return isinstance(mode, str) and mode.startswith(("int4", "gptq", "awq"))


def string_in(facts: Any, key: str) -> str:
    """A string inside an object, empty if it is not there."""
    value = facts.get(key) if isinstance(facts, (dict, Mapping)) else None
    return value if isinstance(value, str) else ""


_TUPLES = ("__tuple__", "TensorShape")


def untuple(value: Any) -> Any:
    """The list inside a tuple as Keras writes it; any other value as it is, but None for too long a list."""
    items = value.get("items") if isinstance(value, dict) and value.get("class_name") in _TUPLES else value
    return None if isinstance(items, list) and len(items) > budgets.MAX_LISTED else items


def shape_in(value: Any) -> Shape | None:
    """A configured shape without its batch axis; None for anything else."""
    axes = untuple(value)
    if not isinstance(axes, list) or not axes or len(axes) > budgets.MAX_TENSORFLOW_AXES:
        return None
    if not all(length is None or type(length) is int for length in axes):
        return None
    lengths = [None if length is None or not 0 <= length <= budgets.MAX_ELEMENTS else length for length in axes]
    return tuple(lengths[1:])


def shapes_in(value: Any, nesting: int = 0) -> tuple[Shape | None, ...]:
    """The shapes in a value: a single shape, or several in a list or a dictionary."""
    shape = shape_in(value)
    if shape is not None or nesting > budgets.MAX_SHAPE_DEPTH:
        return (shape,)
    items = untuple(value)
    members = items.values() if isinstance(items, Mapping) else items if isinstance(items, list) else ()
    return tuple(shape for member in members for shape in shapes_in(member, nesting + 1))


@lru_cache(1024)
def snake_case(name: str) -> str:
    """The class name in snake case, which Keras gives as a name to layers without one."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _flat(entries: list[Any]) -> Iterator[Any]:
    """Yield entries that Keras nests once for each output."""
    for entry in entries:
        yield from entry if isinstance(entry, list) else [entry]


def _layer(entry: Any, path: tuple[str, ...]) -> LayerConfig | None:
    kind, config = string_in(entry, "class_name"), object_in(entry, "config")
    if not kind:
        return None
    module = string_in(entry, "module")
    is_custom = bool(module) and module.split(".")[0] not in _OWN_MODULES
    return LayerConfig(string_in(config, "name") or string_in(entry, "name") or kind, kind, config, path, is_custom)


_KINDS = {
    "Convolution": "Conv",
    "AtrousConv": "Conv",
    "AtrousConvolution": "Conv",
    "SeparableConvolution": "SeparableConv",
    "DepthwiseConvolution": "DepthwiseConv",
    "MaxPool": "MaxPooling",
    "AvgPool": "AveragePooling",
    "GlobalMaxPool": "GlobalMaxPooling",
    "GlobalAvgPool": "GlobalAveragePooling",
}
_ALIASES = {
    "Deconvolution2D": "Conv2DTranspose",
    "Deconvolution3D": "Conv3DTranspose",
    "Convolution2DTranspose": "Conv2DTranspose",
    "Convolution3DTranspose": "Conv3DTranspose",
    "CuDNNLSTM": "LSTM",
    "CuDNNGRU": "GRU",
    "TimeDistributedDense": "Dense",
    "GroupedQueryAttention": "GroupQueryAttention",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
}
_KEYS = {
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "subsample": "strides",
    "subsample_length": "strides",
    "border_mode": "padding",
    "atrous_rate": "dilation_rate",
    "pool_length": "pool_size",
    "stride": "strides",
    "length": "size",
}
_KERAS_1 = {"W": "kernel", "b": "bias", "U": "recurrent_kernel", "gamma": "gamma", "beta": "beta"}
_FORMATS = {"th": "channels_first", "tf": "channels_last"}
_WINDOWS = (("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3"))


def upgrade_class_name(kind: str) -> str:
    """The name of a layer's class in Keras 2."""
    stem, digit, rest = kind[:-2], kind[-2:-1], kind[-2:]
    if digit in {"1", "2", "3"} and rest.endswith("D") and stem in _KINDS:
        return _KINDS[stem] + rest
    return _ALIASES.get(kind, kind)


def upgrade_config(kind: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a layer under their names in Keras 2."""
    upgraded = {_KEYS.get(key, key): value for key, value in config.items()}
    for keys in _WINDOWS:
        if all(key in config for key in keys):
            upgraded["kernel_size"] = [config[key] for key in keys]
    if kind != "Embedding" and "output_dim" in config and "units" not in config:
        upgraded["units"] = config["output_dim"]
    ordering = string_in(config, "dim_ordering")
    if ordering in _FORMATS:
        upgraded["data_format"] = _FORMATS[ordering]
    return upgraded


def modern_name(leaf: str) -> str:
    """The name that later versions of Keras give to a weight of Keras 1, such as `lstm_1_W_i`."""
    for statistic in ("running_mean", "running_std"):
        if leaf.endswith(f"_{statistic}"):
            return statistic
    return next((_KERAS_1[piece] for piece in leaf.split("_")[1:] if piece in _KERAS_1), leaf)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A reference to an output of a layer call."""

    layer: str
    node: int
    tensor: int
    shape: Shape | None = None
    """Its shape, which only Keras 3 stores."""


@dataclass(frozen=True, slots=True)
class NodeCall:
    """One call of a layer, a node in the graph of a model."""

    layer: str
    description: Mapping[str, Any]
    """The layer's entry in the configuration."""
    node: int
    arguments: tuple[TensorRef, ...] = ()
    named: tuple[tuple[str, TensorRef], ...] = ()
    """Its keyword inputs; each tensor of a list has the name of the list."""

    @property
    def keywords(self) -> Mapping[str, TensorRef]:
        """The first tensor of each keyword input."""
        return dict(reversed(self.named))

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        """All of its inputs."""
        return (*self.arguments, *(source for _, source in self.named))


def name_of(layer: Mapping[str, Any]) -> str:
    """The name of a layer."""
    return string_in(layer, "name") or string_in(object_in(layer, "config"), "name") or string_in(layer, "class_name")


def parse_calls(model: Any) -> tuple[NodeCall, ...]:
    """Every layer call in a model, from the inbound nodes of its layers."""
    return tuple(call for layer in layer_entries(model) for call in _calls(layer))


def model_ends(model: Any, key: str) -> tuple[TensorRef, ...]:
    """The inputs or the outputs of a model."""
    references = object_in(model, "config").get(key)
    return tuple(_sources(references, 0))


def _calls(layer: Mapping[str, Any]) -> Iterator[NodeCall]:
    nodes = layer.get("inbound_nodes")
    if not isinstance(nodes, list) or not nodes:
        yield NodeCall(name_of(layer), layer, 0)
        return
    for number, node in enumerate(nodes):
        if isinstance(node, dict):
            named = object_in(node, "kwargs")
            arguments = tuple(_sources(node.get("args"), 0))
        else:
            named = _named(node)
            arguments = tuple(_sources(node, 0))
        named_inputs = tuple((key, source) for key, value in named.items() for source in _sources(value, 0))
        yield NodeCall(name_of(layer), layer, number, arguments, named_inputs)


def _named(node: Any) -> Mapping[str, Any]:
    """The keyword inputs of a node of Keras 2, which follow each tensor reference."""
    entries = [node] if _is_reference(node) else node if isinstance(node, list) else []
    return {
        key: value
        for entry in entries
        if _is_reference(entry) and len(entry) > 3 and isinstance(entry[3], dict)
        for key, value in entry[3].items()
    }


def _sources(value: Any, nesting: int) -> Iterator[TensorRef]:
    if nesting > budgets.MAX_INBOUND_DEPTH:
        return
    if _is_reference(value):
        yield from _source(value)
    elif isinstance(value, list):
        for item in value:
            yield from _sources(item, nesting + 1)
    elif isinstance(value, dict):
        config = object_in(value, "config")
        if _is_reference(config.get("keras_history")):
            yield from _source(config["keras_history"], shape_in(config.get("shape")))
        elif "class_name" not in value:
            # In the order in which Keras flattens dictionaries.
            for key in sorted(value):
                yield from _sources(value[key], nesting + 1)


def _source(reference: list[Any], shape: Shape | None = None) -> Iterator[TensorRef]:
    layer, node, tensor = reference[:3]
    # Keras 2 marks constants with negative numbers.
    if node >= 0 and tensor >= 0:
        yield TensorRef(layer, node, tensor, shape)


def _is_reference(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 3 <= len(value) <= 4
        and isinstance(value[0], str)
        and type(value[1]) is int
        and type(value[2]) is int
    )


_LOW_PRECISION = frozenset({"float16", "bfloat16", "mixed_float16", "mixed_bfloat16"})
_LOWER_THAN = {"float32": _LOW_PRECISION, "float64": _LOW_PRECISION | {"float32"}}


def with_precision(precision: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with every dtype policy of a lower precision raised to this one, float32 or float64."""
    return {str(key): _raised(value, str(key), precision) for key, value in config.items()}


def _raised(value: Any, key: str, precision: str) -> Any:
    if key == "dtype" and (value if isinstance(value, str) else _policy_name(value)) in _LOWER_THAN[precision]:
        return precision
    if isinstance(value, Mapping):
        return with_precision(precision, value)
    if isinstance(value, list):
        return [_raised(item, "", precision) for item in value]
    return value


def _policy_name(value: Any) -> str:
    return string_in(object_in(value, "config"), "name")
