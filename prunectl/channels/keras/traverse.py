"""Follows a Keras configuration call by call, models inside models too, and puts each into a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunectl.channels.graph import ChannelGraph, OpKind
from prunectl.channels.keras.builder import Called, CalledLayer, GraphBuilder, Shape, with_batch
from prunectl.channels.keras.layer_rules import FUNCTION, KINDS, WORDS, in_order, rule_for
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
from prunectl.channels.lengths import NOTHING, TRIED, Lengths
from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.config import LayerConfig, listed, part, text, upgrade_class_name, upgrade_config
from prunectl.formats.keras.flops import matmuls, recurrent
from prunectl.formats.keras.flops.shapes import LayerCall, UnknownShapeError, shape_in, untuple
from prunectl.formats.keras.flops.trace import SHAPE_KEYS, NodeResolver, ShapeTracer, input_shape, topological_order
from prunectl.formats.keras.inbound import NodeCall, TensorRef, model_ends, name_of
from prunectl.formats.keras.layouts import ambiguous_containers, layers_by_folder
from prunectl.training.backend import Port, Signature

_SCALAR = (int, float, str, bool, type(None))
_MAX_NESTING = 12


def has_lists(said: Any, nesting: int = 0) -> bool:
    """Whether an argument of a call is a list of numbers, which may have one for each channel."""
    if nesting > _MAX_NESTING:
        return True
    if isinstance(said, Mapping):
        if said.get("class_name") == "__keras_tensor__":
            return False
        return any(has_lists(one, nesting + 1) for one in said.values())
    if isinstance(said, list):
        if _is_reference(said):
            return any(has_lists(one, nesting + 1) for one in said[3:])
        numbers = [one for one in said if isinstance(one, int | float) and not isinstance(one, bool)]
        return len(numbers) > 1 or any(has_lists(one, nesting + 1) for one in said)
    return not isinstance(said, _SCALAR)


def _is_reference(said: list[Any]) -> bool:
    """Whether a list names a layer, a call and an output; Keras 2 marks constants in the same way."""
    return 3 <= len(said) <= 4 and isinstance(said[0], str) and type(said[1]) is int and not isinstance(said[2], list)


_FUNCTIONS = frozenset({"TFOpLambda", "TensorFlowOpLayer"})
_MAX_DEPTH = 40
_MASK = "mask"
_DEFAULT_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class CallArguments:
    """How a layer is called, besides what it is called with."""

    raw: Any = ()
    """As the configuration has it."""
    words: tuple[str, ...] = ()
    """The names of the last inputs."""
    outputs: int = 1
    """How many of its outputs are used, at least."""


class GraphTraversal:
    """Calls layers on values."""

    def __init__(
        self,
        net: GraphBuilder,
        caller: ShapeTracer,
        layers: Sequence[LayerLocation],
        leaves: Mapping[ConfigPath, LayerWeights],
        length: int,
        *,
        said: Mapping[str, Shape],
    ) -> None:
        self._net, self._caller = net, caller
        self._located = {id(one.found): one for one in layers}
        self._leaves = leaves
        self._length = length
        """What open axes are taken to be long."""
        self._shapes = said
        """The shapes of inputs, without the batch, where they are said."""
        self.open: dict[str, tuple[int | None, ...]] = {}
        """Inputs that have some."""
        self._guessed: set[str] = set()
        """Values whose shapes nothing in the file has confirmed."""

    def model(self, found: Mapping[str, Any], inputs: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
        """Return what a model gives; without inputs, it has its own."""
        if len(names) > _MAX_DEPTH:
            raise InputError(f"a model is nested deeper than {_MAX_DEPTH} models")
        is_graph = any(layer.get("inbound_nodes") for layer in self._caller.inner_layers(found))
        return self._graph(found, inputs, names) if is_graph else self._sequence(found, inputs, names)

    def _sequence(self, found: Mapping[str, Any], inputs: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
        layers = self._caller.inner_layers(found)
        self._caller.spend(len(layers))
        current = inputs or (self._first(found, layers, names),)
        for layer in layers:
            if layer.get("class_name") == "InputLayer":
                self._meet(layer, names, current, current)
            else:
                # Keras 3 says of each layer what it was built for.
                self._confirm(current[0], shape_in(part(layer, "build_config").get("input_shape")))
                current = self._call(layer, current, names)
        return current

    def _first(self, found: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> str:
        shape = input_shape(self._caller, found, layers)
        if shape is None:
            raise InputError(
                "the configuration does not say the shape of its input",
                hint="load it in Keras, call build() and save it again",
            )
        first = layers[0] if layers else found
        name = name_of(first) if first.get("class_name") == "InputLayer" else f"{name_of(first)}_input"
        return self._input("/".join((*names, name)), shape, first)

    def _input(self, name: str, shape: Sequence[int | None], found: Mapping[str, Any]) -> str:
        own = self._shapes.get(name) or tuple(self._length if length is None else length for length in shape)
        value = self._net.fresh(name, (1, *own))
        if None in shape:
            self.open[value] = tuple(shape)
        said = part(found, "config").get("dtype")
        self._net.inputs[value] = said if isinstance(said, str) else _DEFAULT_DTYPE
        return value

    def _graph(self, model: Mapping[str, Any], inputs: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
        every = {(call.layer, call.node): call for call in self._caller.inner_calls(model)}
        resolve = NodeResolver(every)
        given = dict(zip((source.layer for source in model_ends(model, "input_layers")), inputs, strict=False))
        made: dict[tuple[str, int], tuple[str, ...]] = {}
        asked: dict[tuple[str, int], int] = {}
        for source in (*(one for call in every.values() for one in call.sources), *model_ends(model, "output_layers")):
            asked[resolve.key(source)] = max(asked.get(resolve.key(source), 1), source.tensor + 1)
        spot = self._spot(model)

        def value(source: TensorRef) -> str:
            outputs = made.get(resolve.key(source), ())
            if source.tensor >= len(outputs):
                raise InputError(f"the configuration refers to {source.layer}, which gives nothing there")
            found = outputs[source.tensor]
            self._net.said[spot, source.layer, source.node, source.tensor] = found
            # Keras 3 says the shape of what a layer gives that nothing is known of.
            self._confirm(found, source.shape)
            return found

        for call in topological_order(every, resolve):
            if call.description.get("class_name") == "InputLayer":
                own = given.get(call.layer) or self._own_input(call, names)
                self._meet(call.description, names, (own,), (own,))
                made[call.layer, call.node] = (own,)
                continue
            taken = tuple(value(source) for source in call.sources)
            nodes = call.description.get("inbound_nodes")
            said = CallArguments(
                raw=nodes[call.node] if isinstance(nodes, list) and call.node < len(nodes) else (),
                words=tuple(word for word, _ in call.named),
                outputs=asked.get((call.layer, call.node), 1),
            )
            made[call.layer, call.node] = self._call(call.description, taken, names, said)
        if not names:
            first = [made[resolve.key(source)][0] for source in model_ends(model, "input_layers")]
            self._net.inputs = {own: self._net.inputs[own] for own in (*first, *self._net.inputs)}
        return tuple(value(source) for source in model_ends(model, "output_layers"))

    def _confirm(self, value: str, shape: Sequence[int | None] | None) -> None:
        """Take what the file says of a value of which nothing is known for sure."""
        if shape is not None and None not in shape and (value not in self._net.shapes or value in self._guessed):
            self._guessed.discard(value)
            self._net.shapes[value] = with_batch(shape, 1)

    def _own_input(self, call: NodeCall, names: tuple[str, ...]) -> str:
        config = part(call.description, "config")
        shape = next((shape for key in SHAPE_KEYS if (shape := shape_in(config.get(key))) is not None), None)
        if shape is None:
            raise InputError(f"the configuration does not say the shape of its input {call.layer}")
        return self._input("/".join((*names, call.layer)), shape, call.description)

    def _call(
        self,
        found: Mapping[str, Any],
        inputs: tuple[str, ...],
        names: tuple[str, ...],
        said: CallArguments | None = None,
    ) -> tuple[str, ...]:
        said = said or CallArguments()
        self._caller.spend(1 + len(inputs))
        inner = (*names, name_of(found))
        inputs, words = self._without_mask(inputs, said.words, inner)
        if text(found, "class_name") == "MultiHeadAttention":
            inputs, words = in_order(inputs, words)
        if self._caller.inner_layers(found) and not words:
            outputs = self.model(found, inputs, inner)
        elif text(found, "class_name") == "TimeDistributed" and not words and len(inputs) == 1:
            outputs = self._each(found, inputs[0], inner)
        else:
            outputs = self._layer(found, inputs, inner, replace(said, words=words))
        self._meet(found, inner, inputs, outputs)
        return outputs

    def _without_mask(
        self, inputs: tuple[str, ...], words: tuple[str, ...], names: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return what a layer is given besides the mask that says which steps count; what a mask is made of stays."""
        count = len(inputs) - len(words)
        named = list(zip(words, inputs[count:], strict=True))
        masks = [value for word, value in named if word == _MASK]
        if masks:
            self._net.add("/".join(names), "mask of", OpKind.UNKNOWN, masks, ())
        left = [pair for pair in named if pair[0] != _MASK]
        return (*inputs[:count], *(value for _, value in left)), tuple(word for word, _ in left)

    def _each(self, found: Mapping[str, Any], value: str, names: tuple[str, ...]) -> tuple[str, ...]:
        """Call a layer on every step in time, as if the steps were examples."""
        shape = self._net.shapes.get(value)
        inner = part(part(found, "config"), "layer")
        if shape is None or len(shape) < 3:
            return self._unknown(found, (value,), names, (None,))
        name = "/".join(names)
        (steps,) = self._net.add(
            name, "TimeDistributed", OpKind.RESHAPE, (value,), ((shape[0] * shape[1], *shape[2:]),)
        )
        outputs = self._call(inner, (steps,), names)
        back: list[str] = []
        for one in outputs:
            each = self._net.shapes.get(one)
            if each is None or each[0] != shape[0] * shape[1]:
                return self._unknown(found, outputs, names, tuple(None for _ in outputs))
            back += self._net.add(name, "TimeDistributed", OpKind.RESHAPE, (one,), ((*shape[:2], *each[1:]),))
        return tuple(back)

    def _layer(
        self,
        found: Mapping[str, Any],
        inputs: tuple[str, ...],
        names: tuple[str, ...],
        said: CallArguments,
    ) -> tuple[str, ...]:
        step, is_function = self._step(found, inputs, said)
        is_taken = set(said.words) <= WORDS.get(step.kind, frozenset())
        follow = KINDS[FUNCTION] if is_function else rule_for(found, step.kind) if is_taken else None
        spot = self._spot(found)
        call = Called(self._net, names, step, inputs, self._leaves.get(spot, {}), said.words)
        if follow is not None:
            try:
                with self._net.undone_on_failure():
                    since = len(self._net.nodes)
                    one = follow(call)
                    first, *others = _enough(one, said.outputs)
                    if step.kind == "Bidirectional":
                        self._meet_ways(found, names, inputs, first)
                    return (self._net.renamed(first, call.name, since), *others)
            except (UnknownShapeError, LookupError):
                pass
        made = matmuls.output(step)
        is_lambda = step.kind == "Lambda" and made is None
        if is_lambda:
            made = _of_lambda(step)
        shapes = recurrent.outputs(step, made) if recurrent.is_recurrent(step.kind) else (made,)
        shapes += (None,) * (said.outputs - len(shapes))
        outputs = self._unknown(found, inputs, names, tuple(self._whole(shape, inputs) for shape in shapes))
        self._guessed.update(outputs if is_lambda else ())
        return outputs

    def _step(self, found: Mapping[str, Any], inputs: tuple[str, ...], said: CallArguments) -> tuple[LayerCall, bool]:
        """Return a call in the words of Keras 2, and whether it is a bare function."""
        kind = upgrade_class_name(text(found, "class_name"))
        config = part(found, "config")
        several = [self._net.shapes.get(value) for value in inputs]
        shapes = tuple(None if shape is None else shape[1:] for shape in several)
        count = len(shapes) - len(said.words)
        keywords = dict(zip(said.words, shapes[count:], strict=True))
        if is_operation(found) or kind in _FUNCTIONS:
            function = text(config, "function") or text(part(config, "node_def"), "op") or kind
            facts = {"function": function, "has_lists": has_lists(said.raw) or has_lists(config.get("constants"))}
            return LayerCall(function if kind in _FUNCTIONS else kind, facts, shapes[:count], keywords), True
        return LayerCall(kind, upgrade_config(kind, config), shapes[:count], keywords), False

    def _unknown(
        self,
        found: Mapping[str, Any],
        inputs: tuple[str, ...],
        names: tuple[str, ...],
        shapes: tuple[Shape | None, ...],
    ) -> tuple[str, ...]:
        # Weights that another call of the layer understands are used here in a way that it does not know.
        self._net.uses.update(tensor.name for tensor in self._leaves.get(self._spot(found), {}).values())
        kind = upgrade_class_name(text(found, "class_name"))
        return self._net.add("/".join(names), kind.rpartition(">")[2], OpKind.UNKNOWN, inputs, shapes)

    def _meet(
        self, found: Mapping[str, Any], names: tuple[str, ...], inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        spot = self._spot(found)
        self._net.met.append(CalledLayer(spot, names, inputs, outputs, self._leaves.get(spot, {})))

    def _meet_ways(
        self, found: Mapping[str, Any], names: tuple[str, ...], inputs: tuple[str, ...], output: str
    ) -> None:
        """Note what the layers of both directions are called with: each takes half of the first states."""
        half = len(inputs) // 2
        for key, states in (("layer", inputs[1 : 1 + half]), ("backward_layer", inputs[1 + half :])):
            inner = part(part(found, "config"), key)
            if inner:
                spot = (*self._spot(found), "config", key)
                self._net.met.append(CalledLayer(spot, (*names, name_of(inner)), (inputs[0], *states), (output,)))

    def _spot(self, found: Mapping[str, Any]) -> ConfigPath:
        one = self._located.get(id(found))
        return ROOT if one is None else one.spot

    def _whole(self, shape: Sequence[int | None] | None, inputs: tuple[str, ...]) -> Shape | None:
        batch = self._net.shapes.get(inputs[0], (1,))[0] if inputs else 1
        try:
            return None if shape is None else with_batch(shape, batch)
        except UnknownShapeError:
            return None


def _of_lambda(step: LayerCall) -> tuple[int | None, ...] | None:
    """Return the shape that a Lambda layer says, else that of its input: most only scale.

    What it computes is unknown, so it locks what it meets; what is behind it is followed all the same. A shape that is
    wrong does not fit the next weights, which lock then, or shows when the cut network is run beside the original.
    """
    said = untuple(step.config.get("output_shape"))
    shape = shape_in([None, *said]) if isinstance(said, list) else None
    found = step.inputs[0] if shape is None and len(step.inputs) == 1 else shape
    return None if found is None else tuple(found)


def _enough(made: str | tuple[str, ...], count: int) -> tuple[str, ...]:
    """Return what a layer gives, if that is all that is asked of it."""
    found = (made,) if isinstance(made, str) else made
    if len(found) < count:
        raise UnknownShapeError
    return found


@dataclass(frozen=True, slots=True)
class LoadedKeras:
    """A Keras file, and what was read from it."""

    model: ModelFile
    stored: WeightFile
    config: Mapping[str, Any]
    layers: tuple[LayerLocation, ...]
    net: GraphBuilder
    graph: ChannelGraph
    guessed: int = 0
    """How long open axes were taken to be where some layers did not fit that; 0 where all fit, or it was said."""


def load_keras(model: ModelFile, lengths: Lengths = NOTHING) -> LoadedKeras:
    """Read the configuration of a Keras file as a graph."""
    config = model.about.keras
    if config is None:
        raise InputError(
            f"{model.path} holds weights alone: nothing says how they are connected",
            hint="save the whole model, as .keras or .h5",
        )
    if not listed(config):
        raise InputError(
            f"{model.path} holds a model that is code: its configuration names no layers",
            hint="build it from layers with keras.Model(inputs, outputs), or export it to ONNX",
        )
    stored = WeightFile(model)
    slots = layers_by_folder(config, stored.contents.datasets)
    layers = located(config, slots)
    if stored.root is None and any(expected_weights(layer.found) and not layer.slots for layer in layers):
        _refuse_doubt(stored, config, slots)
    leaves = bind_weights(stored, layers)

    def followed(length: int, said: Mapping[str, Shape]) -> _Followed:
        net = GraphBuilder(model)
        walker = GraphTraversal(net, ShapeTracer(model.path, ()), layers, leaves, length, said=said)
        try:
            outputs = walker.model(config, (), ())
        except InputError as error:
            raise InputError(f"{model.path}: {error.message}", hint=error.hint) from error
        unknown = sum(node.kind is OpKind.UNKNOWN for node in net.nodes)
        return _Followed(unknown, net, outputs, walker.open, length)

    tries = [followed(TRIED[0], {})]
    said = lengths.of(_signature(tries[0]))
    if said and tries[0].open:
        tries = [followed(TRIED[0], said)]
    elif tries[0].open:
        tries += [followed(length, {}) for length in TRIED[1:]]
    best = min(tries, key=lambda one: one.unknown)
    guessed = best.length if best.open and best.unknown and not said else 0
    return LoadedKeras(model, stored, config, layers, best.net, best.net.graph(best.outputs), guessed)


def _refuse_doubt(stored: WeightFile, config: Mapping[str, Any], slots: Mapping[str, LayerConfig]) -> None:
    """Refuse weights that belong to layers of the configuration, and nobody knows to which."""
    if ambiguous_containers(config, slots, [found.name for found in stored.contents.datasets]):
        raise InputError(
            f"{stored.model.path} holds weights that do not fit the layers of its configuration by number and shape",
            hint="load it in the Keras that wrote it, save it again, and prune that file",
        )


@dataclass(frozen=True, slots=True)
class _Followed:
    """A configuration that was followed with open axes of some length."""

    unknown: int
    """How many operations nothing is known of."""
    net: GraphBuilder
    outputs: tuple[str, ...]
    open: Mapping[str, tuple[int | None, ...]]
    """The shapes of inputs as the file says them, without the batch, where that is not all."""
    length: int


def _signature(found: _Followed) -> Signature:
    shapes = {name: found.open.get(name, found.net.shapes[name][1:]) for name in found.net.inputs}
    ports = tuple(Port(name, shapes[name], kind) for name, kind in found.net.inputs.items())
    return Signature(ports, (), is_channels_first=False)
