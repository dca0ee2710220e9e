"""How much a Keras model calculates: the multiply-accumulates of each layer, for one input."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, Operation, Shape
from prunectl.formats.keras.config import listed, part
from prunectl.formats.keras.flops.layer_calls import CallContext, Shapes, ShapeTracer
from prunectl.formats.keras.flops.shapes import shape_in, shapes_in
from prunectl.formats.keras.inbound import NodeCall, TensorRef, model_ends

_NOWHERE = CallContext()
SHAPE_KEYS = ("batch_input_shape", "batch_shape")


def trace_model(caller: ShapeTracer, found: Mapping[str, Any], inputs: Shapes, scope: CallContext = _NOWHERE) -> Shapes:
    """Return the shapes of a model's outputs, and note what its layers multiply."""
    is_graph = any(layer.get("inbound_nodes") for layer in caller.layers_in(found))
    return _graph(caller, found, inputs, scope) if is_graph else _sequence(caller, found, inputs, scope)


def _sequence(caller: ShapeTracer, found: Mapping[str, Any], inputs: Shapes, scope: CallContext) -> Shapes:
    layers = caller.layers_in(found)
    caller.charge(len(layers))
    current = inputs if inputs and inputs[0] is not None else (input_shape(caller, found, layers),)
    for layer in layers:
        if layer.get("class_name") != "InputLayer":
            current = caller.call(layer, current, {}, scope)
    return current


def input_shape(caller: ShapeTracer, found: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Shape | None:
    """Return the shape of what a model takes, wherever it says so."""
    config = part(layers[0], "config") if layers else {}
    said = [config.get(key) for key in SHAPE_KEYS]
    # Of nested models the first layer knows.
    inner = caller.layers_in(layers[0]) if layers else ()
    said += [part(inner[0], "config").get(key) for key in SHAPE_KEYS] if inner else []
    said += [part(found, "config").get("build_input_shape"), part(found, "build_config").get("input_shape")]
    width = config.get("input_dim")
    if type(width) is int and layers[0].get("class_name") != "Embedding":
        said.append([None, width])
    return next((shape for shape in map(shape_in, said) if shape is not None), None)


def _graph(caller: ShapeTracer, found: Mapping[str, Any], inputs: Shapes, scope: CallContext) -> Shapes:
    every = {(call.layer, call.node): call for call in caller.calls_in(found)}
    resolve = NodeResolver(every)
    given = dict(zip((source.layer for source in model_ends(found, "input_layers")), inputs, strict=False))
    made: dict[tuple[str, int], Shapes] = {}
    for call in topological_order(every, resolve):
        if call.found.get("class_name") == "InputLayer":
            config = part(call.found, "config")
            own = next((shape for key in SHAPE_KEYS for shape in shapes_in(config.get(key)) if shape is not None), None)
            shape = given.get(call.layer)
            made[call.layer, call.node] = (own if shape is None else shape,)
            continue
        arguments = tuple(_shape(source, made, resolve) for source in call.arguments)
        keywords = {key: _shape(source, made, resolve) for key, source in call.keywords.items()}
        made[call.layer, call.node] = caller.call(call.found, arguments, keywords, scope)
    return tuple(_shape(source, made, resolve) for source in model_ends(found, "output_layers"))


def _shape(source: TensorRef, made: Mapping[tuple[str, int], Shapes], resolve: NodeResolver) -> Shape | None:
    outputs = made.get(resolve.key(source), ())
    found = outputs[source.tensor] if source.tensor < len(outputs) else None
    return source.shape if found is None else found


class NodeResolver:
    """Finds the call that a source means."""

    def __init__(self, every: Mapping[tuple[str, int], NodeCall]) -> None:
        self._every = every
        last: defaultdict[str, int] = defaultdict(int)
        asked: defaultdict[str, int] = defaultdict(int)
        for call in every.values():
            last[call.layer] = max(last[call.layer], call.node)
            for source in call.sources:
                asked[source.layer] = max(asked[source.layer], source.node)
        # Keras 2 counts the calls of a nested model from 1: its own building was the first.
        self._shift = {layer: max(asked[layer] - node, 0) for layer, node in last.items()}

    def key(self, source: TensorRef) -> tuple[str, int]:
        """Return the layer and the number of the call."""
        found = (source.layer, source.node - self._shift.get(source.layer, 0))
        return found if found in self._every else (source.layer, 0)


def topological_order(every: Mapping[tuple[str, int], NodeCall], resolve: NodeResolver) -> list[NodeCall]:
    """Return the calls, each behind those whose outputs it takes; what goes in a circle comes last."""
    needed_by: defaultdict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    waiting: dict[tuple[str, int], int] = {}
    for key, call in every.items():
        needs = {resolve.key(source) for source in call.sources} & every.keys()
        waiting[key] = len(needs)
        for need in needs:
            needed_by[need].append(key)
    ready = [key for key in every if not waiting[key]][::-1]
    order = []
    while ready:
        key = ready.pop()
        order.append(key)
        for user in needed_by[key]:
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    done = set(order)
    return [every[key] for key in (*order, *(key for key in every if key not in done))]


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """Return the operations that multiply; a layer that is used twice counts twice."""
    return trace_shapes(model).operations


def trace_shapes(model: ModelFile) -> ShapeTracer:
    """Follow the shapes through a model, from its inputs to its outputs."""
    config: Mapping[str, Any] | None = model.about.keras
    if config is None or not listed(config):
        raise InputError(f"{model.path} holds weights, but no configuration to count operations in")
    caller = ShapeTracer(model.path, model.tensors, trace_model)
    trace_model(caller, config, ())
    return caller
