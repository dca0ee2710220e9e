"""Shapes through a Keras model: one layer after another, or as its graph goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from prunectl.formats.keras.config import part
from prunectl.formats.keras.inbound import Call, Source, ends
from prunectl.formats.keras.layer_calls import Caller, Shapes
from prunectl.formats.keras.scope import Scope
from prunectl.formats.keras.shapes import shape_in, shapes_in
from prunectl.formats.lengths import Shape

_NOWHERE = Scope()
SHAPE_KEYS = ("batch_input_shape", "batch_shape")


def run(caller: Caller, found: Mapping[str, Any], inputs: Shapes, scope: Scope = _NOWHERE) -> Shapes:
    """Return the shapes of a model's outputs, and note what its layers multiply."""
    is_graph = any(layer.get("inbound_nodes") for layer in caller.layers_in(found))
    return _graph(caller, found, inputs, scope) if is_graph else _sequence(caller, found, inputs, scope)


def _sequence(caller: Caller, found: Mapping[str, Any], inputs: Shapes, scope: Scope) -> Shapes:
    layers = caller.layers_in(found)
    caller.charge(len(layers))
    current = inputs if inputs and inputs[0] is not None else (first_shape(caller, found, layers),)
    for layer in layers:
        if layer.get("class_name") != "InputLayer":
            current = caller.call(layer, current, {}, scope)
    return current


def first_shape(caller: Caller, found: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Shape | None:
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


def _graph(caller: Caller, found: Mapping[str, Any], inputs: Shapes, scope: Scope) -> Shapes:
    every = {(call.layer, call.node): call for call in caller.calls_in(found)}
    resolve = Resolver(every)
    given = dict(zip((source.layer for source in ends(found, "input_layers")), inputs, strict=False))
    made: dict[tuple[str, int], Shapes] = {}
    for call in ordered(every, resolve):
        if call.found.get("class_name") == "InputLayer":
            config = part(call.found, "config")
            own = next((shape for key in SHAPE_KEYS for shape in shapes_in(config.get(key)) if shape is not None), None)
            shape = given.get(call.layer)
            made[call.layer, call.node] = (own if shape is None else shape,)
            continue
        arguments = tuple(_shape(source, made, resolve) for source in call.arguments)
        keywords = {key: _shape(source, made, resolve) for key, source in call.keywords.items()}
        made[call.layer, call.node] = caller.call(call.found, arguments, keywords, scope)
    return tuple(_shape(source, made, resolve) for source in ends(found, "output_layers"))


def _shape(source: Source, made: Mapping[tuple[str, int], Shapes], resolve: Resolver) -> Shape | None:
    outputs = made.get(resolve.key(source), ())
    found = outputs[source.tensor] if source.tensor < len(outputs) else None
    return source.shape if found is None else found


class Resolver:
    """Finds the call that a source means."""

    def __init__(self, every: Mapping[tuple[str, int], Call]) -> None:
        self._every = every
        last: defaultdict[str, int] = defaultdict(int)
        asked: defaultdict[str, int] = defaultdict(int)
        for call in every.values():
            last[call.layer] = max(last[call.layer], call.node)
            for source in call.sources:
                asked[source.layer] = max(asked[source.layer], source.node)
        # Keras 2 counts the calls of a nested model from 1: its own building was the first.
        self._shift = {layer: max(asked[layer] - node, 0) for layer, node in last.items()}

    def key(self, source: Source) -> tuple[str, int]:
        """Return the layer and the number of the call."""
        found = (source.layer, source.node - self._shift.get(source.layer, 0))
        return found if found in self._every else (source.layer, 0)


def ordered(every: Mapping[tuple[str, int], Call], resolve: Resolver) -> list[Call]:
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
