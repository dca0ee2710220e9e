"""Calls of Keras layers, one by one: what each gives, what it multiplies, what it wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import Length, Operation, Shape, Tensor, numel
from prunectl.formats.keras.config import PRUNED_PREFIX, listed, named, part, text, upgrade_class_name, upgrade_config
from prunectl.formats.keras.flops import matmuls, recurrent
from prunectl.formats.keras.flops.matmuls import Weights
from prunectl.formats.keras.flops.shapes import LayerCall, Matmul, UnknownShapeError, shapes_in
from prunectl.formats.keras.inbound import NodeCall, name_of, parse_calls

MAX_DEPTH = 40
"""No model is nested deeper."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """The models and wrappers around a layer."""

    models: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    times: Shape = ()
    """How often a wrapper applies what it wraps."""
    turn: int = 0
    """Which of two directions a wrapper runs it in."""
    depth: int = 0

    def inside_model(self, name: str) -> CallContext:
        """The place of the layers of a model."""
        return replace(self, models=(*self.models, *self.wrappers, name), wrappers=(), depth=self.depth + 1)

    def inside_wrapper(self, *names: str, times: tuple[Length, ...] = (), turn: int = 0) -> CallContext:
        """The place of the layer that a wrapper wraps."""
        return replace(
            self,
            wrappers=(*self.wrappers, *names),
            times=(*self.times, *times),
            turn=self.turn + turn,
            depth=self.depth + 1,
        )


Shapes = tuple[Shape | None, ...]
MAX_STEPS = 50_000
"""Calls of layers and their inputs: more than any model needs."""
_TRANSPARENT = frozenset(
    {
        *("PruneLowMagnitude", "QuantizeWrapper", "QuantizeWrapperV2", "QuantizeAnnotate", "ClusterWeights"),
        *("SpectralNormalization", "WeightNormalization"),
    }
)
_OPERATIONS = frozenset({"Matmul", "Einsum", "Dot", "Tensordot", "Inner", "Outer", "Conv", "DotProductAttention"})
"""Functions of Keras 3 and TensorFlow that multiply what they are given."""
_LIKE_THEM = frozenset({"matmul", "einsum", "tensordot", "conv2d", "conv1d", "batchmatmulv2", "batchmatmul"})


class ShapeTracer:
    """Calls layers, and notes what they multiply."""

    def __init__(
        self,
        path: Path,
        tensors: Iterable[Tensor],
        run: Callable[[ShapeTracer, Mapping[str, Any], Shapes, CallContext], Shapes],
    ) -> None:
        self._path = path
        self._run = run
        self._weights = Weights(tensors)
        self._found: list[Operation] = []
        self._steps = 0
        self._settings: dict[int, Mapping[str, Any]] = {}
        self._layers: dict[int, tuple[Mapping[str, Any], ...]] = {}
        self._inner: dict[int, tuple[NodeCall, ...]] = {}
        self.shapes: dict[str, list[Shapes]] = {}
        """What each layer gives, call by call; the layers of models behind the names of these."""

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What was multiplied, in the order of the calls."""
        return tuple(self._found)

    def charge(self, steps: int) -> None:
        """Refuse a configuration that models inside models make endless."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise InputError(f"{self._path} is refused: its configuration takes more than {MAX_STEPS} steps to follow")

    def layers_in(self, found: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        """Return the layers of a model, if it is one."""
        if id(found) not in self._layers:
            self._layers[id(found)] = listed(found)
        return self._layers[id(found)]

    def calls_in(self, found: Mapping[str, Any]) -> tuple[NodeCall, ...]:
        """Return every call in a model, read once however often the model is called itself."""
        if id(found) not in self._inner:
            self._inner[id(found)] = parse_calls(found)
        self.charge(sum(1 + len(call.sources) for call in self._inner[id(found)]))
        return self._inner[id(found)]

    def call(
        self, found: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], at: CallContext
    ) -> Shapes:
        """Return the shapes that a layer gives."""
        self.charge(1 + len(inputs) + len(keywords))
        if at.depth > MAX_DEPTH:
            raise InputError(f"{self._path} is refused: its configuration is nested deeper than {MAX_DEPTH} models")
        if not inputs or None in inputs:
            said = shapes_in(_built(found))
            inputs = said if not inputs else _filled(inputs, said)
        given = self._call(found, inputs, keywords, at)
        name = name_of(found).removeprefix(PRUNED_PREFIX)
        self.shapes.setdefault("/".join((*at.models, *at.wrappers, name)), []).append(given)
        return given

    def _call(
        self, found: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], at: CallContext
    ) -> Shapes:
        name, kind, config = name_of(found), text(found, "class_name"), part(found, "config")
        inner = part(config, "layer")
        if self.layers_in(found):
            return self._run(self, found, inputs, at.inside_model(name))
        if not inner:
            return self._plain(found, inputs, keywords, at)
        if kind == "TimeDistributed":
            return self._each(inner, inputs, at, name)
        if kind == "Bidirectional":
            return self._both(config, inputs, at, name)
        if kind in _TRANSPARENT:
            return self.call(inner, inputs, keywords, at.inside_wrapper(name.removeprefix(PRUNED_PREFIX)))
        self._note_unknown(found)
        return (None,)

    def _each(self, inner: Mapping[str, Any], inputs: Shapes, at: CallContext, name: str) -> Shapes:
        shape = inputs[0] if inputs else None
        time = shape[0] if shape else None
        below = at.inside_wrapper(name, times=(time,))
        given = self.call(inner, (shape[1:] if shape else None,), {}, below)
        return tuple(None if one is None else (time, *one) for one in given)

    def _both(self, config: Mapping[str, Any], inputs: Shapes, at: CallContext, name: str) -> Shapes:
        """Run a layer forward and backward; the file may describe the second by itself, or not."""
        forward = part(config, "layer")
        backward = part(config, "backward_layer") or forward
        first = self.call(forward, inputs[:1], {}, at.inside_wrapper(name, "forward_layer"))
        second = self.call(backward, inputs[:1], {}, at.inside_wrapper(name, "backward_layer", turn=1))
        step = LayerCall("Bidirectional", config, inputs)
        states = (*first[1:], *second[1:])
        if "merge_mode" in config and config["merge_mode"] is None:
            return (first[0], second[0], *states)
        return (recurrent.bidirectional_output(first[0], step), *states)

    def _plain(
        self, found: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], at: CallContext
    ) -> Shapes:
        kind = upgrade_class_name(text(found, "class_name"))
        if id(found) not in self._settings:
            self._settings[id(found)] = upgrade_config(kind, part(found, "config"))
        step = LayerCall(kind, self._settings[id(found)], inputs, keywords)
        if _is_function(found):
            if kind in _OPERATIONS:
                self._note_unknown(found)
            return (matmuls.output(step) if kind in {"Add", "Multiply", "Subtract"} else None,)
        if kind in {"TFOpLambda", "TensorFlowOpLayer"}:
            step = LayerCall(kind, {"function": _function(step.config)}, inputs, keywords)
            if step.word("function").rpartition(".")[2] in _LIKE_THEM:
                self._note_unknown(found)
        elif matmuls.is_multiplying(kind):
            self._note(step, name_of(found), at)
        elif kind not in matmuls.RULES and self._weights.owns((name_of(found), *at.wrappers)):
            self._note_unknown(found)
        given = matmuls.output(step)
        return recurrent.outputs(step, given) if recurrent.is_recurrent(kind) else (given,)

    def _note(self, step: LayerCall, name: str, at: CallContext) -> None:
        try:
            products = matmuls.matmuls(step)
        except UnknownShapeError:
            products = (Matmul("kernel", (None,), ()),)
        for one in products:
            names = _names(name, at)
            weights = self._weights.of(names, at.models, one, at.turn)
            shape = weights[0].shape if len(weights) == 1 and None in one.shape else one.shape
            macs = numel((*shape, *one.times, *at.times))
            for weight in weights:
                self._found.append(
                    Operation(name, step.kind, None if macs is None else macs // len(weights), weight.name)
                )
            if not weights:
                self._found.append(Operation(name, step.kind, macs))

    def _note_unknown(self, found: Mapping[str, Any]) -> None:
        self._found.append(Operation(name_of(found), text(found, "class_name"), None))


def _names(name: str, at: CallContext) -> tuple[str, ...]:
    """Return what a weight may be called after: the layer, what wraps it, and the way it runs."""
    direction = next((one.removesuffix("layer") for one in at.wrappers if one.endswith("ward_layer")), "")
    return (f"{direction}{name}", name, *at.wrappers) if direction else (name, *at.wrappers)


def _built(found: Mapping[str, Any]) -> Any:
    build = part(found, "build_config")
    return build.get("input_shape") or build.get("shapes_dict")


def _filled(inputs: Shapes, said: Shapes) -> Shapes:
    return tuple(said[place] if shape is None and place < len(said) else shape for place, shape in enumerate(inputs))


def _is_function(found: Mapping[str, Any]) -> bool:
    return ".ops." in text(found, "module")


def _function(config: Mapping[str, Any]) -> str:
    """Return the function of TensorFlow that a layer stands for."""
    return text(config, "function") or text(part(config, "node_def"), "op") or named(config.get("name"))
