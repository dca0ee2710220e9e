"""Small networks for tests, made by the frameworks, each of which is imported once."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from tests.contract import Array

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


@cache
def keras() -> ModuleType:
    """Keras 3."""
    pytest.importorskip("tensorflow")
    return importlib.import_module("keras")


@cache
def tf_keras() -> ModuleType:
    """Keras 2."""
    return pytest.importorskip("tf_keras")


def small_keras(k: Any, arrays: dict[str, Array]) -> Any:
    """Two dense layers, with the weights of ``contract.sample`` if there are any."""
    model = k.Sequential([k.layers.Input((5,)), k.layers.Dense(6, name="first"), k.layers.Dense(3, name="second")])
    if arrays:
        first, bias, second = arrays["first.weight"], arrays["first.bias"], arrays["second.weight"]
        model.get_layer("first").set_weights([first.T, bias])
        model.get_layer("second").set_weights([second.T, second[:, 0]])
    return model
