"""What comes out of a model: probabilities, yes or no, or plain numbers?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.training.data.source import Batch, each
from prunectl.training.ending import Ending, by_numbers
from prunectl.training.keras import numbers, packing
from prunectl.training.network import Array

_MAX_NESTED = 20
_NAMELESS = "keras_tensor"


@dataclass(frozen=True, slots=True)
class Answer:
    """One output."""

    name: str
    ending: Ending
    shape: tuple[int | None, ...]
    """With the batch axis."""

    @property
    def width(self) -> int | None:
        """Size of the last axis."""
        return self.shape[-1] if len(self.shape) > 1 else 1


def answers(model: Any, example: Batch | None) -> tuple[Answer, ...]:
    """Return what each output is: by the layers that make it, else by what comes out for some examples."""
    outputs = flat(getattr(model, "outputs", None) or ())
    names = names_of(model, outputs)
    endings = [ending_of(tensor) for tensor in outputs]
    if (outputs and all(endings)) or example is None:
        shapes = [tuple(tensor.shape) for tensor in outputs]
        return _answers(names, [ending or Ending.RAW for ending in endings], shapes)
    seen = each(numbers.as_arrays(model.predict_on_batch(packing.inputs(model, example.x))))
    known = endings if len(endings) == len(seen) else [None] * len(seen)
    judged = [ending or _judged(array) for ending, array in zip(known, seen, strict=True)]
    return _answers(names, judged, [(None, *array.shape[1:]) for array in seen])


def names_of(model: Any, outputs: Sequence[Any]) -> list[str]:
    """Return what a user would call the outputs: what Keras does, or the layers that make them."""
    said = [str(name) for name in getattr(model, "output_names", None) or ()]
    if len(said) != len(outputs):
        said = [_NAMELESS] * len(outputs)
    makers = [_layer_of(tensor) for tensor in outputs]
    return [
        maker.name if name.startswith(_NAMELESS) and maker is not None else name
        for name, maker in zip(said, makers, strict=True)
    ]


def _answers(
    names: Sequence[str], endings: Sequence[Ending], shapes: Sequence[tuple[int | None, ...]]
) -> tuple[Answer, ...]:
    if len(names) != len(endings):
        names = [f"output_{at + 1}" for at in range(len(endings))]
    return tuple(map(Answer, names, endings, shapes))


def flat(found: Any) -> list[Any]:
    """Return tensors one by one, whatever they are packed in."""
    return list(_flat(found))


def _flat(found: Any) -> Iterator[Any]:
    if isinstance(found, dict):
        for one in found.values():
            yield from _flat(one)
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _flat(one)
    else:
        yield found


def _layer_of(tensor: Any) -> Any:
    """Return the layer that makes a symbolic tensor."""
    layer, at = None, 0
    for _ in range(_MAX_NESTED):
        history = getattr(tensor, "_keras_history", None)
        if history is None:
            return layer
        layer, at = history[0], history[2]
        inner = flat(getattr(layer, "outputs", None) or ())
        # A model inside the model: what makes its output is what counts.
        if not hasattr(layer, "layers") or at >= len(inner):
            return layer
        tensor = inner[at]
    return layer


def ending_of(tensor: Any) -> Ending | None:
    """Return the activation of the layer that makes a symbolic tensor, if it says so."""
    return _ending(_layer_of(tensor))


def _ending(layer: Any) -> Ending | None:
    """Return the activation that a layer ends with, if it says so."""
    if layer is None:
        return None
    inner = getattr(layer, "layer", None)
    if inner is not None and not hasattr(layer, "activation"):
        return _ending(inner)
    activation = getattr(layer, "activation", None)
    said = getattr(activation, "__name__", "") or type(activation).__name__ if activation is not None else ""
    kind = type(layer).__name__
    name = (said or (getattr(layer, "symbol", None) or kind)).lower()
    for ending in (Ending.SOFTMAX, Ending.SIGMOID):
        if name.rpartition(".")[2] == ending.value:
            return ending
    # A layer with an activation of its own says what it ends with; one without, such as Reshape, does not.
    return Ending.RAW if activation is not None else None


def _judged(array: Array) -> Ending:
    found = by_numbers(array, -1)
    # The logarithms of probabilities are logits as good as any.
    return Ending.RAW if found is Ending.LOG_SOFTMAX else found
