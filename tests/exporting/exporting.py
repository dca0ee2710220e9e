"""Exports in this process, and the runtimes that judge what was written."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunectl import api
from prunectl.exporting.compare import ExportResult
from tests.contract import Array
from tests.running import FIXTURES

DIGITS = f"{FIXTURES / 'digits.npz'}?norm=/16"
NET = f"{FIXTURES / 'digits_torch.py'}:DigitsCNN"


def export(source: str | Path, output: Path, /, **words: Any) -> ExportResult:
    """Export, deaf to what frameworks warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return api.export(FIXTURES / source, output, **words)


def save(model: Any, place: Path) -> None:
    """Save a model of Keras, deaf to what it would rather have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(place)


def digits(count: int = 40) -> Array:
    """Some digits as Keras has them."""
    with np.load(FIXTURES / "digits.npz") as held:
        found: Array = held["x"][:count].astype(np.float32) / 16
    return found


def random(*shapes: tuple[int, ...]) -> list[Array]:
    """Inputs of these shapes."""
    numbers = np.random.default_rng(3)
    return [numbers.standard_normal(shape, np.float32) for shape in shapes]


def by_onnxruntime(path: Path, *inputs: Array) -> list[Array]:
    """Run a model in onnxruntime, checked by onnx first."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    onnx.checker.check_model(str(path), full_check=True)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    found: list[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
    return found


def by_tflite(path: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a model in TensorFlow Lite's interpreter."""
    tf = importlib.import_module("tensorflow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, Array] = tf.lite.Interpreter(str(path)).get_signature_runner()(**inputs)
    return found


def zeros(path: Path) -> int:
    """Count the zero weights of an ONNX model."""
    onnx = importlib.import_module("onnx")
    graph = onnx.load(path).graph
    return sum(int((onnx.numpy_helper.to_array(one) == 0).sum()) for one in graph.initializer)
