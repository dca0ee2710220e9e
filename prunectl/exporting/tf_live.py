"""A function of TensorFlow that stands for a whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunectl.errors import UsageError
from prunectl.exporting.live import Flow
from prunectl.formats.base import Array
from prunectl.training.keras.library import keras_two, quietly
from prunectl.training.keras.loading import first_line

_tf = keras_two().tensorflow


@dataclass(frozen=True, slots=True)
class TfLive:
    """A model as TensorFlow runs it."""

    inputs: tuple[Flow, ...]
    answers: tuple[str, ...]
    """Names of the outputs, in their order."""
    call: Callable[[Sequence[Any]], list[Any]]
    """From tensors to tensors."""
    graph: Callable[[Sequence[Any]], list[Any]]
    """The same, traced: some layers run in no other way."""
    holder: Any
    """What holds the variables."""
    is_channels_first: bool = False
    notes: tuple[str, ...] = ()
    keras: Any = field(default=None)
    """The loaded Keras model, where it is one."""

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """Return what comes out."""
        given = [_tf.constant(one, flow.dtype or None) for one, flow in zip(inputs, self.inputs, strict=True)]
        try:
            with quietly():
                found = self.graph(given)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, one.shape)) for one in inputs)
            raise UsageError(
                f"the model does not take inputs of {shapes}: {reason(error)}",
                hint="--data SPEC shows what it takes, or --input x:1,224,224,3:f32 says it",
            ) from error
        return {name: one.numpy() for name, one in zip(self.answers, found, strict=True)}

    def specs(self, flows: tuple[Flow, ...]) -> list[Any]:
        """Return what goes in, as TensorFlow says it."""
        return [_tf.TensorSpec(flow.shape, flow.dtype or "float32", name=flow.name) for flow in flows]


_WHERE = ("Graph execution error", "Detected at", "<stack", "[[", "File ", "Traceback")


def reason(error: Exception) -> str:
    """Return the line in which TensorFlow comes to the point, behind those that say where it was."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(_WHERE)]
    return told[0][:300].rstrip(".:") if told and lines[0].startswith(_WHERE) else first_line(error)
