"""Read HDF5 containers: datasets, their offsets and attributes, listed by libhdf5 in a sandboxed child."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError, abbreviated
from prunectl.formats import extents
from prunectl.formats.base import Storage
from prunectl.formats.budgets import BOMB_RATIO, MAX_DEFLATE_RATIO, MAX_UNFOLDED_TENSOR_BYTES
from prunectl.formats.extents import Extent, check_inside
from prunectl.formats.keras.hdf5.child import H5Location, list_objects, read_into
from prunectl.formats.safe_json import parse_object
from prunectl.formats.sandbox import run_sandboxed

_SECONDS = 1.5
_BYTES_PER_SECOND = 1 << 20
"""Far below what a walk over many small objects takes; a second for each MiB of file is enough."""
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
    """What an HDF5 file holds."""

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
    listing = parse_object(bytes(response), location.path, "what libhdf5 says of it")
    rows = listing["datasets"]
    datasets = tuple(_dataset(location, row) for row in rows)
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
        raise InputError(f"{location.path} is damaged: {abbreviated(name)} is not read as it is described")
    raw: NDArray[np.uint8] = np.frombuffer(response, np.uint8)
    return extents.arrange(raw, dtype=dtype, shape=shape)


def _walk(location: H5Location) -> bytes:
    try:
        return json.dumps(list_objects(location)).encode()
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        # What libhdf5 found wrong stands in brackets behind what h5py was doing.
        reason = re.search(r"\((.+)\)", str(error))
        explanation = reason[1] if reason else "its structure cannot be followed"
        raise InputError(f"{location.path} is truncated or damaged: {explanation}") from error


def _read(location: H5Location, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> memoryview:
    target = np.empty(shape, dtype)
    read_into(location, name, target)
    return target.reshape(-1).view(np.uint8).data


def _as_stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that h5py sees: raw bytes for types that NumPy does not know."""
    return np.dtype(f"V{dtype.itemsize}") if dtype.isbuiltin != 1 else dtype


def _dataset(location: H5Location, row: dict[str, Any]) -> Dataset:
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
