"""The adapter of Keras files: it resizes the configuration, and slices weights and optimizer slots."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.channels.adapter import (
    Feeds,
    GraphAdapter,
    PrunedShapes,
    RemovedIndices,
    Runner,
    WrittenNetwork,
    delete_indices,
    removed_by_tensor,
)
from prunectl.channels.graph import ChannelGraph, Shapes
from prunectl.channels.keras import run as keras_run
from prunectl.channels.keras.builder import CalledLayer, GraphBuilder
from prunectl.channels.keras.layer_rules import LayerResize, rule_for
from prunectl.channels.keras.run import EditedFile, RecordingRunner, random_inputs, runner
from prunectl.channels.keras.traverse import LoadedKeras, load_keras
from prunectl.channels.keras.weights import ConfigPath, get_at
from prunectl.channels.lengths import AxisLengths, DataShapes
from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array, ModelFile, Role, StripOptions, StripPart, Tensor
from prunectl.formats.keras.config import object_in, string_in, untuple, upgrade_class_name
from prunectl.formats.registry import by_name, load, open_model
from prunectl.pruning import destination as outputs
from prunectl.training.backend import LoadOptions


def read_keras(model: ModelFile, origin: LoadOptions, data: DataShapes | None = None) -> KerasAdapter:
    """The adapter of a Keras file, whose configuration describes the network."""
    require_followable(model, origin)
    return KerasAdapter(load_keras(model, AxisLengths(origin.inputs, data)), origin)


def require_followable(model: ModelFile, origin: LoadOptions) -> None:
    """Refuse `--builder`, which a file with a configuration does not need, and layers inside tfmot wrappers."""
    if origin.model:
        raise UsageError(
            "--builder cannot be used with --pattern channel on a Keras file, which holds its own configuration",
            hint="save the model that the function builds as .keras, and prune that file",
        )
    if model.about.wrappers:
        raise InputError(
            f"the layers of {model.path} are inside tfmot wrappers",
            hint=f"remove them first: prunectl strip {model.path} -o plain{model.path.suffix} --only masks,wrappers",
        )


class KerasAdapter(GraphAdapter):
    """A Keras file as a prunable graph."""

    def __init__(self, loaded: LoadedKeras, origin: LoadOptions) -> None:
        self._loaded, self._origin = loaded, origin

    @property
    def graph(self) -> ChannelGraph:
        return self._loaded.graph

    @cached_property
    def _slots(self) -> Mapping[str, str] | None:
        return match_slots(self._loaded)

    @property
    def coupled_tensors(self) -> Mapping[str, str]:
        """The optimizer slots of each weight, where they can be matched."""
        return self._slots or {}

    @property
    def omitted_tensors(self) -> frozenset[str]:
        """The whole state of an optimizer whose slots cannot be matched to weights."""
        is_matched, tensors = self._slots is not None, self._loaded.model.tensors
        return frozenset(tensor.name for tensor in tensors if tensor.role is Role.OPTIMIZER and not is_matched)

    @property
    def notes(self) -> tuple[str, ...]:
        """A note if the state of the optimizer is left out."""
        if not self.omitted_tensors:
            return ()
        return ("The optimizer state was left out: its slots cannot be matched to the weights.",)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The assumed length of open axes, if some layers do not fit it."""
        length = self._loaded.guessed_length
        if not length:
            return ()
        how = "give their lengths with --input or --data"
        return (
            f"Open axes were assumed to have the length {length}, and layers that do not fit it are locked: {how}.",
        )

    @property
    def observable(self) -> frozenset[str]:
        """The outputs before the activation of layers that are called once."""
        return frozenset(self._loaded.builder.observable)

    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """The smaller configuration, and sliced weights and optimizer slots."""
        removed_by_name = removed_by_tensor(removed)
        arrays = dict(weights)
        for name, axes in removed_by_name.items():
            arrays[name] = delete_indices(weights.get(name, self.graph.weights[name]), axes)
        model = self._loaded.model
        tensors = {tensor.name: tensor for tensor in model.tensors}
        for slot, name in self.coupled_tensors.items():
            if name in removed_by_name:
                arrays[slot] = delete_indices(model.read(tensors[slot]), removed_by_name[name])
        shapes = {name: array.shape for name, array in arrays.items()}
        return EditedFile(resize_config(self._loaded.config, self._loaded.builder, after, shapes), arrays)

    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        return EditedFile(None, weights)

    def random_inputs(self, random: np.random.Generator) -> Feeds:
        """Random inputs, small integers for embeddings."""
        return random_inputs(self._loaded, random)

    def runner(self, network: Any, observed: Iterable[str], *, in_float64: bool = False) -> Runner:
        """A runner of the network that Keras loads from the edited file."""
        return runner(self._loaded, network, self._origin, observed, precision="float64" if in_float64 else "float32")

    def to_float64(self, built: Runner, network: Any, observed: Iterable[str]) -> Runner:
        """The same network switched to float64, if its layers allow that; else one that is loaded again."""
        is_wide = isinstance(built, RecordingRunner) and built.widen()
        return built if is_wide else super().to_float64(built, network, observed)

    def write(self, network: Any, folder: Path, target: Path) -> WrittenNetwork:
        """Write an edited file in the layout of the original."""
        path = outputs.staged_paths(self._loaded.model, folder, target)[self._loaded.model.path]
        keras_run.write(self._loaded, network, path)
        if self.omitted_tensors:
            unstripped = path.with_name(f"{path.name}.whole")
            os.replace(path, unstripped)
            options = StripOptions(frozenset({StripPart.OPTIMIZER}))
            load(by_name(self._loaded.model.format).stripper)(open_model(unstripped), options, {unstripped: path})
            unstripped.unlink()
        return WrittenNetwork(path)


