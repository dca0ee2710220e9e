"""TensorFlow Lite models, float or quantised, run by their interpreter. It computes no gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.errors import InputError, UntrustedError, UsageError, abbreviated
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.tflite.schema import read_lite
from prunectl.formats.workers import threads_from_env, usable_cores
from prunectl.training.backend import LoadOptions, ModelSignature, TensorSpec
from prunectl.training.data.source import Arrays, as_tuple, fill_rows
from prunectl.training.keras.backend import load_keras2
from prunectl.training.keras.load import error_line
from prunectl.training.quiet import ignore_warnings, silence

_tf = load_keras2().tensorflow
_FLEX = "Flex"
"""Prefix of the names of TensorFlow's own operators in TensorFlow Lite."""


def open_interpreter(model: ModelFile, *, is_trusted: bool, threads: int) -> Any:
    """The interpreter of a model. The file holds no code but names of operators, of which TensorFlow's need trust."""
    graphs = read_lite(model.path).graphs
    flex = {op.kind for graph in graphs for op in graph.operators if op.kind.startswith(_FLEX)}
    if flex and not is_trusted:
        raise UntrustedError(
            f"{model.path} uses operators of TensorFlow, some of which read and write files: "
            f"{', '.join(abbreviated(kind) for kind in sorted(flex)[:3])}",
            hint="if you trust its author, add --trust",
        )
    try:
        with silence(), ignore_warnings():
            return _tf.lite.Interpreter(model_path=str(model.path), num_threads=threads)
    except Exception as error:
        raise InputError(f"TensorFlow Lite cannot load {model.path}: {error_line(error)}") from error


def declared_shape(detail: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The shape of an input or output; in older files, without `shape_signature`, every axis is fixed."""
    signature = detail["shape_signature"]
    return tuple(None if length < 0 else int(length) for length in (signature if len(signature) else detail["shape"]))


@dataclass(frozen=True, slots=True)
class _Port:
    """An input or output, and its quantisation parameters."""

    name: str
    index: int
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]
    scale: float
    """Quantisation scale; 0 if the values are not quantised."""
    zero_point: int

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.shape[1:], np.dtype(np.float32).name if self.scale else self.dtype.name)

    def quantized(self, array: Array) -> Array:
        if not self.scale:
            return array.astype(self.dtype, copy=False)
        bounds = np.iinfo(self.dtype)
        whole: Array = np.clip(np.rint(array / self.scale) + self.zero_point, bounds.min, bounds.max)
        return whole.astype(self.dtype)

    def real(self, array: Array) -> Array:
        return ((array.astype(np.float32) - self.zero_point) * self.scale).astype(np.float32) if self.scale else array


class LiteModel:
    """Predicts with a TensorFlow Lite model; inputs and outputs are those of the model before it was quantised."""

    def __init__(self, model: ModelFile, origin: LoadOptions) -> None:
        self._path = model.path
        threads = threads_from_env() or usable_cores()
        self._interpreter = open_interpreter(model, is_trusted=origin.is_trusted, threads=threads)
        self._shapes: list[tuple[int, ...]] = []
        """Input shapes for which the interpreter has allocated its tensors."""
        try:
            runner: Any = None
            if len(self._interpreter.get_signature_list()) == 1:
                # The signature keeps the names of the model before conversion.
                runner = self._interpreter.get_signature_runner()
            self._inputs = _ports(self._interpreter.get_input_details(), runner and runner.get_input_details())
            self._outputs = _ports(self._interpreter.get_output_details(), runner and runner.get_output_details())
        except (ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"TensorFlow Lite cannot load {model.path}: {error_line(error)}") from error

    @property
    def signature(self) -> ModelSignature:
        """The inputs and outputs."""
        inputs, outputs = (tuple(port.spec for port in ports) for ports in (self._inputs, self._outputs))
        return ModelSignature(inputs, outputs, is_channels_first=False)

    def predict(self, x: Arrays) -> Arrays:
        """The outputs for one batch. If the file fixes the batch size, the batch is split and the last piece padded."""
        arrays = as_tuple(x)
        count = len(arrays[0])
        size = next((port.shape[0] for port in self._inputs if port.shape and port.shape[0]), count)
        pieces = [
            self._run([fill_rows(array[begin : begin + size], size) for array in arrays], min(size, count - begin))
            for begin in range(0, count, size)
        ]
        outputs = tuple(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]

    def _run(self, arrays: Sequence[Array], count: int) -> list[Array]:
        interpreter, size = self._interpreter, len(arrays[0])
        try:
            if self._shapes != (shapes := [array.shape for array in arrays]):
                with silence():
                    for port, shape in zip(self._inputs, shapes, strict=True):
                        interpreter.resize_tensor_input(port.index, shape)
                    interpreter.allocate_tensors()
                self._shapes = shapes
            for port, array in zip(self._inputs, arrays, strict=True):
                interpreter.set_tensor(port.index, port.quantized(array))
            interpreter.invoke()
        except Exception as error:
            raise UsageError(f"TensorFlow Lite cannot run {self._path}: {error_line(error)}") from error
        outputs = [port.real(interpreter.get_tensor(port.index)) for port in self._outputs]
        for port, output in zip(self._outputs, outputs, strict=True):
            if output.shape[:1] != (size,):
                raise InputError(f"the output {abbreviated(port.name)} of {self._path} has no batch axis")
        return [output[:count] for output in outputs]


def _ports(details: Sequence[Mapping[str, Any]], named: Mapping[str, Mapping[str, Any]] | None) -> tuple[_Port, ...]:
    names = {detail["index"]: name for name, detail in (named or {}).items()}
    return tuple(
        _Port(
            names.get(detail["index"], detail["name"]),
            detail["index"],
            declared_shape(detail),
            np.dtype(detail["dtype"]),
            float(detail["quantization"][0]) if np.dtype(detail["dtype"]).kind in "iu" else 0.0,
            int(detail["quantization"][1]),
        )
        for detail in details
    )
