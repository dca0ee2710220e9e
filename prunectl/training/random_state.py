"""Random generators that belong to no framework: Python's own, and NumPy's global one, which users' functions use."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

_LEGACY_SEEDS = 1 << 32


def seed(number: int) -> None:
    """Make both depend on a number alone."""
    random.seed(number)
    np.random.seed(number % _LEGACY_SEEDS)  # noqa: NPY002 - it is the one that is meant


def state() -> dict[str, Any]:
    """Where both are, in what JSON has words for."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, inner, gauss = random.getstate()
    return {"numpy": [kind, np.asarray(keys).tolist(), *rest], "python": [version, list(inner), gauss]}


def restore(state: Mapping[str, Any]) -> None:
    """Bring both to where they were."""
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
