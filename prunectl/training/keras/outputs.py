"""Inputs and outputs of a Keras model: packing, names, and the final activation of each output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.source import Arrays, Batch, as_tuple
from prunectl.training.keras import backend
from prunectl.training.keras._compat import built_shape, flat_layers, producer, structure
from prunectl.training.task import FinalActivation, Task, activation_of_values, infer_task


def pack_inputs(model: Any, x: Arrays) -> Any:
    """Pack inputs in the model's structure."""
    return _pack(_names(model, "inputs"), as_tuple(x))


def pack_targets(model: Any, y: Arrays | None) -> Any:
    """Pack targets in the structure of the model's outputs."""
    return _pack(_names(model, "outputs"), as_tuple(y)) if y is not None else None


def per_output(model: Any, parts: Sequence[Any]) -> Any:
    """Pack a value for each output in the structure of the model's outputs."""
    return _pack(_names(model, "outputs"), parts)


def _names(model: Any, which: str) -> tuple[str, ...]:
    """The names of a model's inputs or outputs in the order of its tensors, if it takes a dictionary."""
    nested = structure(model, which)
    if not isinstance(nested, dict):
        return ()
    order = {id(tensor): index for index, tensor in enumerate(_tensors(model, which))}
    return tuple(sorted(sorted(nested), key=lambda name: order.get(id(nested[name]), 0)))


def _pack(names: tuple[str, ...], parts: Sequence[Any]) -> Any:
    if names and len(names) == len(parts):
        return dict(zip(names, parts, strict=True))
    return parts[0] if len(parts) == 1 else list(parts)


_MAX_NESTED = 20
_NAMELESS = "keras_tensor"


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """An output of a model: its layer's name, its final activation and its shape."""

    name: str
    activation: FinalActivation
    shape: tuple[int | None, ...]
    """Includes the batch axis."""

    @property
    def width(self) -> int | None:
        """Size of the last axis."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    def task(self, targets: Array) -> Task:
        """The task that targets define for this output."""
        return infer_task(self.shape[1:], self.activation, targets)


def describe_outputs(model: Any, example: Batch | None) -> tuple[ModelOutput, ...]:
    """Describe each output, from the layers that produce it or else from the outputs for an example batch."""
    outputs = flatten(getattr(model, "outputs", None) or ())
    names = output_names(model, outputs)
    activations = [activation_of(tensor) for tensor in outputs]
    if (outputs and all(activations)) or example is None:
        shapes = [tuple(tensor.shape) for tensor in outputs]
        return _model_outputs(names, [activation or FinalActivation.RAW for activation in activations], shapes)
    arrays = as_tuple(backend.as_arrays(model.predict_on_batch(pack_inputs(model, example.x))))
    known = activations if len(activations) == len(arrays) else [None] * len(arrays)
    resolved = [activation or _activation_from_values(array) for activation, array in zip(known, arrays, strict=True)]
    return _model_outputs(names, resolved, [(None, *array.shape[1:]) for array in arrays])


def output_names(model: Any, outputs: Sequence[Any]) -> list[str]:
    """The names of the outputs as a user knows them: Keras' own, or those of the layers that produce them."""
    names = [str(name) for name in getattr(model, "output_names", None) or ()]
    if not outputs:
        return names
    if len(names) != len(outputs):
        names = [_NAMELESS] * len(outputs)
    layers = [_producer(tensor) for tensor in outputs]
    return [
        layer.name if name.startswith(_NAMELESS) and layer is not None else name
        for name, layer in zip(names, layers, strict=True)
    ]


def _model_outputs(
    names: Sequence[str], activations: Sequence[FinalActivation], shapes: Sequence[tuple[int | None, ...]]
) -> tuple[ModelOutput, ...]:
    if len(names) != len(activations):
        names = [f"output_{index + 1}" for index in range(len(activations))]
    return tuple(map(ModelOutput, names, activations, shapes))


