"""The bytes of a file, paged in as they are touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prunectl.errors import InputError


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file without reading them."""
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is truncated or damaged: it is empty")
        return np.memmap(path, np.uint8, "r").data
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
