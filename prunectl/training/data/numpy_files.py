"""Arrays in .npy and .npz files, memory-mapped where they are not compressed."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from prunectl.errors import InputError, UsageError, first_line
from prunectl.formats.base import Array
from prunectl.formats.extents import check_inside
from prunectl.formats.zip_read import Archive, open_archive
from prunectl.training.backend import ModelSignature
from prunectl.training.data.readers import NUMERIC, TARGETS, IndexedSource, from_arrays, order_by_port
from prunectl.training.data.spec import NPY_SEPARATOR, NPZ_ARRAYS, DataSpec, require_path


class Header(NamedTuple):
    """The header of a .npy array."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[np.generic]
    nbytes: int
    """The length of the header itself."""


def open_npy(spec: DataSpec, signature: ModelSignature | None, *_: object) -> IndexedSource:
    """Open `a.npy+b.npy,y.npy`: inputs, then targets."""
    inputs, *rest = _split_sides(spec)
    targets = rest[0] if rest else []
    x, y, notes = _match_order(
        spec, [Path(name).stem for name in inputs], [Path(name).stem for name in targets], signature
    )
    return from_arrays(
        spec.text,
        {inputs[index]: map_npy(require_path(Path(inputs[index]))) for index in x},
        {targets[index]: map_npy(require_path(Path(targets[index]))) for index in y},
        *notes,
    )


def npy_names(spec: DataSpec) -> list[str]:
    """The names of the arrays, which are those of their files without suffix."""
    return [Path(name).stem for side in _split_sides(spec) for name in side]


def _match_order(
    spec: DataSpec, inputs: Sequence[str], targets: Sequence[str], signature: ModelSignature | None
) -> tuple[list[int], list[int], tuple[str, ...]]:
    """The order of inputs and targets in the model, and notes for the user."""
    x, x_notes = order_by_port(spec.text, inputs, signature.inputs if signature else ())
    y, y_notes = order_by_port(spec.text, targets, signature.outputs if signature else ())
    return x, y, (*x_notes, *y_notes)


def _split_sides(spec: DataSpec) -> list[list[str]]:
    sides: list[list[str]] = [[]]
    for part in NPY_SEPARATOR.split(spec.where):
        if part == ",":
            sides.append([])
        elif part != "+":
            sides[-1].append(part)
    if len(sides) > 2:
        raise UsageError(
            f"{spec.where} names {len(sides)} groups of arrays, but there are only inputs and targets",
            hint="join several inputs with +, as in a.npy+b.npy,y.npy",
        )
    names = [name for side in sides for name in side]
    if any(not name.endswith(".npy") for name in names) or len(set(names)) < len(names):
        raise UsageError(f"{spec.where} is not a list of .npy files", hint="write x.npy,y.npy or a.npy+b.npy,y.npy")
    return sides


def map_npy(path: Path) -> Array:
    """Memory-map the array in a file."""
    with path.open("rb") as file:
        header = read_header(file, str(path))
    file_bytes = path.stat().st_size
    return map_array(path, header, header.nbytes, file_bytes - header.nbytes, str(path))


def map_array(path: Path, header: Header, offset: int, nbytes: int, what: str) -> Array:
    """Memory-map an array at an offset of a file."""
    size = int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
    check_inside(path, 0, size, nbytes, what)
    if not size:
        return np.zeros(header.shape, header.dtype)
    return np.memmap(path, header.dtype, "r", offset, header.shape, "F" if header.is_fortran else "C")


def read_header(file: BinaryIO, what: str) -> Header:
    """Read the header of an array; refuse arrays of Python objects, which would have to be unpickled."""
    begin = file.tell()
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except (ValueError, EOFError, struct.error) as error:
        raise InputError(f"{what} is damaged: it is not a NumPy array ({first_line(error)})") from error
    if dtype.hasobject:
        raise InputError(f"{what} holds Python objects, which prunectl never unpickles", hint="save arrays of numbers")
    if dtype.kind not in NUMERIC or min(shape, default=0) < 0:
        raise InputError(f"{what} is an array of {dtype}, not of numbers", hint="save labels as whole numbers from 0")
    return Header(shape, is_fortran, dtype, file.tell() - begin)


_USUAL_NAMES = (("x", "y"), ("X", "y"), ("x_train", "y_train"), ("X_train", "y_train"))


def open_npz(spec: DataSpec, signature: ModelSignature | None, *_: object) -> IndexedSource:
    """Open `train.npz` or `train.npz[a+b,labels]`."""
    archive, names, chosen = _archive(spec)
    inputs, targets, notes = (
        (*_named_arrays(archive.path, chosen, names), ())
        if chosen is not None
        else _arrays_of_model(archive.path, names, signature) or _guessed_arrays(archive, names)
    )
    x_order, y_order, matched = _match_order(spec, inputs, targets, signature)
    x = {inputs[index]: _array(archive, inputs[index]) for index in x_order}
    y = {targets[index]: _array(archive, targets[index]) for index in y_order}
    return from_arrays(spec.text, x, y, *notes, *matched)


