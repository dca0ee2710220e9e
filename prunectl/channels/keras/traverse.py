"""Traversal of a Keras configuration: each layer call, also in nested models, becomes operations of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunectl.channels.graph import ChannelGraph, OpKind, Shape, Shapes
from prunectl.channels.keras.builder import CalledLayer, GraphBuilder, LayerContext, with_batch
from prunectl.channels.keras.layer_rules import FUNCTION, RULES, query_value_key_first, rule_for
from prunectl.channels.keras.layers import has_lists, keyword_arguments
from prunectl.channels.keras.weights import (
    ROOT,
    ConfigPath,
    LayerLocation,
    LayerWeights,
    WeightFile,
    bind_weights,
    expected_weights,
    is_operation,
    located,
)
from prunectl.channels.lengths import TRIED_LENGTHS, UNKNOWN_LENGTHS, AxisLengths
from prunectl.errors import InputError
from prunectl.formats import budgets, pure_names
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.config import (
    NodeCall,
    TensorRef,
    layer_entries,
    model_ends,
    name_of,
    object_in,
    shape_in,
    string_in,
    untuple,
    upgrade_class_name,
    upgrade_config,
)
from prunectl.formats.keras.flops import (
    SHAPE_KEYS,
    NodeResolver,
    ShapeTracer,
    input_shape,
    matmuls,
    sequences,
    topological_order,
)
from prunectl.formats.keras.flops.shapes import LayerCall, UnknownShapeError
from prunectl.formats.keras.numbering import ambiguous_containers, layers_by_folder
from prunectl.training.backend import ModelSignature, TensorSpec

_FUNCTIONS = frozenset({"TFOpLambda", "TensorFlowOpLayer"})
_MASK = "mask"
_DEFAULT_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Facts about a layer call besides its input values."""

    raw: Any = ()
    """The entry of `inbound_nodes` in the configuration."""
    keywords: tuple[str, ...] = ()
    """The names of the keyword arguments, which are the last inputs."""
    outputs: int = 1
    """The number of outputs that the call must have, as other layers read them."""


