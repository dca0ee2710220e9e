"""Arrays in one file, by name: also of types that NumPy's own files do not know."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401 - teaches NumPy the names of its types
import numpy as np

from prunectl.errors import InputError
from prunectl.training.network import Array

_INDEX = "index"


def keep(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays to a file."""
    index = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    parts = {str(at): np.frombuffer(array.tobytes(), np.uint8) for at, array in enumerate(arrays.values())}
    parts[_INDEX] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **parts)


def take(path: Path) -> dict[str, Array]:
    """Return the arrays of a file."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return {
                name: np.frombuffer(held[str(at)].tobytes(), np.dtype(dtype)).reshape(shape)
                for at, (name, dtype, shape) in enumerate(json.loads(held[_INDEX].tobytes()))
            }
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged: {error}", hint="remove its folder to start again") from error