def flatten(nested: Any) -> list[Any]:
    """The tensors in a nested structure, as a list; dictionaries in the order of their keys, as Keras flattens them."""
    return list(_leaves(nested))


def _leaves(nested: Any) -> Iterator[Any]:
    if isinstance(nested, dict):
        for key in sorted(nested):
            yield from _leaves(nested[key])
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from _leaves(value)
    else:
        yield nested


def _producer(tensor: Any) -> Any:
    """The layer that produces a symbolic tensor."""
    layer, index = None, 0
    for _ in range(_MAX_NESTED):
        made_by = producer(tensor)
        if made_by is None:
            return layer
        layer, index = made_by
        inner = flatten(getattr(layer, "outputs", None) or ())
        # For a nested model, continue with the layer that produces its output.
        if not hasattr(layer, "layers") or index >= len(inner):
            return layer
        tensor = inner[index]
    return layer


def activation_of(tensor: Any) -> FinalActivation | None:
    """The final activation of the layer that produces a symbolic tensor, if it is known."""
    return _layer_activation(_producer(tensor))


def _layer_activation(layer: Any) -> FinalActivation | None:
    """The final activation of a layer, if it is known."""
    if layer is None:
        return None
    inner = getattr(layer, "layer", None)
    if inner is not None and not hasattr(layer, "activation"):
        return _layer_activation(inner)
    activation = getattr(layer, "activation", None)
    activation_name = getattr(activation, "__name__", "") or type(activation).__name__ if activation is not None else ""
    kind = type(layer).__name__
    name = (activation_name or (getattr(layer, "symbol", None) or kind)).lower()
    for known in (FinalActivation.SOFTMAX, FinalActivation.SIGMOID):
        if name.rpartition(".")[2] == known.value:
            return known
    # A layer with another activation outputs raw values; one without any, such as Reshape, shows nothing.
    return FinalActivation.RAW if activation is not None else None


def _activation_from_values(array: Array) -> FinalActivation:
    activation = activation_of_values(array, -1)
    # Log-probabilities serve as logits.
    return FinalActivation.RAW if activation is FinalActivation.LOG_SOFTMAX else activation


def signature(model: Any) -> ModelSignature:
    """The inputs and outputs of a model, as far as they are known."""
    inputs, outputs = flatten(_tensors(model, "inputs")), flatten(_tensors(model, "outputs"))
    names = output_names(model, outputs)
    return ModelSignature(
        inputs=tuple(_port(tensor, f"input_{index + 1}") for index, tensor in enumerate(inputs))
        or (_from_build(model),),
        outputs=tuple(
            replace(_port(tensor, name), name=name, activation=activation_of(tensor) or FinalActivation.UNKNOWN)
            for tensor, name in zip(outputs, names, strict=True)
        )
        or (TensorSpec("output_1", None, ""),),
        is_channels_first=_is_channels_first(model),
    )


def _tensors(model: Any, which: str) -> Any:
    try:
        return getattr(model, which, None) or ()
    except (AttributeError, ValueError):
        return ()


def _port(tensor: Any, name: str) -> TensorSpec:
    shape = tensor.shape
    dims = (
        None if getattr(shape, "rank", 0) is None else tuple(None if size is None else int(size) for size in shape)[1:]
    )
    dtype = tensor.dtype if isinstance(tensor.dtype, str) else tensor.dtype.name
    return TensorSpec(str(getattr(tensor, "name", "") or name).partition(":")[0], dims, dtype)


def _from_build(model: Any) -> TensorSpec:
    """The input of a subclassed model, from the shape that it was built for."""
    shape = built_shape(model)
    if shape is None or not all(size is None or isinstance(size, int) for size in tuple(shape)):
        return TensorSpec("input_1", None, "")
    return TensorSpec("input_1", tuple(shape)[1:], "")


def _is_channels_first(model: Any) -> bool:
    formats = [getattr(layer, "data_format", None) for layer in flat_layers(model)]
    return "channels_first" in formats
