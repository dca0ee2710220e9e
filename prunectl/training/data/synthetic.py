"""Examples that are made up: fit to see that things run, and no more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.readers import IndexedSource, from_arrays
from prunectl.training.data.spec import DataSpec, parse_count, parse_shape

_PREFIX = "random:"


def fits(where: str) -> bool:
    """Whether a SPEC asks for made-up examples."""
    return where.startswith(_PREFIX)


def open_random(spec: DataSpec, signature: ModelSignature | None, seed: int) -> IndexedSource:
    """The source that `random:64` means: normal floats, and labels of every class."""
    count = parse_count("random", spec.where.removeprefix(_PREFIX))
    if signature is None or not signature.inputs:
        raise UsageError(f"{spec.where} needs a model that says what it takes")
    typed = [parse_shape("shape", part) for part in spec.options["shape"].split("+")] if "shape" in spec.options else []
    if typed and len(typed) != len(signature.inputs):
        raise UsageError(
            f"shape={spec.options['shape']} names {len(typed)} shapes, the model has {len(signature.inputs)}"
        )
    random = np.random.default_rng(seed)
    x = {}
    for index, port in enumerate(signature.inputs):
        shape = typed[index] if typed else _known(port)
        x[f"input {index}"] = _filled(random, (count, *shape), port.dtype)
    y = {f"output {index}": _labels(random, count, port) for index, port in enumerate(signature.outputs)}
    note = f"{spec.where}: the data is made up, which shows that things run and says nothing of accuracy"
    return replace(from_arrays(spec.text, x, y, note), is_random=True)


def _known(port: TensorSpec) -> tuple[int, ...]:
    shape = port.shape
    if shape is None or any(length is None for length in shape):
        raise UsageError(
            f"the model does not say how long each axis of its input {port.name!r} is: {_axes_text(port)}",
            hint="say it: 'random:64?shape=3x224x224' (several inputs: shape=3x224x224+10)",
        )
    return tuple(length for length in shape if length is not None)


def _axes_text(port: TensorSpec) -> str:
    return "unknown" if port.shape is None else str(port.shape).replace("None", "?")


def _filled(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if dtype.startswith(("int", "uint", "bool")):
        # What these numbers count is unknown; 0 and 1 are within every vocabulary.
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape, np.float32)


def _labels(random: np.random.Generator, count: int, port: TensorSpec) -> Array:
    """A label for each vector of outputs; of two classes where there is one output, or nobody knows."""
    shape = port.shape or (None,)
    inner = tuple(length or 1 for length in shape[:-1])
    classes = shape[-1] or 2
    return random.integers(0, max(2, classes), (count, *inner))
