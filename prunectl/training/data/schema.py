"""Which features of an example are inputs and targets, in what shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.data.arrays import NUMERIC
from prunectl.training.data.example import Value, kind
from prunectl.training.data.pictures import Look, decode

KEYS = ("feature", "dtype", "shape", "encoding")
ENCODINGS = ("raw", "image")
EXAMPLE = '{"x": {"feature": "image", "dtype": "uint8", "shape": [28, 28, 1]}, "y": {"feature": "label"}}'


@dataclass(frozen=True, slots=True)
class Feature:
    """How one feature becomes an array."""

    name: str
    dtype: np.dtype[Any] | None
    """None keeps what the feature holds."""
    shape: tuple[int, ...]
    is_image: bool

    def array(self, values: Mapping[str, Value], what: str) -> Array:
        """Return the feature of one example."""
        if self.name not in values:
            held = ", ".join(f"{name} ({kind(value)})" for name, value in values.items())
            raise InputError(
                f"{what} has no feature {self.name!r}",
                did_you_mean=tuple(get_close_matches(self.name, values)),
                hint=f"it has {held or 'none'}",
            )
        found = values[self.name]
        flat = self._from_bytes(found, what) if isinstance(found, list) else found
        if flat.size != int(np.prod(self.shape)):
            raise InputError(
                f"{what}: the feature {self.name!r} holds {flat.size} numbers ({kind(found)}), "
                f"and the schema says {list(self.shape)}"
            )
        shaped = flat.reshape(self.shape)
        return shaped if self.dtype is None or isinstance(found, list) else shaped.astype(self.dtype)

    def _from_bytes(self, found: list[bytes], what: str) -> Array:
        if len(found) != 1:
            raise InputError(f"{what}: the feature {self.name!r} holds {kind(found)}, not one run of bytes")
        if self.is_image:
            height, width, *channels = self.shape
            color = "rgb" if channels == [3] else "grey"
            return decode(found[0], Look(color, (height, width)), f"{what}, feature {self.name!r}")
        if self.dtype is None:
            raise UsageError(f"the feature {self.name!r} holds bytes: the schema must say their dtype", hint=EXAMPLE)
        if len(found[0]) % self.dtype.itemsize:
            raise InputError(f"{what}: the feature {self.name!r} ends within a {self.dtype}")
        return np.frombuffer(found[0], self.dtype.newbyteorder("<"))


@dataclass(frozen=True, slots=True)
class Schema:
    """The inputs and the targets of an example."""

    x: tuple[Feature, ...]
    y: tuple[Feature, ...]


def read(path: Path) -> Schema:
    """Return the schema in a JSON file."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON", hint=f"a schema is {EXAMPLE}") from error
    if not isinstance(found, dict) or "x" not in found or found.keys() - {"x", "y"}:
        raise InputError(f"{path} is no schema: it has x, and y where there are targets", hint=EXAMPLE)
    return Schema(_side(path, found["x"]), _side(path, found["y"]) if "y" in found else ())


def _side(path: Path, said: Any) -> tuple[Feature, ...]:
    many = said if isinstance(said, list) else [said]
    if not many:
        raise InputError(f"{path} is no schema: a list of features is empty", hint=EXAMPLE)
    return tuple(_feature(path, one) for one in many)


def _feature(path: Path, said: Any) -> Feature:
    if not isinstance(said, dict) or not isinstance(said.get("feature"), str):
        raise InputError(f"{path} is no schema: each of x and y names a feature", hint=EXAMPLE)
    for key in said:
        if key not in KEYS:
            raise InputError(
                f"{path}: a feature has no {key!r}",
                did_you_mean=tuple(get_close_matches(key, KEYS)),
                hint=f"it has {', '.join(KEYS)}",
            )
    shape = said.get("shape", [])
    if not isinstance(shape, list) or not all(type(length) is int and length > 0 for length in shape):
        raise InputError(f"{path}: the shape {shape} of {said['feature']} is no list of lengths", hint=EXAMPLE)
    encoding = said.get("encoding", "raw")
    if encoding not in ENCODINGS:
        raise InputError(f"{path}: the encoding {encoding!r} is not known", hint=f"known: {', '.join(ENCODINGS)}")
    if encoding == "image" and (len(shape) not in {2, 3} or (len(shape) == 3 and shape[2] not in {1, 3})):
        raise InputError(f"{path}: a picture has the shape [height, width, 1 or 3], not {shape}")
    return Feature(said["feature"], _dtype(path, said.get("dtype")), tuple(shape), encoding == "image")


def _dtype(path: Path, name: Any) -> np.dtype[Any] | None:
    if name is None:
        return None
    try:
        found = np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        found = None
    if found is None or found.kind not in NUMERIC:
        raise InputError(f"{path}: {name!r} is no type of numbers", hint="such as uint8, int64 or float32")
    return found