_SHAPE_KEYS = ("batch_input_shape", "batch_shape", "build_input_shape", "input_shape")
_KERAS1_NAMES = {"filters": "nb_filter", "units": "output_dim"}
"""The names of settings in Keras 1."""


def resize_config(
    config: Mapping[str, Any], builder: GraphBuilder, after: PrunedShapes, left: Shapes
) -> dict[str, Any]:
    """The configuration of the smaller network; `left` are the new shapes of changed weights."""
    resized: dict[str, Any] = copy.deepcopy(dict(config))
    for layer_call in builder.called:
        layer = get_at(resized, layer_call.path)
        _resize(layer, get_at(config, layer_call.path)["config"], layer_call, after, left)
        update_build_config(layer, layer_call, after)
        for key in _SHAPE_KEYS:
            for shape in shapes_in(object_in(layer, "config").get(key)):
                update_shape(shape, layer_call.inputs[0] if layer_call.inputs else "", after)
    values: dict[ConfigPath, dict[tuple[str, int, int], str]] = {}
    for (path, name, node, tensor), value in builder.references.items():
        if after.has_changed(value):
            values.setdefault(path, {})[name, node, tensor] = value
    for path, changed in values.items():
        for layer in get_at(resized, path)["config"]["layers"]:
            update_tensors(layer.get("inbound_nodes"), changed, after)
    return resized


def _resize(
    layer: dict[str, Any], original: Mapping[str, Any], layer_call: CalledLayer, after: PrunedShapes, left: Shapes
) -> None:
    rule = rule_for(layer, upgrade_class_name(string_in(layer, "class_name")))
    if rule is None:
        return
    settings = layer["config"]
    shapes = {leaf: left.get(tensor.name, tensor.shape) for leaf, tensor in layer_call.weights.items()}
    resize = LayerResize(layer_call, settings, original, shapes, after)
    for key, leaf, axis in rule.lengths:
        if resize.has_changed(leaf):
            settings[key if key in settings else _KERAS1_NAMES.get(key, key)] = shapes[leaf][axis]
    if rule.resize is not None:
        rule.resize(resize)
    update_qkv(settings, layer_call, after)


_STATISTICS = frozenset({"moving_mean", "moving_variance"})


def match_slots(loaded: LoadedKeras) -> Mapping[str, str] | None:
    """The weight that each slot of the optimizer belongs to; None if the match is not certain."""
    slots = [tensor for tensor in loaded.model.tensors if _is_slot(loaded, tensor)]
    weights = list(_trained(loaded))
    return {} if not slots else _slots_by_name(slots, weights) or _slots_by_position(loaded, slots, weights)


def _is_slot(loaded: LoadedKeras, tensor: Tensor) -> bool:
    path = loaded.stored.path(tensor)
    return tensor.role is Role.OPTIMIZER and "optimizer" in path.partition("/")[0] and bool(tensor.shape)


def _trained(loaded: LoadedKeras) -> Iterator[Tensor]:
    """Yield the trainable weights, in the order of the layers."""
    weights_by_layer = {layer_call.path: layer_call.weights for layer_call in loaded.builder.called}
    for layer in loaded.layers:
        if object_in(layer.layer, "config").get("trainable") is not False:
            for leaf, tensor in weights_by_layer.get(layer.path, {}).items():
                if leaf not in _STATISTICS:
                    yield tensor


