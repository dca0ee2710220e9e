"""Arrays in .npy files, paged in as they are touched."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from prunectl.errors import InputError, UsageError, first_line
from prunectl.formats.base import Array
from prunectl.formats.extents import check_inside
from prunectl.training.data.arrays import NUMERIC, from_arrays
from prunectl.training.data.grammar import Spec, existing
from prunectl.training.data.rows import Rows

_BETWEEN = re.compile(r"(?<=\.npy)([,+])")


class Header(NamedTuple):
    """What an array says of itself before its bytes begin."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[np.generic]
    nbytes: int
    """Of the header itself."""


def fits(where: str) -> bool:
    """Whether a SPEC names .npy files."""
    return where.endswith(".npy")


def open_npy(spec: Spec) -> Rows:
    """Return the source that `a.npy+b.npy,y.npy` means: inputs, then targets."""
    inputs, *targets = _sides(spec)
    x = {name: map_npy(existing(Path(name))) for name in inputs}
    y = {name: map_npy(existing(Path(name))) for name in (targets[0] if targets else [])}
    return from_arrays(spec.text, x, y)


def _sides(spec: Spec) -> list[list[str]]:
    sides: list[list[str]] = [[]]
    for word in _BETWEEN.split(spec.where):
        if word == ",":
            sides.append([])
        elif word != "+":
            sides[-1].append(word)
    if len(sides) > 2:
        raise UsageError(
            f"{spec.where} names {len(sides)} sides: there are inputs and targets",
            hint="several inputs are joined with +, as in a.npy+b.npy,y.npy",
        )
    names = [name for side in sides for name in side]
    if any(not name.endswith(".npy") for name in names) or len(set(names)) < len(names):
        raise UsageError(f"{spec.where} is no list of .npy files", hint="write x.npy,y.npy or a.npy+b.npy,y.npy")
    return sides


def map_npy(path: Path) -> Array:
    """Return the array in a file without reading it."""
    with path.open("rb") as file:
        header = read_header(file, str(path))
    file_bytes = path.stat().st_size
    return map_array(path, header, header.nbytes, file_bytes - header.nbytes, str(path))


def map_array(path: Path, header: Header, offset: int, nbytes: int, what: str) -> Array:
    """Return the array whose bytes lie at an offset of a file."""
    size = int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
    check_inside(path, 0, size, nbytes, what)
    if not size:
        return np.zeros(header.shape, header.dtype)
    return np.memmap(path, header.dtype, "r", offset, header.shape, "F" if header.is_fortran else "C")


def read_header(file: BinaryIO, what: str) -> Header:
    """Return what an array says of itself; never one of Python objects, which would have to be unpickled."""
    begin = file.tell()
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except (ValueError, EOFError, struct.error) as error:
        raise InputError(f"{what} is damaged: it is not an array of NumPy ({first_line(error)})") from error
    if dtype.hasobject:
        raise InputError(f"{what} holds Python objects, which prunectl never unpickles", hint="save plain numbers")
    if dtype.kind not in NUMERIC or min(shape, default=0) < 0:
        raise InputError(f"{what} is an array of {dtype}, not of numbers", hint="write labels as whole numbers from 0")
    return Header(shape, is_fortran, dtype, file.tell() - begin)
