"""How much a Keras model calculates: the multiply-accumulates of each layer, for one input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, Operation
from prunectl.formats.keras.config import listed
from prunectl.formats.keras.layer_calls import Caller
from prunectl.formats.keras.model_calls import run


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """Return the operations that multiply; a layer that is used twice counts twice."""
    return trace(model).operations


def trace(model: ModelFile) -> Caller:
    """Follow the shapes through a model, from its inputs to its outputs."""
    config: Mapping[str, Any] | None = model.about.keras
    if config is None or not listed(config):
        raise InputError(f"{model.path} holds weights, but no configuration to count operations in")
    caller = Caller(model.path, model.tensors, run)
    run(caller, config, ())
    return caller
