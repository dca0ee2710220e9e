"""Calls of Keras layers, one by one: what each gives, what it multiplies, what it wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import Operation, Tensor
from prunectl.formats.keras import multiplying, recurrent, rules
from prunectl.formats.keras.config import PRUNED_PREFIX, listed, named, part, text
from prunectl.formats.keras.dialect import modern_kind, modern_settings
from prunectl.formats.keras.inbound import Call, calls, name_of
from prunectl.formats.keras.products import Product
from prunectl.formats.keras.scope import MAX_DEPTH, Scope
from prunectl.formats.keras.shapes import UnknownShapeError, shapes_in
from prunectl.formats.keras.step import Step
from prunectl.formats.keras.weights import Weights
from prunectl.formats.lengths import Shape, product

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


class Caller:
    """Calls layers, and notes what they multiply."""

    def __init__(
        self, path: Path, tensors: Iterable[Tensor], run: Callable[[Caller, Mapping[str, Any], Shapes, Scope], Shapes]
    ) -> None:
        self._path = path
        self._run = run
        self._weights = Weights(tensors)
        self._found: list[Operation] = []
        self._steps = 0
        self._settings: dict[int, Mapping[str, Any]] = {}
        self._layers: dict[int, tuple[Mapping[str, Any], ...]] = {}
        self._inner: dict[int, tuple[Call, ...]] = {}
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

    def calls_in(self, found: Mapping[str, Any]) -> tuple[Call, ...]:
        """Return every call in a model, read once however often the model is called itself."""
        if id(found) not in self._inner:
            self._inner[id(found)] = calls(found)
        self.charge(sum(1 + len(call.sources) for call in self._inner[id(found)]))
        return self._inner[id(found)]

    def call(self, found: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], at: Scope) -> Shapes:
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
        self, found: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], at: Scope
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

    def _each(self, inner: Mapping[str, Any], inputs: Shapes, at: Scope, name: str) -> Shapes:
        shape = inputs[0] if inputs else None
        time = shape[0] if shape else None
        below = at.inside_wrapper(name, times=(time,))
        given = self.call(inner, (shape[1:] if shape else None,), {}, below)
        return tuple(None if one is None else (time, *one) for one in given)

    def _both(self, config: Mapping[str, Any], inputs: Shapes, at: Scope, name: str) -> Shapes:
        """Run a layer forward and backward; the file may describe the second by itself, or not."""
        forward = part(config, "layer")
        backward = part(config, "backward_layer") or forward
        first = self.call(forward, inputs[:1], {}, at.inside_wrapper(name, "forward_layer"))
        second = self.call(backward, inputs[:1], {}, at.inside_wrapper(name, "backward_layer", turn=1))
        step = Step("Bidirectional", config, inputs)
        states = (*first[1:], *second[1:])
        if "merge_mode" in config and config["merge_mode"] is None:
            return (first[0], second[0], *states)
        return (recurrent.doubled(first[0], step), *states)

    def _plain(
        self, found: Mapping[str, Any], inputs: Shapes, keywords: Mapping[str, Shape | None], at: Scope
    ) -> Shapes:
        kind = modern_kind(text(found, "class_name"))
        if id(found) not in self._settings:
            self._settings[id(found)] = modern_settings(kind, part(found, "config"))
        step = Step(kind, self._settings[id(found)], inputs, keywords)
        if _is_function(found):
            if kind in _OPERATIONS:
                self._note_unknown(found)
            return (rules.output(step) if kind in {"Add", "Multiply", "Subtract"} else None,)
        if kind in {"TFOpLambda", "TensorFlowOpLayer"}:
            step = Step(kind, {"function": _function(step.config)}, inputs, keywords)
            if step.word("function").rpartition(".")[2] in _LIKE_THEM:
                self._note_unknown(found)
        elif multiplying.is_multiplying(kind):
            self._note(step, name_of(found), at)
        elif kind not in rules.RULES and self._weights.owns((name_of(found), *at.wrappers)):
            self._note_unknown(found)
        given = rules.output(step)
        return recurrent.outputs(step, given) if recurrent.is_recurrent(kind) else (given,)

    def _note(self, step: Step, name: str, at: Scope) -> None:
        try:
            products = multiplying.products(step)
        except UnknownShapeError:
            products = (Product("kernel", (None,), ()),)
        for one in products:
            names = _names(name, at)
            weights = self._weights.of(names, at.models, one, at.turn)
            shape = weights[0].shape if len(weights) == 1 and None in one.shape else one.shape
            macs = product((*shape, *one.times, *at.times))
            for weight in weights:
                self._found.append(
                    Operation(name, step.kind, None if macs is None else macs // len(weights), weight.name)
                )
            if not weights:
                self._found.append(Operation(name, step.kind, macs))

    def _note_unknown(self, found: Mapping[str, Any]) -> None:
        self._found.append(Operation(name_of(found), text(found, "class_name"), None))


def _names(name: str, at: Scope) -> tuple[str, ...]:
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
