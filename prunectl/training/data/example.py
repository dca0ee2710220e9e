"""The features of a tf.train.Example, read off its wire format."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.formats.protobuf import BYTES, Field, WireError, fields, text, varints

Value = Array | list[bytes]
"""What a feature holds: 64-bit integers, 32-bit floats, or runs of bytes."""
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3


def features(record: bytes, what: str) -> Mapping[str, Value]:
    """Return the features of an example by their names."""
    data = memoryview(record)
    try:
        return dict(
            _entry(data, entry)
            for outer in fields(data)
            if (outer.number, outer.wire) == (1, BYTES)
            for entry in fields(data, outer.begin, outer.end)
            if (entry.number, entry.wire) == (1, BYTES)
        )
    except WireError as error:
        raise InputError(f"{what} is no tf.train.Example: {error}") from error


def kind(value: Value) -> str:
    """Return what a feature holds, in words."""
    if isinstance(value, list):
        return f"{len(value)} x bytes" if len(value) != 1 else f"{len(value[0])} bytes"
    return f"{value.size} x {value.dtype}"


def _entry(data: memoryview, entry: Field) -> tuple[str, Value]:
    name, value = "", list[bytes]()
    found: Value = value
    for field in fields(data, entry.begin, entry.end):
        if (field.number, field.wire) == (1, BYTES):
            name = text(data, field)
        elif (field.number, field.wire) == (2, BYTES):
            found = _feature(data, field)
    return name, found


def _feature(data: memoryview, feature: Field) -> Value:
    found: Value = []
    for field in fields(data, feature.begin, feature.end):
        if field.wire != BYTES:
            raise WireError(f"wire type {field.wire} in a feature")
        if field.number == _BYTES_LIST:
            found = [
                bytes(data[one.begin : one.end]) for one in fields(data, field.begin, field.end) if one.number == 1
            ]
        elif field.number == _FLOAT_LIST:
            found = _floats(data, field)
        elif field.number == _INT64_LIST:
            found = _integers(data, field)
    return found


def _floats(data: memoryview, values: Field) -> Array:
    runs = [bytes(data[one.begin : one.end]) for one in fields(data, values.begin, values.end) if one.number == 1]
    raw = b"".join(runs)
    if len(raw) % 4:
        raise WireError("a list of floats that ends within one")
    return np.frombuffer(raw, "<f4")


def _integers(data: memoryview, values: Field) -> Array:
    runs = [
        varints(bytes(data[one.begin : one.end])) if one.wire == BYTES else np.array([one.value], np.uint64)
        for one in fields(data, values.begin, values.end)
        if one.number == 1
    ]
    return np.concatenate(runs).view(np.int64) if runs else np.zeros(0, np.int64)
