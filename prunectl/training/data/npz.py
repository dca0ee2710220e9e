"""Arrays in .npz files: mapped where they are stored as they are, inflated one by one where they are not."""

from __future__ import annotations

import io
import math
import re
from difflib import get_close_matches
from pathlib import Path

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.formats.zips import Archive, open_archive
from prunectl.training.data.arrays import from_arrays
from prunectl.training.data.grammar import Spec, existing
from prunectl.training.data.npy import Header, map_array, read_header
from prunectl.training.data.rows import Rows

_CHOSEN = re.compile(r"(?P<path>.+\.npz)\[(?P<names>.*)\]")
_USUAL = (("x", "y"), ("X", "y"), ("x_train", "y_train"), ("X_train", "y_train"))


def fits(where: str) -> bool:
    """Whether a SPEC names an .npz file."""
    return where.endswith(".npz") or _CHOSEN.fullmatch(where) is not None


def open_npz(spec: Spec) -> Rows:
    """Return the source that `train.npz` or `train.npz[a+b,labels]` means."""
    chosen = _CHOSEN.fullmatch(spec.where)
    path = existing(Path(chosen["path"] if chosen else spec.where))
    archive = open_archive(path)
    names = [name.removesuffix(".npy") for name in archive.entries if name.endswith(".npy")]
    if not names:
        raise InputError(f"{path} holds no arrays")
    inputs, targets, notes = (*_said(path, chosen["names"], names), ()) if chosen else _found(archive, names)
    x = {name: _array(archive, name) for name in inputs}
    y = {name: _array(archive, name) for name in targets}
    return from_arrays(spec.text, x, y, *notes)


def _said(path: Path, words: str, names: list[str]) -> tuple[list[str], list[str]]:
    sides = [[name.strip() for name in side.split("+")] for side in words.split(",")]
    if len(sides) > 2:
        raise UsageError(
            f"{path}[{words}] names {len(sides)} sides: there are inputs and targets",
            hint=f"several inputs are joined with +, as in {path.name}[a+b,labels]",
        )
    for name in (name for side in sides for name in side):
        if name not in names:
            raise UsageError(
                f"{path} holds no array {name!r}",
                did_you_mean=tuple(get_close_matches(name, names)),
                hint=f"it holds {', '.join(names)}",
            )
    return sides[0], sides[1] if len(sides) > 1 else []


def _found(archive: Archive, names: list[str]) -> tuple[list[str], list[str], tuple[str, ...]]:
    for x, y in _USUAL:
        if x in names and y in names:
            return [x], [y], ()
    if len(names) == 1:
        return names, [], ()
    if len(names) == 2:
        # The array with fewer axes is the one of targets; where that does not tell, the file's order does.
        x, y = sorted(names, key=lambda name: -len(_header(archive, name).shape))
        path = archive.path
        return [x], [y], (f"{path}: {x} is taken for the inputs and {y} for the targets; {path.name}[{y},{x}] swaps",)
    raise UsageError(
        f"{archive.path} has no arrays called x and y",
        hint=f"choose, as in {archive.path.name}[{names[0]},{names[1]}]; it holds {', '.join(names)}",
    )


def _header(archive: Archive, name: str) -> Header:
    return read_header(io.BytesIO(_opening(archive, name)), f"{name} in {archive.path}")


def _opening(archive: Archive, name: str) -> bytes:
    """Return the first bytes of an entry, in which its header ends."""
    entry = archive.entries[f"{name}.npy"]
    return next(archive.pieces(entry), b"")


def _array(archive: Archive, name: str) -> Array:
    what = f"{name} in {archive.path}"
    entry = archive.entries[f"{name}.npy"]
    header = _header(archive, name)
    if entry.is_stored:
        return map_array(archive.path, header, entry.extent.offset + header.nbytes, entry.nbytes - header.nbytes, what)
    return _arranged(archive.inflated(entry)[header.nbytes :], header, what)


def _arranged(body: Array, header: Header, what: str) -> Array:
    size = math.prod(header.shape) * header.dtype.itemsize
    if size != body.nbytes:
        raise InputError(f"{what} is damaged: its header says {size} bytes, and {body.nbytes} follow")
    return body.view(header.dtype).reshape(header.shape, order="F" if header.is_fortran else "C")
