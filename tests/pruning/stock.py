"""What the stock loader of each format reads from a file: every array of numbers in it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import onnxruntime
import safetensors.numpy
import torch
from onnx import numpy_helper

from tests.contract import Array
from tests.networks import keras, tf_keras


def load(path: Path) -> list[Array]:
    """Return all arrays that a framework reads."""
    return [np.asarray(array) for array in _loader(path)(path)]


def _loader(path: Path) -> Callable[[Path], Iterator[Any]]:
    if path.is_dir():
        return _saved_model
    by_name: dict[str, Callable[[Path], Iterator[Any]]] = {
        "weights_only.h5": _hdf5,
        "digits_cnn_torchscript.pt": _torchscript,
        "whole_module.pt": _nothing,  # code that only its author has
    }
    by_suffix: dict[str, Callable[[Path], Iterator[Any]]] = {
        ".h5": _tf_keras,
        ".keras": _keras,
        ".pt": _torch,
        ".pt2": _exported,
        ".onnx": _onnx,
        ".safetensors": _safetensors,
        ".json": _shards,
        ".tflite": _tflite,
        ".index": _checkpoint,
    }
    return by_name.get(path.name) or by_suffix[path.suffix]


def tensorflow() -> Any:
    """Return TensorFlow, after Keras has chosen it."""
    keras()
    return importlib.import_module("tensorflow")


def _nothing(_: Path) -> Iterator[Any]:
    yield from ()


def _tf_keras(path: Path) -> Iterator[Any]:
    tfmot = importlib.import_module("tensorflow_model_optimization")
    with tfmot.sparsity.keras.prune_scope():
        yield from tf_keras().models.load_model(path, compile=False).get_weights()


def _hdf5(path: Path) -> Iterator[Any]:
    found: list[Any] = []
    with h5py.File(path) as file:
        file.visititems(lambda _, node: found.append(node[()]) if isinstance(node, h5py.Dataset) else None)
    yield from found


def _keras(path: Path) -> Iterator[Any]:
    yield from keras().saving.load_model(path, compile=False, safe_mode=False).get_weights()


def _saved_model(path: Path) -> Iterator[Any]:
    tensorflow().saved_model.load(str(path))
    yield from _bundle(path / "variables" / "variables")


def _checkpoint(path: Path) -> Iterator[Any]:
    yield from _bundle(path.with_suffix(""))


def _bundle(prefix: Path) -> Iterator[Any]:
    reader = tensorflow().train.load_checkpoint(str(prefix))
    for name, dtype in reader.get_variable_to_dtype_map().items():
        if dtype != tensorflow().string:
            yield reader.get_tensor(name)


def _torch(path: Path) -> Iterator[Any]:
    yield from _tensors(torch.load(path, weights_only=True))


def _tensors(found: Any) -> Iterator[Any]:
    if isinstance(found, torch.Tensor):
        yield found.detach().numpy()
    elif isinstance(found, dict):
        for value in found.values():
            yield from _tensors(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _tensors(value)


def _torchscript(path: Path) -> Iterator[Any]:
    yield from _tensors(dict(torch.jit.load(path).state_dict()))


def _exported(path: Path) -> Iterator[Any]:
    yield from _tensors(dict(torch.export.load(path).state_dict))


def _onnx(path: Path) -> Iterator[Any]:
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    yield from _initializers(onnx.load(path).graph)


def _initializers(graph: onnx.GraphProto) -> Iterator[Any]:
    yield from map(numpy_helper.to_array, graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _initializers(attribute.g)


def _safetensors(path: Path) -> Iterator[Any]:
    yield from safetensors.numpy.load_file(path).values()


def _shards(path: Path) -> Iterator[Any]:
    for shard in sorted(path.parent.glob("*.safetensors")):
        yield from _safetensors(shard)


def _tflite(path: Path) -> Iterator[Any]:
    interpreter = tensorflow().lite.Interpreter(str(path))
    for facts in interpreter.get_tensor_details():
        try:
            yield interpreter.get_tensor(facts["index"])
        except ValueError:  # what is reckoned has no numbers before it runs
            continue
