"""A safetensors file: wide numbers first and then by name, so that the same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.formats.base import Array
from prunectl.formats.safetensors_header import CODES, framed


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that is read when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]


def write(entries: Sequence[Entry], metadata: Mapping[str, str], target: Path) -> None:
    """Write a file, one tensor in memory at a time."""
    ordered = sorted(entries, key=lambda one: (-one.dtype.itemsize, one.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for one in ordered:
        end = at + int(np.prod(one.shape, dtype=np.int64)) * one.dtype.itemsize
        header[one.name] = {
            "dtype": CODES[one.dtype.newbyteorder("=")],
            "shape": list(one.shape),
            "data_offsets": [at, end],
        }
        at = end
    with target.open("xb") as file:
        file.write(framed(header))
        for one in ordered:
            file.write(np.ascontiguousarray(one.read()).tobytes())


def save(arrays: Sequence[tuple[str, Array]], metadata: Mapping[str, str], target: Path) -> None:
    """Write arrays that are in memory."""
    write([_entry(name, array) for name, array in arrays], metadata, target)


def _entry(name: str, array: Array) -> Entry:
    return Entry(name, array.shape, array.dtype, lambda: array)
