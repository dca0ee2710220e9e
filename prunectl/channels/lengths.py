"""The lengths of axes that a file leaves open: from `--input`, from the user's data, or the first ones that work."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunectl.channels.graph import Shape
from prunectl.errors import UsageError
from prunectl.training.backend import ModelSignature
from prunectl.training.task import shape_matches

OpenShape = tuple[int | None, ...]
DataShapes = Callable[[ModelSignature], Sequence[Shape] | None]
"""From the signature of a model to the shapes of the user's data, without the batch axis; None if unknown."""
TRIED_LENGTHS = (64, 224)
"""The lengths to try for open axes other than the batch, if neither options nor data give them."""
_LENGTH = r"(?:\?|-1|[1-9]\d*)"
_SHAPE = re.compile(rf"{_LENGTH}(?:[,x]{_LENGTH})*")
_DTYPES = {
    "f32": "float32",
    "f64": "float64",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
}


@dataclass(frozen=True, slots=True)
class InputOption:
    """One `--input` option, `[NAME:]SHAPE[:TYPE]`."""

    name: str
    shape: OpenShape
    """With the batch axis; None for an axis that is written -1 or ?."""
    dtype: str
    """A NumPy name such as float32; empty if not given."""

    @property
    def lengths(self) -> Shape:
        """The lengths of the axes that are not left open."""
        return tuple(length for length in self.shape if length is not None)


def parse_input(text: str, example: str) -> InputOption:
    """Parse `[NAME:]SHAPE[:TYPE]`, such as `x:1,3,224,224:f32` or `1x128:i64`."""
    *names, shape = text.split(":")
    dtype = ""
    if names and not _is_shape(shape) and _is_shape(names[-1]):
        dtype, shape = shape, names.pop()
        if dtype not in {*_DTYPES, *_DTYPES.values()}:
            raise UsageError(
                f"{dtype!r} in --input {text} is not a type of numbers", hint=f"known: {', '.join(_DTYPES)}"
            )
    if not _is_shape(shape):
        raise no_shape(text, example)
    axes = re.split("[,x]", shape.replace(" ", ""))
    lengths = tuple(None if axis in {"?", "-1"} else int(axis) for axis in axes)
    return InputOption(":".join(names), lengths, _DTYPES.get(dtype, dtype))


def no_shape(text: str, example: str) -> UsageError:
    """The error for an `--input` that is not a valid shape."""
    return UsageError(f"--input {text} is not a shape", hint=f"write --input {example}")


def _is_shape(text: str) -> bool:
    return _SHAPE.fullmatch(text.replace(" ", "")) is not None


@dataclass(frozen=True, slots=True)
class AxisLengths:
    """The lengths of open axes from options and data."""

    shape_options: tuple[str, ...] = ()
    """The `--input` options: `1,3,224,224`, or `name:1,3,224,224`."""
    data: DataShapes | None = None

    def resolve(self, signature: ModelSignature) -> dict[str, Shape]:
        """The shape of each input without the batch axis, empty if unknown; UsageError where the file contradicts."""
        names = [port.name for port in signature.inputs]
        is_open = any(port.shape is None or None in port.shape for port in signature.inputs)
        shapes: Sequence[Shape] | None = None
        if self.shape_options:
            shapes = _parse_shapes(self.shape_options, names)
        elif self.data is not None and is_open:
            shapes = self.data(signature)
        if shapes is None:
            return {}
        for port, shape in zip(signature.inputs, shapes, strict=True):
            if port.shape is not None and not shape_matches(shape, port.shape):
                raise UsageError(
                    f"the input {port.name} of the model has the shape {shape_text((None, *port.shape))}, "
                    f"but {'--input' if self.shape_options else 'the data'} gives {shape_text((1, *shape))}",
                    hint="the length of an axis that the model fixes cannot be changed",
                )
        return dict(zip(names, shapes, strict=True))


UNKNOWN_LENGTHS = AxisLengths()
_EXAMPLE = "1,3,224,224 or name:1,3,224,224"


def _parse_shapes(texts: Sequence[str], names: Sequence[str]) -> list[Shape]:
    """The shapes of the `--input` options without the batch axis, in the order of the model's inputs."""
    options = [parse_input(text, _EXAMPLE) for text in texts]
    for text, option in zip(texts, options, strict=True):
        if option.dtype or option.lengths != option.shape:
            raise no_shape(text, _EXAMPLE)
    ordered = in_order(options, names)
    if unknown := sorted({option.name for option in options} - {"", *names}):
        raise UsageError(f"the model has no input {unknown[0]}", hint=f"inputs: {', '.join(names)}")
    # Without the batch axis, whose length is not taken from the option.
    return [option.lengths[1:] for option in ordered]


def in_order(options: Sequence[InputOption], names: Sequence[str]) -> Sequence[InputOption]:
    """The options in the order of the inputs if all inputs are named; else in the order that was typed."""
    if len(options) != len(names):
        inputs = f"{len(names)} input{'s' * (len(names) != 1)} ({', '.join(names)})"
        raise UsageError(f"the model has {inputs}, but --input gives {len(options)}")
    by_name = {option.name: option for option in options}
    return [by_name[name] for name in names] if by_name.keys() == set(names) else options


def shape_text(shape: OpenShape | None) -> str:
    """A shape as text, such as ?,3,224,224."""
    return "?" if shape is None else ",".join("?" if length is None else str(length) for length in shape)
