"""What a layer is called with, and which of its variables meets what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.training.keras.library import Library
from prunectl.training.network import Array
from prunectl.training.sights import Use


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a layer, with numbers."""

    library: Library
    layer: Any
    inputs: tuple[Array, ...]
    """What goes in, and for a recurrent cell then its states; 32 bits each."""
    out_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """A variable that meets some inputs."""

    variable: Any
    inputs: Array
    use: Use


Tell = Callable[[Call], Iterator[Meeting]]


def numbers_in(library: Library, tensor: Any) -> Array | None:
    """Return a tensor as 32-bit numbers; None where there are none yet, as while a graph is traced."""
    if not isinstance(tensor, np.ndarray) and not _is_filled(library, tensor):
        return None
    if isinstance(tensor, np.ndarray):
        found = tensor
    elif library.is_two:
        found = tensor.numpy()
    else:
        found = library.keras.ops.convert_to_numpy(tensor)
    return np.asarray(found).astype(np.float32, copy=False)


def _is_filled(library: Library, tensor: Any) -> bool:
    if library.is_on_tensorflow:
        tf = library.tensorflow
        return isinstance(tensor, tf.Tensor) and not tf.is_symbolic_tensor(tensor)
    if library.backend == "torch":
        return isinstance(tensor, library.torch.Tensor)
    jax = library.jax
    return isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer)


def tree(library: Library) -> Any:
    """Return what takes nested structures apart."""
    return library.tensorflow.nest if library.is_two else library.keras.tree