def npz_names(spec: DataSpec) -> list[str]:
    """The names of the selected arrays: those in brackets, or else all."""
    archive, names, chosen = _archive(spec)
    return names if chosen is None else [name for side in _named_arrays(archive.path, chosen, names) for name in side]


def _archive(spec: DataSpec) -> tuple[Archive, list[str], str | None]:
    """The archive of a SPEC, the names of its arrays, and the text in brackets, if there is any."""
    chosen = NPZ_ARRAYS.fullmatch(spec.where)
    path = require_path(Path(chosen["path"] if chosen else spec.where))
    archive = open_archive(path)
    names = [name.removesuffix(".npy") for name in archive.entries if name.endswith(".npy")]
    if not names:
        raise InputError(f"{path} holds no arrays")
    return archive, names, chosen["names"] if chosen else None


def _named_arrays(path: Path, text: str, names: list[str]) -> tuple[list[str], list[str]]:
    sides = [[name.strip() for name in side.split("+")] for side in text.split(",")]
    if len(sides) > 2:
        raise UsageError(
            f"{path}[{text}] names {len(sides)} groups of arrays, but there are only inputs and targets",
            hint=f"join several inputs with +, as in {path.name}[a+b,labels]",
        )
    for name in (name for side in sides for name in side):
        if name not in names:
            raise UsageError(
                f"{path} has no array {name!r}",
                did_you_mean=tuple(get_close_matches(name, names)),
                hint=f"arrays: {', '.join(names)}",
            )
    return sides[0], sides[1] if len(sides) > 1 else []


def _arrays_of_model(
    path: Path, names: list[str], signature: ModelSignature | None
) -> tuple[list[str], list[str], tuple[str, ...]] | None:
    """Match arrays with a model: inputs by name; targets by output names, else the only other array or a usual name."""
    inputs = [port.name for port in signature.inputs] if signature else []
    if signature is None or not inputs or not set(inputs) <= set(names):
        return None
    outputs = [port.name for port in signature.outputs]
    rest = [name for name in names if name not in inputs]
    if outputs and set(outputs) <= set(rest):
        return inputs, outputs, ()
    # With the inputs of a text model, files hold further tokenizer outputs, which it does not use.
    is_sure = len(rest) == 1 and signature.text is None
    targets = rest if is_sure else [name for name in rest if name in TARGETS]
    if len(targets) > 1 or (rest and not targets and signature.text is None):
        return None
    unused = [name for name in rest if name not in targets]
    notes = [f"{path}: {name} is used as targets" for name in targets if name not in TARGETS]
    return inputs, targets, (*notes, *(f"{path}: {name} is not used" for name in unused))


def _guessed_arrays(archive: Archive, names: list[str]) -> tuple[list[str], list[str], tuple[str, ...]]:
    for x, y in _USUAL_NAMES:
        if x in names and y in names:
            return [x], [y], ()
    if len(names) == 1:
        return names, [], ()
    if len(names) == 2:
        # The array with fewer axes holds the targets; if both have as many, the second in the file does.
        x, y = sorted(names, key=lambda name: -len(_header(archive, name).shape))
        path = archive.path
        return (
            [x],
            [y],
            (f"{path}: {x} is used as inputs and {y} as targets; to swap them, write {path.name}[{y},{x}]",),
        )
    raise UsageError(
        f"{archive.path} has no arrays called x and y",
        hint=f"name inputs, then targets, several joined with +: {archive.path.name}[a+b,labels]; "
        f"arrays: {', '.join(names)}",
    )


def _header(archive: Archive, name: str) -> Header:
    return read_header(io.BytesIO(_first_bytes(archive, name)), f"{name} in {archive.path}")


def _first_bytes(archive: Archive, name: str) -> bytes:
    """The first bytes of an entry, which contain its whole header."""
    entry = archive.entries[f"{name}.npy"]
    return next(archive.pieces(entry), b"")


def _array(archive: Archive, name: str) -> Array:
    what = f"{name} in {archive.path}"
    entry = archive.entries[f"{name}.npy"]
    header = _header(archive, name)
    if entry.is_stored:
        return map_array(archive.path, header, entry.extent.offset + header.nbytes, entry.nbytes - header.nbytes, what)
    return _as_array(archive.inflated(entry)[header.nbytes :], header, what)


def _as_array(body: Array, header: Header, what: str) -> Array:
    size = math.prod(header.shape) * header.dtype.itemsize
    if size != body.nbytes:
        raise InputError(f"{what} is damaged: its header announces {size} bytes, but {body.nbytes} follow")
    return body.view(header.dtype).reshape(header.shape, order="F" if header.is_fortran else "C")
