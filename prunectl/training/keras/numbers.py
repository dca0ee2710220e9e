"""Variables of either Keras as NumPy arrays, and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from prunectl.training.keras.library import Library, quietly
from prunectl.training.network import Array


def read(library: Library, variable: Any) -> Array:
    """Return a copy of the numbers of a variable, in its own type."""
    if library.is_two:
        return np.array(variable.numpy())
    if library.is_on_tensorflow:
        return np.array(variable.value.numpy())
    with quietly():
        return np.array(library.keras.ops.convert_to_numpy(variable.value)).astype(dtype(variable), copy=False)


def write(_: Library, variable: Any, value: Array) -> None:
    """Replace the numbers of a variable."""
    variable.assign(np.asarray(value).astype(dtype(variable), copy=False))


def dtype(variable: Any) -> np.dtype[Any]:
    """Return the type of a variable as NumPy has it."""
    said = variable.dtype if isinstance(variable.dtype, str) else variable.dtype.name
    return np.dtype(getattr(ml_dtypes, said)) if said.startswith(("bfloat", "float8")) else np.dtype(said)


def shape(variable: Any) -> tuple[int, ...]:
    """Return the shape of a variable."""
    return tuple(int(size) for size in variable.shape)


def is_float(variable: Any) -> bool:
    """Whether a variable can have a gradient."""
    kind = dtype(variable)
    return kind.kind == "f" or kind.name.startswith(("bfloat", "float"))


def as_arrays(found: Any) -> Any:
    """Return what a model put out as one array or a tuple of them, whatever it was packed in."""
    if isinstance(found, dict):
        found = tuple(found[name] for name in found)
    if isinstance(found, list | tuple):
        return tuple(np.asarray(one) for one in found) if len(found) != 1 else np.asarray(found[0])
    return np.asarray(found)
