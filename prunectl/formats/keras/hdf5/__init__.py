"""Read HDF5 containers: datasets, their offsets and attributes, listed and decoded by libhdf5 in a sandboxed child."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError, abbreviated
from prunectl.formats import budgets, extents
from prunectl.formats.base import Storage, format_shape
from prunectl.formats.budgets import BOMB_RATIO, MAX_DEFLATE_RATIO, MAX_UNFOLDED_TENSOR_BYTES
from prunectl.formats.extents import Extent, FileWindow, check_inside
from prunectl.formats.safe_json import parse_object
from prunectl.formats.sandbox import run_sandboxed

_SECONDS = 1.5
_BYTES_PER_SECOND = 1 << 20
"""Far below the speed of a walk over many small objects: a second for each MiB of the file is enough."""
_WALK_BYTES = 200 << 20
_ROOM = 16 << 20


@dataclass(frozen=True, slots=True)
class Dataset:
    """A numeric dataset of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    storage: Storage


@dataclass(frozen=True, slots=True)
class H5Contents:
    """The contents of an HDF5 file, without the elements of its datasets."""

    location: H5Location
    datasets: tuple[Dataset, ...]
    attributes: dict[str, dict[str, Any]]
    is_compressed: bool

    def attribute(self, group: str, key: str) -> Any:
        """An attribute of a group, or None."""
        return self.attributes.get(group, {}).get(key)

    def names(self, group: str, key: str) -> list[str]:
        """A list of names, which Keras splits when it is too long for one attribute."""
        value = self.attribute(group, key)
        parts = [value] if isinstance(value, list) else []
        while isinstance(part := self.attribute(group, f"{key}{len(parts)}"), list):
            parts.append(part)
        return [str(name) for part in parts for name in part]


def read_contents(location: H5Location) -> H5Contents:
    """The datasets and attributes of an HDF5 file."""
    response = run_sandboxed(
        partial(_walk, location),
        location.path,
        seconds=_SECONDS + location.nbytes / _BYTES_PER_SECOND,
        extra_bytes=_WALK_BYTES + location.nbytes,
    )
    listing = parse_object(bytes(response), location.path, "the answer of libhdf5")
    rows = listing["datasets"]
    datasets = tuple(_parsed_dataset(location, row) for row in rows)
    _refuse_overlaps(location.path, datasets)
    return H5Contents(location, datasets, listing["attributes"], any(row["is_filtered"] for row in rows))