class GraphTraversal:
    """The traversal of a model: symbolic calls of its layers on named values."""

    def __init__(
        self,
        builder: GraphBuilder,
        tracer: ShapeTracer,
        layers: Sequence[LayerLocation],
        weights: Mapping[ConfigPath, LayerWeights],
        length: int,
        *,
        shapes: Shapes,
    ) -> None:
        self._builder, self._tracer = builder, tracer
        self._located = {id(layer.layer): layer for layer in layers}
        self._weights = weights
        self._length = length
        """The assumed length of open axes."""
        self._shapes = shapes
        """The shapes of inputs, without the batch axis, that the user or the data gave."""
        self.open_axes: dict[str, tuple[int | None, ...]] = {}
        """The shapes of inputs with open axes, without the batch axis, as the file has them."""
        self._guessed: set[str] = set()
        """Values with guessed shapes, which the file has not confirmed."""

    def model(self, model: Mapping[str, Any], inputs: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
        """The outputs of a model on some inputs; without inputs, on those of its configuration."""
        if len(names) > budgets.MAX_KERAS_DEPTH:
            raise InputError(f"models are nested more than {budgets.MAX_KERAS_DEPTH} deep")
        is_graph = any(layer.get("inbound_nodes") for layer in self._tracer.inner_layers(model))
        return self._graph(model, inputs, names) if is_graph else self._sequence(model, inputs, names)

    def _sequence(self, model: Mapping[str, Any], inputs: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
        layers = self._tracer.inner_layers(model)
        self._tracer.spend(len(layers))
        current = inputs or (self._first(model, layers, names),)
        for layer in layers:
            if layer.get("class_name") == "InputLayer":
                self._record_call(layer, names, current, current)
            else:
                # Keras 3 writes the shape that each layer was built for.
                self._confirm(current[0], shape_in(object_in(layer, "build_config").get("input_shape")))
                current = self._call(layer, current, names)
        return current

    def _first(self, model: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> str:
        shape = input_shape(self._tracer, model, layers)
        if shape is None:
            raise InputError(
                "the configuration does not give the shape of its input",
                hint="load it in Keras, call build() and save it again",
            )
        first = layers[0] if layers else model
        name = name_of(first) if first.get("class_name") == "InputLayer" else f"{name_of(first)}_input"
        return self._input("/".join((*names, name)), shape, first)

    def _input(self, name: str, shape: Sequence[int | None], layer: Mapping[str, Any]) -> str:
        lengths = self._shapes.get(name) or tuple(self._length if length is None else length for length in shape)
        value = self._builder.fresh(name, (1, *lengths))
        if None in shape:
            self.open_axes[value] = tuple(shape)
        dtype = object_in(layer, "config").get("dtype")
        self._builder.inputs[value] = dtype if isinstance(dtype, str) else _DEFAULT_DTYPE
        return value

    def _graph(self, model: Mapping[str, Any], inputs: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
        calls = {(call.layer, call.node): call for call in self._tracer.inner_calls(model)}
        resolve = NodeResolver(calls)
        outer_inputs = dict(zip((source.layer for source in model_ends(model, "input_layers")), inputs, strict=False))
        outputs_of: dict[tuple[str, int], tuple[str, ...]] = {}
        outputs_needed: dict[tuple[str, int], int] = {}
        for source in (*(ref for call in calls.values() for ref in call.sources), *model_ends(model, "output_layers")):
            outputs_needed[resolve.key(source)] = max(outputs_needed.get(resolve.key(source), 1), source.tensor + 1)
        path = self._path_of(model)

        def value(source: TensorRef) -> str:
            outputs = outputs_of.get(resolve.key(source), ())
            if source.tensor >= len(outputs):
                raise InputError(f"the configuration refers to an output of {source.layer} that does not exist")
            name = outputs[source.tensor]
            self._builder.references[path, source.layer, source.node, source.tensor] = name
            # Keras 3 writes the shape of each referenced value, even of the outputs of layers that are unknown here.
            self._confirm(name, source.shape)
            return name

        for call in topological_order(calls, resolve):
            if call.description.get("class_name") == "InputLayer":
                graph_input = outer_inputs.get(call.layer) or self._own_input(call, names)
                self._record_call(call.description, names, (graph_input,), (graph_input,))
                outputs_of[call.layer, call.node] = (graph_input,)
                continue
            values = tuple(value(source) for source in call.sources)
            if len(values) == 1:
                # Archives of Keras 2 give only the shape that each layer was built for.
                self._confirm(values[0], shape_in(object_in(call.description, "build_config").get("input_shape")))
            nodes = call.description.get("inbound_nodes")
            arguments = CallArguments(
                raw=nodes[call.node] if isinstance(nodes, list) and call.node < len(nodes) else (),
                keywords=tuple(keyword for keyword, _ in call.named),
                outputs=outputs_needed.get((call.layer, call.node), 1),
            )
            outputs_of[call.layer, call.node] = self._call(call.description, values, names, arguments)
        if not names:
            first = [outputs_of[resolve.key(source)][0] for source in model_ends(model, "input_layers")]
            self._builder.inputs = {
                graph_input: self._builder.inputs[graph_input] for graph_input in (*first, *self._builder.inputs)
            }
        return tuple(value(source) for source in model_ends(model, "output_layers"))

    def _confirm(self, value: str, shape: Sequence[int | None] | None) -> None:
        """Use the shape that the file gives for a value whose shape is unknown or guessed."""
        if shape is not None and None not in shape and (value not in self._builder.shapes or value in self._guessed):
            self._guessed.discard(value)
            self._builder.shapes[value] = with_batch(shape, 1)

    def _own_input(self, call: NodeCall, names: tuple[str, ...]) -> str:
        config = object_in(call.description, "config")
        shape = next((shape for key in SHAPE_KEYS if (shape := shape_in(config.get(key))) is not None), None)
        if shape is None:
            raise InputError(f"the configuration does not give the shape of its input {call.layer}")
        return self._input("/".join((*names, call.layer)), shape, call.description)

    def _call(
        self,
        layer: Mapping[str, Any],
        inputs: tuple[str, ...],
        names: tuple[str, ...],
        arguments: CallArguments | None = None,
    ) -> tuple[str, ...]:
        arguments = arguments or CallArguments()
        self._tracer.spend(1 + len(inputs))
        inner_names = (*names, name_of(layer))
        inputs, keywords = self._without_mask(inputs, arguments.keywords, inner_names)
        if string_in(layer, "class_name") == "MultiHeadAttention":
            inputs, keywords = query_value_key_first(inputs, keywords)
        if self._tracer.inner_layers(layer) and not keywords:
            outputs = self.model(layer, inputs, inner_names)
        elif string_in(layer, "class_name") == "TimeDistributed" and not keywords and len(inputs) == 1:
            outputs = self._time_distributed(layer, inputs[0], inner_names)
        else:
            outputs = self._layer(layer, inputs, inner_names, replace(arguments, keywords=keywords))
        self._record_call(layer, inner_names, inputs, outputs)
        return outputs

    def _without_mask(
        self, inputs: tuple[str, ...], keywords: tuple[str, ...], names: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The inputs and keywords without a mask of time steps; channels that a mask is computed from are locked."""
        count = len(inputs) - len(keywords)
        named = list(zip(keywords, inputs[count:], strict=True))
        masks = [value for keyword, value in named if keyword == _MASK]
        if masks:
            self._builder.add("/".join(names), "mask of", OpKind.UNKNOWN, masks, ())
        remaining = [pair for pair in named if pair[0] != _MASK]
        return (*inputs[:count], *(value for _, value in remaining)), tuple(keyword for keyword, _ in remaining)

    def _time_distributed(self, layer: Mapping[str, Any], value: str, names: tuple[str, ...]) -> tuple[str, ...]:
        """Call a layer on all time steps at once, with the steps on the batch axis."""
        shape = self._builder.shapes.get(value)
        inner_layer = object_in(object_in(layer, "config"), "layer")
        if shape is None or len(shape) < 3:
            return self._unknown(layer, (value,), names, (None,))
        name = "/".join(names)
        (steps,) = self._builder.add(
            name, "TimeDistributed", OpKind.RESHAPE, (value,), ((shape[0] * shape[1], *shape[2:]),)
        )
        outputs = self._call(inner_layer, (steps,), names)
        restored: list[str] = []
        for output in outputs:
            step_shape = self._builder.shapes.get(output)
            if step_shape is None or step_shape[0] != shape[0] * shape[1]:
                return self._unknown(layer, outputs, names, tuple(None for _ in outputs))
            restored += self._builder.add(
                name, "TimeDistributed", OpKind.RESHAPE, (output,), ((*shape[:2], *step_shape[1:]),)
            )
        return tuple(restored)

    def _layer(
        self,
        layer: Mapping[str, Any],
        inputs: tuple[str, ...],
        names: tuple[str, ...],
        arguments: CallArguments,
    ) -> tuple[str, ...]:
        layer_call, is_function = self._layer_call(layer, inputs, arguments)
        rule = RULES[FUNCTION] if is_function else rule_for(layer, layer_call.kind)
        path = self._path_of(layer)
        call = LayerContext(self._builder, names, layer_call, inputs, self._weights.get(path, {}), arguments.keywords)
        if rule is not None and (is_function or rule.keywords.issuperset(arguments.keywords)):
            try:
                with self._builder.rollback():
                    start = len(self._builder.nodes)
                    result = rule.lower(call)
                    first, *others = _at_least(result, arguments.outputs)
                    if layer_call.kind == "Bidirectional":
                        self._record_directions(layer, names, inputs, first)
                    return (self._builder.rename_output(first, call.name, start), *others)
            except (UnknownShapeError, LookupError):
                pass
        output_shape = matmuls.output(layer_call)
        if output_shape is not None and layer_call.kind == "TextVectorization":
            output_shape = tuple(self._length if length is None else length for length in output_shape)
        is_users_own = rule is None and (">" in layer_call.kind or layer_call.kind not in pure_names.CLASSES)
        is_guess = is_users_own and output_shape is None
        if is_guess:
            output_shape = _guessed_shape(layer_call)
        is_recurrent = sequences.is_recurrent(layer_call.kind)
        shapes = sequences.outputs(layer_call, output_shape) if is_recurrent else (output_shape,)
        shapes += (None,) * (arguments.outputs - len(shapes))
        outputs = self._unknown(layer, inputs, names, tuple(self._with_batch(shape, inputs) for shape in shapes))
        self._guessed.update(outputs if is_guess else ())
        return outputs

    def _layer_call(
        self, layer: Mapping[str, Any], inputs: tuple[str, ...], arguments: CallArguments
    ) -> tuple[LayerCall, bool]:
        """A layer call with class and settings as in Keras 2, and whether it is a function, not a layer."""
        kind = upgrade_class_name(string_in(layer, "class_name"))
        config = object_in(layer, "config")
        known_shapes = [self._builder.shapes.get(value) for value in inputs]
        shapes = tuple(None if shape is None else shape[1:] for shape in known_shapes)
        count = len(shapes) - len(arguments.keywords)
        keywords = dict(zip(arguments.keywords, shapes[count:], strict=True))
        if is_operation(layer) or kind in _FUNCTIONS:
            function = string_in(config, "function") or string_in(object_in(config, "node_def"), "op") or kind
            settings = {**config, **keyword_arguments(arguments.raw)}
            facts = {key: settings.get(key) for key in ("axis", "keepdims", "initial")}
            facts |= {"function": function, "has_lists": has_lists(arguments.raw) or has_lists(config.get("constants"))}
            return LayerCall(function if kind in _FUNCTIONS else kind, facts, shapes[:count], keywords), True
        return LayerCall(kind, upgrade_config(kind, config), shapes[:count], keywords), False

    def _unknown(
        self,
        layer: Mapping[str, Any],
        inputs: tuple[str, ...],
        names: tuple[str, ...],
        shapes: tuple[Shape | None, ...],
    ) -> tuple[str, ...]:
        # If another call of the layer is known, its weights are locked, as this call uses them in an unknown way.
        self._builder.uses.update(tensor.name for tensor in self._weights.get(self._path_of(layer), {}).values())
        kind = upgrade_class_name(string_in(layer, "class_name"))
        return self._builder.add("/".join(names), kind.rpartition(">")[2], OpKind.UNKNOWN, inputs, shapes)

    def _record_call(
        self, layer: Mapping[str, Any], names: tuple[str, ...], inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        path = self._path_of(layer)
        self._builder.called.append(CalledLayer(path, names, inputs, outputs, self._weights.get(path, {})))

    def _record_directions(
        self, layer: Mapping[str, Any], names: tuple[str, ...], inputs: tuple[str, ...], output: str
    ) -> None:
        """Record the calls of the layers of both directions; each takes half of the initial states."""
        half = len(inputs) // 2
        for key, states in (("layer", inputs[1 : 1 + half]), ("backward_layer", inputs[1 + half :])):
            inner_layer = object_in(object_in(layer, "config"), key)
            if inner_layer:
                path = (*self._path_of(layer), "config", key)
                self._builder.called.append(
                    CalledLayer(path, (*names, name_of(inner_layer)), (inputs[0], *states), (output,))
                )

    def _path_of(self, layer: Mapping[str, Any]) -> ConfigPath:
        location = self._located.get(id(layer))
        return ROOT if location is None else location.path

    def _with_batch(self, shape: Sequence[int | None] | None, inputs: tuple[str, ...]) -> Shape | None:
        batch = self._builder.shapes.get(inputs[0], (1,))[0] if inputs else 1
        try:
            return None if shape is None else with_batch(shape, batch)
        except UnknownShapeError:
            return None


def _guessed_shape(call: LayerCall) -> tuple[int | None, ...] | None:
    """The output shape in the settings of a Lambda or the user's own layer, else its input's, as most only scale.

    Such a layer is unknown and locks the channels that it reads; only the layers after it need a shape. A wrong shape
    does not fit the weights of the next layer, which is locked then, or it is found by the equivalence check.
    """
    output_shape = untuple(call.config.get("output_shape"))
    shape = shape_in([None, *output_shape]) if isinstance(output_shape, list) else None
    result = call.inputs[0] if shape is None and len(call.inputs) == 1 else shape
    return None if result is None else tuple(result)


def _at_least(result: str | tuple[str, ...], count: int) -> tuple[str, ...]:
    """The outputs of a layer; UnknownShapeError if other layers read more outputs than these."""
    outputs = (result,) if isinstance(result, str) else result
    if len(outputs) < count:
        raise UnknownShapeError
    return outputs


@dataclass(frozen=True, slots=True)
class LoadedKeras:
    """A Keras file, with its configuration as a graph."""

    model: ModelFile
    stored: WeightFile
    config: Mapping[str, Any]
    layers: tuple[LayerLocation, ...]
    builder: GraphBuilder
    graph: ChannelGraph
    guessed_length: int = 0
    """The assumed length of open axes, if some operations are unknown with it; 0 if none are, or it was given."""


def load_keras(model: ModelFile, lengths: AxisLengths = UNKNOWN_LENGTHS) -> LoadedKeras:
    """Read the configuration of a Keras file as a graph."""
    config = model.about.keras
    if config is None:
        raise InputError(
            f"{model.path} holds only weights, not the layers that use them",
            hint="save the whole model, as .keras or .h5",
        )
    if not layer_entries(config):
        raise InputError(
            f"{model.path} holds a subclassed model, whose configuration lists no layers",
            hint="build it from layers with keras.Model(inputs, outputs), or export it to ONNX",
        )
    stored = WeightFile(model)
    slots = layers_by_folder(config, stored.contents.datasets)
    layers = located(config, slots)
    if stored.root is None and any(expected_weights(layer.layer) and not layer.slots for layer in layers):
        if ambiguous_containers(config, slots, [dataset.name for dataset in stored.contents.datasets]):
            raise InputError(
                f"the weights of {stored.model.path} do not match the layers of its configuration in number and shape",
                hint="load it in the Keras version that wrote it, save it again, and prune that file",
            )
    weights = bind_weights(stored, layers)

    def traverse(length: int, shapes: Shapes) -> _Traversal:
        builder = GraphBuilder(model)
        walker = GraphTraversal(builder, ShapeTracer(model.path, ()), layers, weights, length, shapes=shapes)
        try:
            outputs = walker.model(config, (), ())
        except InputError as error:
            raise InputError(f"{model.path}: {error.message}", hint=error.hint) from error
        unknown = sum(node.kind is OpKind.UNKNOWN for node in builder.nodes)
        return _Traversal(unknown, builder, outputs, walker.open_axes, length)

    traversals = [traverse(TRIED_LENGTHS[0], {})]
    known_lengths = lengths.resolve(_signature(traversals[0]))
    if known_lengths and traversals[0].open_axes:
        traversals = [traverse(TRIED_LENGTHS[0], known_lengths)]
    elif traversals[0].open_axes:
        traversals += [traverse(length, {}) for length in TRIED_LENGTHS[1:]]
    best = min(traversals, key=lambda traversal: traversal.unknown)
    guessed = best.length if best.open_axes and best.unknown and not known_lengths else 0
    return LoadedKeras(model, stored, config, layers, best.builder, best.builder.graph(best.outputs), guessed)


@dataclass(frozen=True, slots=True)
class _Traversal:
    """The result of a traversal with an assumed length of open axes."""

    unknown: int
    """The number of unknown operations."""
    builder: GraphBuilder
    outputs: tuple[str, ...]
    open_axes: Mapping[str, tuple[int | None, ...]]
    """The shapes of inputs with open axes, without the batch axis, as the file has them."""
    length: int


def _signature(traversal: _Traversal) -> ModelSignature:
    shapes = {
        name: traversal.open_axes.get(name, traversal.builder.shapes[name][1:]) for name in traversal.builder.inputs
    }
    ports = tuple(TensorSpec(name, shapes[name], dtype) for name, dtype in traversal.builder.inputs.items())
    return ModelSignature(ports, (), is_channels_first=False)
