"""Tensors of an ONNX model that lie in files beside it."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from prunectl.errors import InputError, abbreviated
from prunectl.formats.extents import Extent, check_inside

_MAX_DIGITS = 19


class Neighbours:
    """The files beside a model that its tensors lie in; none outside its folder."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._sizes: dict[str, int] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that a tensor lies in."""
        return tuple(self._model.parent / location for location in self._sizes)

    def extent(self, name: str, facts: Mapping[str, str], nbytes: int) -> Extent:
        """Return where the bytes of a tensor lie, checked to be there."""
        location = facts.get("location", "")
        if location not in self._sizes:
            self._sizes[location] = self._size(location)
        offset = self._number(name, facts.get("offset", "0"))
        length = self._number(name, facts.get("length", str(nbytes)))
        if length != nbytes:
            raise InputError(
                f"{self._model} is damaged: {abbreviated(name)} needs {nbytes} bytes, its external data has {length}"
            )
        path = self._model.parent / location
        check_inside(path, offset, nbytes, self._sizes[location], f"{name} of {self._model.name}")
        return Extent(path, offset, nbytes)

    def _number(self, name: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
            raise InputError(
                f"{self._model} is damaged: the place of {abbreviated(name)} in its external data is no number"
            )
        return int(text)

    def _size(self, location: str) -> int:
        if not location or "\0" in location:
            raise InputError(f"{self._model} is damaged: its external data has no file name")
        outside = f"{self._model} is refused: its external data points outside its folder ({location})"
        if PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
            raise InputError(outside)
        if ".." in PureWindowsPath(location).parts:
            raise InputError(outside)
        path = self._model.parent / location
        try:
            # A cache of models keeps links in one folder to files in another: there both lead to the same place.
            homes = {self._model.parent.resolve(), self._model.resolve().parent}
            if not any(path.resolve().is_relative_to(home) for home in homes):
                raise InputError(outside)
            facts = path.stat()
        except FileNotFoundError as error:
            raise InputError(f"{self._model} is incomplete: its external data file {path} is missing") from error
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self._model} is incomplete: its external data file {path} cannot be read") from error
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"{self._model} is refused: its external data {path} is not a file")
        return facts.st_size


def refuse_overlaps(model: Path, places: Iterable[tuple[str, Extent]]) -> None:
    """Reject tensors that share a part of their bytes: shared are all of them or none."""
    last: dict[Path, tuple[int, int]] = {}
    for name, extent in sorted(places, key=lambda place: (place[1].offset, place[1].nbytes)):
        begin, end = last.get(extent.path, (0, 0))
        this = (extent.offset, extent.offset + extent.nbytes)
        if extent.nbytes and this != (begin, end):
            if extent.offset < end:
                raise InputError(
                    f"{model} is damaged: {abbreviated(name)} overlaps another tensor in {extent.path.name}"
                )
            last[extent.path] = this