def decode(location: H5Location, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Decode a chunked or filtered dataset in a child."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return np.zeros(shape, dtype)
    response = run_sandboxed(
        partial(_read, location, name, _as_stored(dtype), shape),
        location.path,
        seconds=_SECONDS + nbytes / _BYTES_PER_SECOND,
        extra_bytes=_WALK_BYTES + 2 * nbytes + location.nbytes,
    )
    if len(response) != nbytes:
        raise InputError(f"{location.path} is damaged: {abbreviated(name)} does not match its description")
    raw: NDArray[np.uint8] = np.frombuffer(response, np.uint8)
    return extents.arrange(raw, dtype=dtype, shape=shape)


def _walk(location: H5Location) -> bytes:
    try:
        return json.dumps(list_objects(location)).encode()
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        # In h5py's messages, libhdf5's reason follows in parentheses.
        reason = re.search(r"\((.+)\)", str(error))
        explanation = reason[1] if reason else "its structure is inconsistent"
        raise InputError(f"{location.path} is truncated or damaged: {explanation}") from error


def _read(location: H5Location, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> memoryview:
    target = np.empty(shape, dtype)
    read_into(location, name, target)
    return target.reshape(-1).view(np.uint8).data


def _as_stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that h5py sees: raw bytes for types that NumPy does not know."""
    return np.dtype(f"V{dtype.itemsize}") if dtype.isbuiltin != 1 else dtype


def _parsed_dataset(location: H5Location, row: dict[str, Any]) -> Dataset:
    name, shape = str(row["name"]), tuple(int(size) for size in row["shape"])
    dtype = _dtype(location.path, name, str(row["type"]))
    nbytes, stored = math.prod(shape) * dtype.itemsize, int(row["stored"])
    extent = None
    if row["offset"] is not None:
        check_inside(location.path, row["offset"], nbytes, location.nbytes, name)
        extent = Extent(location.path, location.offset + row["offset"], nbytes)
    elif nbytes > stored * MAX_DEFLATE_RATIO + _ROOM or nbytes > max(MAX_UNFOLDED_TENSOR_BYTES, stored * BOMB_RATIO):
        raise InputError(
            f"{location.path} is refused: {abbreviated(name)} claims {nbytes} bytes, but {stored} are stored"
        )
    storage = Storage(str(row["address"]), nbytes, extent, stored, bool(row["is_big_endian"]))
    return Dataset(name, shape, dtype, storage)


def _dtype(path: Path, name: str, type_name: str) -> np.dtype[Any]:
    try:
        return (
            np.dtype(getattr(ml_dtypes, type_name))
            if type_name.startswith(("bfloat", "float8"))
            else np.dtype(type_name)
        )
    except (TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds {abbreviated(name)} as {abbreviated(type_name)}, a type that prunectl does not read"
        ) from error


def _refuse_overlaps(path: Path, datasets: tuple[Dataset, ...]) -> None:
    runs = {
        (dataset.storage.extent.offset, dataset.storage.extent.nbytes): dataset.name
        for dataset in datasets
        if dataset.storage.extent is not None and dataset.storage.extent.nbytes
    }
    end = 0
    for (offset, nbytes), name in sorted(runs.items()):
        if offset < end:
            raise InputError(f"{path} is damaged: {abbreviated(name)} overlaps another dataset")
        end = offset + nbytes


@dataclass(frozen=True, slots=True)
class H5Location:
    """An HDF5 file, on its own or inside another file."""

    path: Path
    offset: int
    nbytes: int

    def open(self) -> Any:
        """Open the file with h5py."""
        if self.offset:
            return h5py.File(FileWindow(self.path, self.offset, self.nbytes), "r")
        return h5py.File(self.path, "r", locking=False)


def list_objects(location: H5Location) -> dict[str, Any]:
    """The datasets of a file and the attributes of its groups, as values for JSON."""
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
    """Yield groups, each once, and datasets, with their paths; links out of the file or within it are not followed."""
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
    """The object that a group itself holds under a key; None for a link to another object of the file."""
    raw = key.encode("utf-8", "surrogateescape")
    if group.id.links.get_info(raw).type == h5py.h5l.TYPE_HARD:
        # As `group[key]` does, but without opening the file again for each dataset.
        opened = h5py.h5o.open(group.id, raw)
        if isinstance(opened, h5py.h5d.DatasetID):
            return h5py.Dataset(opened)
        return h5py.Group(opened) if isinstance(opened, h5py.h5g.GroupID) else None
    link = group.get(key, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        raise InputError(
            f"{path} is refused: {abbreviated(name)} links to another file, {abbreviated(str(link.filename))}"
        )
    if group.get(key) is None:
        raise InputError(
            f"{path} is refused: {abbreviated(name)} links to {abbreviated(str(link.path))}, which is not in the file"
        )
    return None


def _dataset(name: str, dataset: Any, path: Path) -> dict[str, Any] | None:
    # Fetched once: h5py asks libhdf5 for it each time.
    properties = dataset.id.get_create_plist()
    layout, filters = properties.get_layout(), properties.get_nfilters()
    if properties.get_external_count():
        raise InputError(
            f"{path} is refused: "
            f"{abbreviated(name)} stores its values in another file, {abbreviated(str(dataset.external[0][0]))}"
        )
    if layout == h5py.h5d.VIRTUAL:
        raise InputError(f"{path} is refused: {abbreviated(name)} is assembled from other files")
    dtype = dataset.dtype
    if dtype.kind in "fiubc":
        type_name = dtype.newbyteorder("=").name
    elif dtype.kind == "V" and dtype.names is None and isinstance(declared := dataset.attrs.get("dtype"), str):
        # Keras stores dtypes that NumPy does not know as raw bytes, with the name of the dtype as an attribute.
        type_name = declared
    else:
        return None
    is_flat = layout != h5py.h5d.CHUNKED and not filters
    return {
        "name": name,
        "shape": list(dataset.shape or ()),
        "type": type_name,
        "is_big_endian": dtype.byteorder == ">",
        "address": h5py.h5o.get_info(dataset.id).addr,
        "offset": dataset.id.get_offset() if is_flat else None,
        "stored": dataset.id.get_storage_size(),
        "is_filtered": filters > 0,
    }


class AttributeBudget:
    """A budget for all attributes of a file, charged by their shapes before they are read."""

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
            raise InputError(f"{self.path} is refused: its attribute {abbreviated(key)} is longer than prunectl allows")


def _attributes(group: Any, budget: AttributeBudget) -> dict[str, Any]:
    values, attributes = {}, group.attrs
    for key in attributes:
        attribute = attributes.get_id(key)
        if attribute.shape is None:
            continue  # an attribute without a value
        budget.elements(key, attribute.shape, attribute.dtype.itemsize)
        value = _plain(attributes[key])
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
