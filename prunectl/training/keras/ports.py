"""What goes into a Keras model and what comes out of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prunectl.training.ending import Ending
from prunectl.training.keras.answers import ending_of, flat, names_of
from prunectl.training.signature import Port, Signature


def signature(model: Any) -> Signature:
    """Return the inputs and outputs of a model, as far as it knows them."""
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
    """Return the input of a model that is code, from the shape that it was built for."""
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
