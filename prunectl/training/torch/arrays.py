"""Numbers on their way between NumPy and PyTorch; bfloat16 goes as the bits that it is."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

_AS_BITS = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.int8, torch.float8_e4m3fn),
    "float8_e5m2": (np.int8, torch.float8_e5m2),
}


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """Return a tensor of the same numbers, its memory its own."""
    own = np.array(array, order="C")
    if own.dtype.name in _AS_BITS:
        bits, dtype = _AS_BITS[own.dtype.name]
        return torch.from_numpy(own.view(bits)).view(dtype)
    return torch.from_numpy(own)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Return an array of the same numbers, its memory its own."""
    found = tensor.detach().cpu().contiguous()
    for name, (bits, dtype) in _AS_BITS.items():
        if found.dtype is dtype:
            as_bits = found.view(torch.int16 if bits is np.int16 else torch.int8).numpy().copy()
            return as_bits.view(np.dtype(getattr(ml_dtypes, name)))
    return np.array(found.numpy())
