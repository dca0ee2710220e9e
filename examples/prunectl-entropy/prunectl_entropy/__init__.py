"""Functions that prunectl calls by the names that `pyproject.toml` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def entropy(weights: Array, power: float = 1.0) -> Array:
    """Score each weight by its part in the entropy of its layer: -p log p, where p is its share of all powers."""
    shares = np.abs(weights.astype(np.float64)) ** power
    total = shares.sum()
    shares = shares / total if total else shares
    return -shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0)


def relative(weights: Mapping[str, Array]) -> dict[str, Array | None]:
    """Score each weight by its size beside the mean of its layer, so that layers compare; leave constant ones alone."""
    return {
        name: None if np.ptp(array) == 0 else np.abs(array) / np.abs(array).mean() for name, array in weights.items()
    }


relative.prunectl_scope = "model"  # type: ignore[attr-defined]


def wide(tensor: Any) -> str:
    """Prune kernels with at least twice as many inputs as outputs."""
    if not tensor.is_prunable:
        return f"a {tensor.role}"
    outputs = tensor.shape[tensor.out_axis or 0]
    return "" if tensor.size >= 2 * outputs * outputs else "not wide"
