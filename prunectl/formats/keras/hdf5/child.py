"""Entry points of the sandboxed child: list the objects of an HDF5 file with libhdf5, and read a dataset."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.errors import InputError, abbreviated
from prunectl.formats import budgets
from prunectl.formats.base import format_shape


@dataclass(frozen=True, slots=True)
class H5Location:
    """An HDF5 file, alone or inside another."""

    path: Path
    offset: int
    nbytes: int

    def open(self) -> Any:
        """Open the file with h5py."""
        if self.offset:
            return h5py.File(_FileRange(self), "r")
        return h5py.File(self.path, "r", locking=False)


class _FileRange(RawIOBase):
    """A part of a file as a file, which h5py reads through."""

    def __init__(self, location: H5Location) -> None:
        super().__init__()
        self._fd = os.open(location.path, os.O_RDONLY | os.O_CLOEXEC)
        self._location = location
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._location.nbytes}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        want = max(min(len(buffer), self._location.nbytes - self._position), 0)
        got = os.preadv(self._fd, [memoryview(buffer)[:want]], self._location.offset + self._position)
        self._position += got
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def list_objects(location: H5Location) -> dict[str, Any]:
    """The datasets of a file and the attributes of its groups, as JSON can carry them."""
    with location.open() as file:
        datasets: list[dict[str, Any]] = []
        attributes: dict[str, dict[str, Any]] = {}
        budget = AttributeBudget(location.path)
        for name, member in _objects(file, location.path):
            if isinstance(member, h5py.Dataset):
                description = _dataset(name, member, location.path)
                if description:
                    datasets.append(description)
            else:
                values = _attributes(member, budget)
                if values:
                    attributes[name] = values
        return {"datasets": datasets, "attributes": attributes}


def _objects(file: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield groups and datasets with their paths, without following a link out of the file or around in it."""
    pending: list[tuple[str, Any, int]] = [("", file["/"], 0)]
    groups: set[int] = set()
    count = 0
    while pending:
        name, group, depth = pending.pop()
        if depth > budgets.MAX_HDF5_DEPTH:
            raise InputError(f"{path} is refused: its groups are nested more than {budgets.MAX_HDF5_DEPTH} deep")
        address = h5py.h5o.get_info(group.id).addr
        if address in groups:
            continue
        groups.add(address)
        yield name, group
        subgroups = []
        for key in group:
            count += 1
            if count > budgets.MAX_HDF5_OBJECTS:
                raise InputError(f"{path} is refused: it holds more than {budgets.MAX_HDF5_OBJECTS} objects")
            child = f"{name}/{key}" if name else key
            member = _own(group, key, child, path)
            if isinstance(member, h5py.Group):
                subgroups.append((child, member, depth + 1))
            elif isinstance(member, h5py.Dataset):
                yield child, member
        pending.extend(reversed(subgroups))


def _own(group: Any, key: str, name: str, path: Path) -> Any:
    """What a group itself holds under a key; None for an alias of something else in the file."""
    link = group.get(key, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        raise InputError(
            f"{path} is refused: {abbreviated(name)} links to another file, {abbreviated(str(link.filename))}"
        )
    if not isinstance(link, h5py.SoftLink):
        return group[key]
    if group.get(key) is None:
        raise InputError(
            f"{path} is refused: {abbreviated(name)} links to {abbreviated(str(link.path))}, which is not in the file"
        )
    return None


def _dataset(name: str, dataset: Any, path: Path) -> dict[str, Any] | None:
    if dataset.external:
        raise InputError(
            f"{path} is refused: "
            f"{abbreviated(name)} keeps its numbers in another file, {abbreviated(str(dataset.external[0][0]))}"
        )
    if dataset.is_virtual:
        raise InputError(f"{path} is refused: {abbreviated(name)} is put together from other files")
    dtype = dataset.dtype
    declared_type = dataset.attrs.get("dtype")
    if dtype.kind == "V" and dtype.names is None and isinstance(declared_type, str):
        type_name = (
            declared_type  # Keras stores what NumPy does not know as raw bytes, and says beside them what they are.
        )
    elif dtype.kind in "fiubc":
        type_name = dtype.newbyteorder("=").name
    else:
        return None
    is_flat = dataset.chunks is None and dataset.id.get_create_plist().get_nfilters() == 0
    return {
        "name": name,
        "shape": list(dataset.shape or ()),
        "type": type_name,
        "is_big_endian": dtype.byteorder == ">",
        "address": h5py.h5o.get_info(dataset.id).addr,
        "offset": dataset.id.get_offset() if is_flat else None,
        "stored": dataset.id.get_storage_size(),
        "is_filtered": dataset.id.get_create_plist().get_nfilters() > 0,
    }


class AttributeBudget:
    """A budget for all attributes of a file, budget by their shapes before they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._elements, self._characters = budgets.MAX_ATTRIBUTE_ELEMENTS, budgets.MAX_TEXTS_BYTES

    def elements(self, key: str, shape: tuple[int, ...], itemsize: int) -> None:
        """Count the elements of an attribute that is to be read."""
        self._elements -= math.prod(shape)
        if self._elements < 0 or math.prod(shape) * itemsize > self._characters:
            raise InputError(
                f"{self.path} is refused: its attribute {abbreviated(key)} claims the shape {format_shape(shape)}"
            )

    def text(self, key: str, value: Any) -> None:
        """Count the characters of an attribute that was read."""
        texts = value if isinstance(value, list) else [value]
        self._characters -= sum(len(text) for text in texts if isinstance(text, str))
        if self._characters < 0:
            raise InputError(f"{self.path} is refused: its attribute {abbreviated(key)} is longer than any model needs")


def _attributes(group: Any, budget: AttributeBudget) -> dict[str, Any]:
    values = {}
    for key in group.attrs:
        attribute = group.attrs.get_id(key)
        if attribute.shape is None:
            continue  # an attribute without a value
        budget.elements(key, attribute.shape, attribute.dtype.itemsize)
        value = _plain(group.attrs[key])
        budget.text(key, value)
        if value is not None:
            values[key] = value
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value if isinstance(value, str | int | float | bool) else None


def read_into(location: H5Location, name: str, target: Any) -> None:
    """Read one dataset into an array of its shape."""
    with location.open() as file:
        dataset = file[name]
        if dataset.shape == ():
            target[()] = dataset[()]
        else:
            dataset.read_direct(target)