def _slots_by_name(slots: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, str] | None:
    """Match slots whose names contain those of weights: `Adam/m/a/kernel`, `adam/a_kernel_momentum`."""
    named = {re.sub(r":\d+$", "", tensor.name): tensor for tensor in weights}
    owners = {}
    for slot in slots:
        path = f"/{re.sub(r':[0-9]+$', '', slot.name)}/"
        candidates = [
            name
            for name, tensor in named.items()
            if (f"/{name}/" in path or f"/{name.replace('/', '_')}_" in path) and tensor.shape == slot.shape
        ]
        longest = [name for name in candidates if len(name) == max(map(len, candidates))]
        if len(longest) != 1:
            return None
        owners[slot.name] = named[longest[0]].name
    return owners


def _slots_by_position(
    loaded: LoadedKeras, slots: Sequence[Tensor], weights: Sequence[Tensor]
) -> dict[str, str] | None:
    """Match numbered slots: all slots of a weight follow each other, or all slots of a kind; None if ambiguous."""
    ordered = sorted(slots, key=lambda tensor: _natural(loaded.stored.path(tensor)))
    times, rest = divmod(len(ordered), len(weights)) if weights else (0, 1)
    if rest:
        return None
    orders = ([weight for weight in weights for _ in range(times)], [*weights] * times)
    fitting = [order for order in orders if [item.shape for item in order] == [slot.shape for slot in ordered]]
    pairings = [{slot.name: weight.name for slot, weight in zip(ordered, order, strict=True)} for order in fitting]
    return pairings[0] if pairings and all(item == pairings[0] for item in pairings) else None


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(step), "") if step.isdecimal() else (0, step) for step in re.split(r"(\d+)", path)]


def update_build_config(layer: dict[str, Any], layer_call: CalledLayer, after: PrunedShapes) -> None:
    """Update the input shapes in the `build_config` of a layer, which are in the order of its inputs or have names."""
    build_config = layer.get("build_config")
    shapes_by_name = object_in(build_config, "shapes_dict")
    if update_qkv(shapes_by_name, layer_call, after):
        return
    values = iter(layer_call.inputs)
    for shape in shapes_in(build_config):
        update_shape(shape, next(values, ""), after)


def update_qkv(shapes_by_name: Mapping[str, Any], layer_call: CalledLayer, after: PrunedShapes) -> bool:
    """Update the shapes of query, value and key; False if there are none."""
    if "query_shape" not in shapes_by_name:
        return False
    inputs = (*layer_call.inputs, layer_call.inputs[-1])[:3]
    for name, value in zip(("query", "value", "key"), inputs, strict=False):
        for shape in shapes_in(shapes_by_name.get(f"{name}_shape")):
            update_shape(shape, value, after)
    return True


def shapes_in(value: Any) -> Iterator[list[Any]]:
    """Yield the shapes in a nested configuration value, in order."""
    unwrapped = untuple(value)
    if isinstance(unwrapped, list):
        if unwrapped and all(length is None or type(length) is int for length in unwrapped):
            yield unwrapped
        else:
            for item in unwrapped:
                yield from shapes_in(item)
    elif isinstance(unwrapped, dict):
        for item in unwrapped.values():
            yield from shapes_in(item)


def update_shape(shape: list[Any], value: str, after: PrunedShapes) -> None:
    """Update a shape in a configuration, in place, to the new shape of a value; open axes stay open."""
    if not after.has_changed(value):
        return
    old, new = after.trace.shape(value), after.shape(value)
    if len(shape) != len(old):
        return
    for axis, pair in enumerate(zip(old, new, strict=True)):
        if pair[0] != pair[1] and shape[axis] is not None:
            shape[axis] = pair[1]


def update_tensors(nodes: Any, values: Mapping[tuple[str, int, int], str], after: PrunedShapes) -> None:
    """Update the shapes that Keras 3 writes beside references to values, which are (layer, call, output)."""
    if isinstance(nodes, list):
        for node in nodes:
            update_tensors(node, values, after)
    elif isinstance(nodes, dict):
        config = object_in(nodes, "config")
        history, shape = config.get("keras_history"), config.get("shape")
        if isinstance(history, list) and isinstance(shape, list):
            update_shape(shape, values.get(tuple(history), ""), after)
        else:
            for node in nodes.values():
                update_tensors(node, values, after)
