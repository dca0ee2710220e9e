"""Multiply-accumulates (MACs) of a Keras model for one input: shapes traced through its configuration, layer by layer.

Nothing is built or run. A tracer calls each layer of the configuration with the shapes of its inputs: rules for its
class give the output shape and the matrix products (`matmuls`), and the weights in the products are found by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import Length, ModelFile, Operation, Shape, Tensor, numel
from prunectl.formats.budgets import MAX_KERAS_CALLS, MAX_KERAS_DEPTH
from prunectl.formats.keras.config import (
    PRUNED_PREFIX,
    NodeCall,
    TensorRef,
    layer_entries,
    model_ends,
    name_of,
    object_in,
    object_name,
    parse_calls,
    shape_in,
    shapes_in,
    string_in,
    upgrade_class_name,
    upgrade_config,
)
from prunectl.formats.keras.flops import matmuls, sequences
from prunectl.formats.keras.flops.matmuls import Weights
from prunectl.formats.keras.flops.shapes import LayerCall, Matmul, UnknownShapeError

Shapes = tuple[Shape | None, ...]
SHAPE_KEYS = ("batch_input_shape", "batch_shape")
_TRANSPARENT = frozenset(
    {
        *("PruneLowMagnitude", "QuantizeWrapper", "QuantizeWrapperV2", "QuantizeAnnotate", "ClusterWeights"),
        *("SpectralNormalization", "WeightNormalization"),
    }
)
"""Wrappers that do not change the output shape of the layer inside."""
_OPERATIONS = frozenset({"Matmul", "Einsum", "Dot", "Tensordot", "Inner", "Outer", "Conv", "DotProductAttention"})
"""Functions of Keras 3 that multiply their inputs."""
_TENSORFLOW_OPERATIONS = frozenset(
    {"matmul", "einsum", "tensordot", "conv2d", "conv1d", "batchmatmulv2", "batchmatmul"}
)
"""Functions of TensorFlow that multiply their inputs."""


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """The operations that multiply; a layer that is used twice counts twice."""
    return trace_shapes(model).operations


def trace_shapes(model: ModelFile) -> ShapeTracer:
    """Trace the shapes through a model, from its inputs to its outputs."""
    config: Mapping[str, Any] | None = model.about.keras
    if config is None or not layer_entries(config):
        raise InputError(f"the operations of {model.path} cannot be counted: it holds weights but no configuration")
    tracer = ShapeTracer(model.path, model.tensors)
    tracer.trace_model(config, ())
    return tracer


@dataclass(frozen=True, slots=True)
class CallContext:
    """The models and wrappers around a layer."""

    models: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    times: Shape = ()
    """How many times each wrapper applies the layer that it wraps."""
    direction: int = 0
    """The direction in which a `Bidirectional` wrapper runs the layer: 0 forward, 1 backward."""
    depth: int = 0

    def inside_model(self, name: str) -> CallContext:
        """The context of the layers of a model."""
        return replace(self, models=(*self.models, *self.wrappers, name), wrappers=(), depth=self.depth + 1)

    def inside_wrapper(self, *names: str, times: tuple[Length, ...] = (), direction: int = 0) -> CallContext:
        """The context of the layer that a wrapper wraps."""
        return replace(
            self,
            wrappers=(*self.wrappers, *names),
            times=(*self.times, *times),
            direction=self.direction + direction,
            depth=self.depth + 1,
        )


_TOP_LEVEL = CallContext()


class ShapeTracer:
    """Calls models and their layers with shapes, and records their multiplications."""

    def __init__(self, path: Path, tensors: Iterable[Tensor]) -> None:
        self._path = path
        self._weights = Weights(tensors)
        self._operations: list[Operation] = []
        self._steps = 0
        self._settings: dict[int, Mapping[str, Any]] = {}
        self._layers: dict[int, tuple[Mapping[str, Any], ...]] = {}
        self._calls: dict[int, tuple[NodeCall, ...]] = {}
        self.shapes: dict[str, list[Shapes]] = {}
        """The output shapes of each layer, call by call; a layer of an inner model has the model's name in front."""

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The multiplications, in the order of the calls."""
        return tuple(self._operations)

    def spend(self, steps: int) -> None:
        """Count steps, and refuse a configuration whose nested models make it endless."""
        self._steps += steps
        if self._steps > MAX_KERAS_CALLS:
            raise InputError(
                f"{self._path} is refused: its configuration makes more than {MAX_KERAS_CALLS} layer calls"
            )

    def inner_layers(self, layer: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        """The layers of a model; empty for any other layer."""
        if id(layer) not in self._layers:
            self._layers[id(layer)] = layer_entries(layer)
        return self._layers[id(layer)]

    def inner_calls(self, model: Mapping[str, Any]) -> tuple[NodeCall, ...]:
        """Every call in a model, parsed once however often the model is called itself."""
        if id(model) not in self._calls:
            self._calls[id(model)] = parse_calls(model)
        self.spend(sum(1 + len(call.sources) for call in self._calls[id(model)]))
        return self._calls[id(model)]

    def trace_model(self, model: Mapping[str, Any], inputs: Shapes, context: CallContext = _TOP_LEVEL) -> Shapes:
        """The output shapes of a model; records the multiplications of its layers."""
        is_graph = any(layer.get("inbound_nodes") for layer in self.inner_layers(model))
        return self._graph(model, inputs, context) if is_graph else self._sequence(model, inputs, context)

    def _sequence(self, model: Mapping[str, Any], inputs: Shapes, context: CallContext) -> Shapes:
        layers = self.inner_layers(model)
        self.spend(len(layers))
        current = inputs if inputs and inputs[0] is not None else (input_shape(self, model, layers),)
        for layer in layers:
            if layer.get("class_name") != "InputLayer":
                current = self.call(layer, current, {}, context)
        return current

    def _graph(self, model: Mapping[str, Any], inputs: Shapes, context: CallContext) -> Shapes:
        calls = {(call.layer, call.node): call for call in self.inner_calls(model)}
        resolve = NodeResolver(calls)
        input_shapes = dict(zip((ref.layer for ref in model_ends(model, "input_layers")), inputs, strict=False))
        outputs: dict[tuple[str, int], Shapes] = {}

        def shape_of(ref: TensorRef) -> Shape | None:
            shapes = outputs.get(resolve.key(ref), ())
            shape = shapes[ref.tensor] if ref.tensor < len(shapes) else None
            return ref.shape if shape is None else shape

        for call in topological_order(calls, resolve):
            key = call.layer, call.node
            if call.description.get("class_name") == "InputLayer":
                config = object_in(call.description, "config")
                own = (shape for name in SHAPE_KEYS for shape in shapes_in(config.get(name)) if shape is not None)
                shape = input_shapes.get(call.layer)
                outputs[key] = (next(own, None) if shape is None else shape,)
                continue
            arguments = tuple(map(shape_of, call.arguments))
            keywords = {name: shape_of(ref) for name, ref in call.keywords.items()}
            outputs[key] = self.call(call.description, arguments, keywords, context)
        return tuple(map(shape_of, model_ends(model, "output_layers")))

    def call(
        self, layer: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], context: CallContext
    ) -> Shapes:
        """The output shapes of a layer."""
        self.spend(1 + len(inputs) + len(keywords))
        if context.depth > MAX_KERAS_DEPTH:
            raise InputError(f"{self._path} is refused: its models are nested more than {MAX_KERAS_DEPTH} deep")
        if not inputs or None in inputs:
            inputs = _filled(inputs, shapes_in(_build_shape(layer)))
        outputs = self._call(layer, inputs, keywords, context)
        name = name_of(layer).removeprefix(PRUNED_PREFIX)
        self.shapes.setdefault("/".join((*context.models, *context.wrappers, name)), []).append(outputs)
        return outputs

    def _call(
        self, layer: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], context: CallContext
    ) -> Shapes:
        name, kind, config = name_of(layer), string_in(layer, "class_name"), object_in(layer, "config")
        inner = object_in(config, "layer")
        if self.inner_layers(layer):
            return self.trace_model(layer, inputs, context.inside_model(name))
        if not inner:
            return self._plain(layer, inputs, keywords, context)
        if kind == "TimeDistributed":
            return self._time_distributed(inner, inputs, context, name)
        if kind == "Bidirectional":
            return self._bidirectional(config, inputs, context, name)
        if kind in _TRANSPARENT:
            return self.call(inner, inputs, keywords, context.inside_wrapper(name.removeprefix(PRUNED_PREFIX)))
        self._mark_uncounted(layer)
        return (None,)

    def _time_distributed(self, inner: Mapping[str, Any], inputs: Shapes, context: CallContext, name: str) -> Shapes:
        shape = inputs[0] if inputs else None
        time = shape[0] if shape else None
        inside = context.inside_wrapper(name, times=(time,))
        outputs = self.call(inner, (shape[1:] if shape else None,), {}, inside)
        return tuple(None if output is None else (time, *output) for output in outputs)

    def _bidirectional(self, config: Mapping[str, Any], inputs: Shapes, context: CallContext, name: str) -> Shapes:
        """Run a layer forward and backward; the configuration may describe the backward layer separately."""
        forward = object_in(config, "layer")
        backward = object_in(config, "backward_layer") or forward
        first = self.call(forward, inputs[:1], {}, context.inside_wrapper(name, "forward_layer"))
        second = self.call(backward, inputs[:1], {}, context.inside_wrapper(name, "backward_layer", direction=1))
        states = (*first[1:], *second[1:])
        if "merge_mode" in config and config["merge_mode"] is None:
            return (first[0], second[0], *states)
        return (sequences.bidirectional_output(first[0], LayerCall("Bidirectional", config, inputs)), *states)

    def _plain(
        self, layer: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], context: CallContext
    ) -> Shapes:
        kind = upgrade_class_name(string_in(layer, "class_name"))
        if id(layer) not in self._settings:
            self._settings[id(layer)] = upgrade_config(kind, object_in(layer, "config"))
        call = LayerCall(kind, self._settings[id(layer)], inputs, keywords)
        if ".ops." in string_in(layer, "module"):
            if kind in _OPERATIONS:
                self._mark_uncounted(layer)
            return (matmuls.output(call) if kind in {"Add", "Multiply", "Subtract"} else None,)
        if kind in {"TFOpLambda", "TensorFlowOpLayer"}:
            call = LayerCall(kind, {"function": _function(call.config)}, inputs, keywords)
            if call.word("function").rpartition(".")[2] in _TENSORFLOW_OPERATIONS:
                self._mark_uncounted(layer)
        elif matmuls.is_multiplying(kind):
            self._record(call, name_of(layer), context)
        elif kind not in matmuls.RULES and self._weights.owns((name_of(layer), *context.wrappers)):
            self._mark_uncounted(layer)
        output = matmuls.output(call)
        return sequences.outputs(call, output) if sequences.is_recurrent(kind) else (output,)

    def _record(self, call: LayerCall, name: str, context: CallContext) -> None:
        try:
            products = matmuls.matmuls(call)
        except UnknownShapeError:
            products = (Matmul("kernel", (None,), ()),)
        for product in products:
            weights = self._weights.of(_owner_names(name, context), context.models, product, context.direction)
            shape = weights[0].shape if len(weights) == 1 and None in product.shape else product.shape
            macs = numel((*shape, *product.times, *context.times))
            for weight in weights:
                share = None if macs is None else macs // len(weights)
                self._operations.append(Operation(name, call.kind, share, weight.name))
            if not weights:
                self._operations.append(Operation(name, call.kind, macs))

    def _mark_uncounted(self, layer: Mapping[str, Any]) -> None:
        self._operations.append(Operation(name_of(layer), string_in(layer, "class_name"), None))


def input_shape(tracer: ShapeTracer, model: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Shape | None:
    """The input shape of a model, from any of the places where a configuration may have it."""
    config = object_in(layers[0], "config") if layers else {}
    candidates = [config.get(key) for key in SHAPE_KEYS]
    # A nested model has its input shape in its own first layer.
    inner = tracer.inner_layers(layers[0]) if layers else ()
    candidates += [object_in(inner[0], "config").get(key) for key in SHAPE_KEYS] if inner else []
    candidates.append(object_in(model, "config").get("build_input_shape"))
    candidates.append(object_in(model, "build_config").get("input_shape"))
    width = config.get("input_dim")
    if type(width) is int and layers[0].get("class_name") != "Embedding":
        candidates.append([None, width])
    return next((shape for shape in map(shape_in, candidates) if shape is not None), None)


class NodeResolver:
    """Finds the call that a tensor reference refers to."""

    def __init__(self, calls: Mapping[tuple[str, int], NodeCall]) -> None:
        self._calls = calls
        last: defaultdict[str, int] = defaultdict(int)
        referenced: defaultdict[str, int] = defaultdict(int)
        for call in calls.values():
            last[call.layer] = max(last[call.layer], call.node)
            for ref in call.sources:
                referenced[ref.layer] = max(referenced[ref.layer], ref.node)
        # Keras 2 numbers the calls of a nested model from 1: number 0 was the call that built it.
        self._shift = {layer: max(referenced[layer] - node, 0) for layer, node in last.items()}

    def key(self, ref: TensorRef) -> tuple[str, int]:
        """The layer and the number of the call."""
        key = (ref.layer, ref.node - self._shift.get(ref.layer, 0))
        return key if key in self._calls else (ref.layer, 0)


def topological_order(calls: Mapping[tuple[str, int], NodeCall], resolve: NodeResolver) -> list[NodeCall]:
    """The calls in topological order (Kahn 1962), each after the calls whose outputs it takes; cycles come last."""
    users: defaultdict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    missing: dict[tuple[str, int], int] = {}
    for key, call in calls.items():
        needs = {resolve.key(ref) for ref in call.sources} & calls.keys()
        missing[key] = len(needs)
        for need in needs:
            users[need].append(key)
    ready = [key for key in calls if not missing[key]][::-1]
    order = []
    while ready:
        key = ready.pop()
        order.append(key)
        for user in users[key]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    done = set(order)
    return [calls[key] for key in (*order, *(key for key in calls if key not in done))]


def _owner_names(name: str, context: CallContext) -> tuple[str, ...]:
    """The names that a weight's name may contain: the layer's, with and without its direction, and its wrappers'."""
    direction = next((step.removesuffix("layer") for step in context.wrappers if step.endswith("ward_layer")), "")
    return (f"{direction}{name}", name, *context.wrappers) if direction else (name, *context.wrappers)


def _build_shape(layer: Mapping[str, Any]) -> Any:
    build = object_in(layer, "build_config")
    return build.get("input_shape") or build.get("shapes_dict")


def _filled(inputs: Shapes, built: Shapes) -> Shapes:
    """Input shapes; unknown ones are those that the layer was built with."""
    if not inputs:
        return built
    return tuple(built[index] if shape is None and index < len(built) else shape for index, shape in enumerate(inputs))


def _function(config: Mapping[str, Any]) -> str:
    """The function of TensorFlow that a layer stands for."""
    operation = string_in(object_in(config, "node_def"), "op")
    return string_in(config, "function") or operation or object_name(config.get("name"))
