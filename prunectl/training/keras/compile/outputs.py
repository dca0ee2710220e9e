"""What comes out of a model: probabilities, yes or no, or plain numbers?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunectl.training.backend import Array, Ending, Port, Signature, by_numbers
from prunectl.training.data.source import Arrays, Batch, each
from prunectl.training.keras import backend


def inputs(model: Any, x: Arrays) -> Any:
    """Inputs as the model takes them."""
    return _like(_names(model, "inputs"), each(x))


def targets(model: Any, y: Arrays | None) -> Any:
    """Targets as the model puts out its answers."""
    return _like(_names(model, "outputs"), each(y)) if y is not None else None


def for_outputs(model: Any, parts: Sequence[Any]) -> Any:
    """One thing for each output, as the model puts them out."""
    return _like(_names(model, "outputs"), parts)


def _names(model: Any, which: str) -> tuple[str, ...]:
    """What a model calls its inputs or outputs, if it takes them by name."""
    for attribute in (f"_{which}_struct", f"_nested_{which}"):
        found = getattr(model, attribute, None)
        if isinstance(found, dict):
            return tuple(found)
    return ()


def _like(names: tuple[str, ...], parts: Sequence[Any]) -> Any:
    if names and len(names) == len(parts):
        return dict(zip(names, parts, strict=True))
    return parts[0] if len(parts) == 1 else list(parts)


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
    """What each output is: by the layers that make it, else by what comes out for some examples."""
    outputs = flat(getattr(model, "outputs", None) or ())
    names = names_of(model, outputs)
    endings = [ending_of(tensor) for tensor in outputs]
    if (outputs and all(endings)) or example is None:
        shapes = [tuple(tensor.shape) for tensor in outputs]
        return _answers(names, [ending or Ending.RAW for ending in endings], shapes)
    seen = each(backend.as_arrays(model.predict_on_batch(inputs(model, example.x))))
    known = endings if len(endings) == len(seen) else [None] * len(seen)
    judged = [ending or _judged(array) for ending, array in zip(known, seen, strict=True)]
    return _answers(names, judged, [(None, *array.shape[1:]) for array in seen])


def names_of(model: Any, outputs: Sequence[Any]) -> list[str]:
    """What a user would call the outputs: what Keras does, or the layers that make them."""
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
    """Tensors one by one, whatever they are packed in."""
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
    """The layer that makes a symbolic tensor."""
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
    """The activation of the layer that makes a symbolic tensor, if it says so."""
    return _ending(_layer_of(tensor))


def _ending(layer: Any) -> Ending | None:
    """The activation that a layer ends with, if it says so."""
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


def signature(model: Any) -> Signature:
    """The inputs and outputs of a model, as far as it knows them."""
    inputs, outputs = flat(_tensors(model, "inputs")), flat(_tensors(model, "outputs"))
    names = names_of(model, outputs)
    return Signature(
        inputs=tuple(_port(tensor, f"input_{at + 1}") for at, tensor in enumerate(inputs)) or (_from_build(model),),
        outputs=tuple(
            replace(_port(tensor, name), name=name, ending=ending_of(tensor) or Ending.UNKNOWN)
            for tensor, name in zip(outputs, names, strict=True)
        )
        or (Port("output_1", None, ""),),
        is_channels_first=_is_channels_first(model),
    )


def _tensors(model: Any, which: str) -> Any:
    try:
        return getattr(model, which, None) or ()
    except (AttributeError, ValueError):
        return ()


def _port(tensor: Any, name: str) -> Port:
    shape = tensor.shape
    dims = None if getattr(shape, "rank", 0) is None else tuple(None if n is None else int(n) for n in shape)[1:]
    dtype = tensor.dtype if isinstance(tensor.dtype, str) else tensor.dtype.name
    return Port(str(getattr(tensor, "name", "") or name).partition(":")[0], dims, dtype)


def _from_build(model: Any) -> Port:
    """The input of a model that is code, from the shape that it was built for."""
    shape = getattr(model, "_build_input_shape", None)
    if shape is None:
        shapes = getattr(model, "_build_shapes_dict", None) or {}
        shape = next(iter(shapes.values()), None)
    if shape is None or not all(one is None or isinstance(one, int) for one in tuple(shape)):
        return Port("input_1", None, "")
    return Port("input_1", tuple(shape)[1:], "")


def _is_channels_first(model: Any) -> bool:
    said = [getattr(layer, "data_format", None) for layer in model._flatten_layers()]  # noqa: SLF001
    return "channels_first" in said
