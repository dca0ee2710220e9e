"""An ONNX model in memory: its graph as a message, and what its tensors hold now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from prunectl.errors import InputError, first_line
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.optional import require
from prunectl.training.onnx.slots import fill, settle


class Held:
    """A model whose tensors can be changed; what was not stays in the file."""

    def __init__(self, model: ModelFile, proto: Any) -> None:
        self.model = model
        self.proto = proto
        """What onnxruntime is given, together with what stands outside."""
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        self._slots = settle(proto, self._tensors)
        self._assigned: dict[str, Array] = {}
        for name, slot in self._slots.inside.items():
            fill(slot, self.value(name))

    @property
    def weights(self) -> frozenset[str]:
        """The tensors of the main graph."""
        return self._slots.main

    @property
    def outside(self) -> dict[str, Array]:
        """The numbers that are not in the message."""
        return {name: self.value(name) for name in self._slots.outside}

    def tensor(self, name: str) -> Tensor:
        """Return what the file says of a tensor."""
        return self._tensors[name]

    def value(self, name: str) -> Array:
        """Return the numbers of a tensor, not to be written to."""
        found = self._assigned.get(name)
        return found if found is not None else self.model.read(self._tensors[name])

    def copies(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Return copies of some tensors, or of all."""
        return {name: np.array(self.value(name)) for name in (self._tensors if names is None else names)}

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of tensors, and of those that share their bytes in the file."""
        for name, value in values.items():
            tensor = self._tensors[name]
            if tensor.shape != np.shape(value):
                raise ValueError(f"{name} has the shape {tensor.shape}, not {np.shape(value)}")
            for tied in self._tensors.values():
                if tied.storage.key == tensor.storage.key:
                    self._put(tied, value)

    def _put(self, tensor: Tensor, value: Array) -> None:
        array = np.array(value, tensor.dtype).reshape(tensor.shape)
        self._assigned[tensor.name] = array
        if tensor.name not in self._slots.outside:
            fill(self._slots.inside[tensor.name], array)


def hold(model: ModelFile) -> Held:
    """Read the message of a model; the handler has checked where its numbers lie, and reads them."""
    onnx = require("onnx", extra="onnx")
    try:
        proto = onnx.load(model.path, load_external_data=False)
    except Exception as error:
        line = first_line(error)
        raise InputError(f"{model.path} cannot be read by onnx: {line}") from error
    return Held(model, proto)
