"""Small ONNX models, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.formats.registry import open_model
from prunectl.training.backend import LayerInput
from prunectl.training.data.source import Arrays, as_tuple
from prunectl.training.runtimes import load_onnx_model
from tests.contract import Array

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
node = onnx.helper.make_node


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def port(name: str, shape: tuple[int | str | None, ...] | None = None, dtype: Any = np.float32) -> Any:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def proto(nodes: list[Any], weights: dict[str, Array], *, x: Any = None, y: Any = None, ir: int = 8) -> Any:
    inputs = x or [port("x")]
    outputs = y or [port("y")]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, held)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def save(path: Path, *args: Any, **more: Any) -> Path:
    onnx.save(proto(*args, **more), path)
    return path


def load(path: Path) -> Any:
    return load_onnx_model(open_model(path))


def sights(path: Path, names: list[str], x: Arrays) -> list[LayerInput]:
    found: list[LayerInput] = []
    load(path).observe(names, x, found.append)
    assert all(sight.inputs.dtype == np.float32 for sight in found)
    return found


def run(path: Path, x: Arrays) -> list[Array]:
    """What onnxruntime says of the file as it is."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_inputs()]
    answers: list[Array] = session.run(None, dict(zip(names, as_tuple(x), strict=True)))
    return answers
