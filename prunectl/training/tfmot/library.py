"""tensorflow-model-optimization, imported without a word and without a trace in the environment."""

from __future__ import annotations

import os
from typing import Any

from prunectl.formats.optional import require
from prunectl.training.keras.library import keras_two, quietly

_LEGACY = "TF_USE_LEGACY_KERAS"


def tfmot() -> Any:
    """Return what tfmot has for sparsity in Keras 2."""
    keras_two()
    before = os.environ.get(_LEGACY)
    try:
        with quietly():
            found = require("tensorflow_model_optimization", extra="tensorflow")
    finally:
        # tfmot turns every Keras that is imported later, in this process and in those it starts, into Keras 2.
        if before is None:
            os.environ.pop(_LEGACY, None)
        else:
            os.environ[_LEGACY] = before
    return found.sparsity.keras


def version() -> str:
    """Return which tfmot it is."""
    found: str = require("tensorflow_model_optimization", extra="tensorflow").__version__
    return found
