"""An HDF5 file with parts of it gone, renamed or changed, built again so that it takes no more room than it needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.formats.isolated import in_child
from prunectl.formats.keras.config import PRUNED_PREFIX
from prunectl.formats.keras.edits import Edits
from prunectl.formats.keras.hdf5 import Contents
from prunectl.formats.keras.hdf5_attributes import NotPortableError, copy_attributes
from prunectl.formats.keras.pack_h5 import address_of, copied, rebuild

_BYTES_PER_SECOND = 1 << 20
_ROOM = 512 << 20
_ASIDE = "being moved by prunectl "
_WRAPPED = PRUNED_PREFIX.rstrip("_")
_HALF = h5py.h5t.IEEE_F16LE
_MAX_HALF = float(np.finfo(np.float16).max)


def edit(source: Path, target: Path, edits: Edits, contents: Contents, shown: Path) -> None:
    """Write an edited file; ``shown`` is what the user calls the source."""
    if edits.is_empty:
        shutil.copyfile(source, target)
        return
    draft = target.with_name(f"{target.name}.draft")
    largest = max((found.storage.nbytes for found in contents.datasets), default=0)
    try:
        in_child(
            partial(_edit, source, draft, target, edits, shown),
            shown,
            seconds=10 + source.stat().st_size / _BYTES_PER_SECOND,
            extra_bytes=_ROOM + 5 * largest,
            written=(draft, target),
        )
    finally:
        draft.unlink(missing_ok=True)


def _edit(source: Path, draft: Path, target: Path, edits: Edits, shown: Path) -> bytes:
    # Names are changed in a copy, which is cheap; building that again gives back the room of what went.
    shutil.copyfile(source, draft)
    with h5py.File(source, "r", locking=False) as old, h5py.File(draft, "r+", locking=False) as file:
        changes: dict[int, Callable[[Any], Array]] = {}
        for path in edits.masks.keys() | edits.halves:
            changes[address_of(file[path])] = partial(_changed, path=path, edits=edits, source=old, shown=shown)
        _rearrange(file, edits, shown)
        file.close()
        try:
            rebuild(draft, target, partial(_copy_dataset, changes))
        except NotPortableError as error:
            raise InputError(
                f"{shown} has references or types of its own ({error}), and cannot be built again"
            ) from error
    return b""


def _copy_dataset(changes: dict[int, Callable[[Any], Array]], old: Any, parent: Any, key: str) -> Any:
    change = changes.get(address_of(old))
    if change is None:
        return copied(old, parent, key)
    numbers = change(old)
    kind = _HALF if numbers.dtype == np.float16 and old.dtype != np.float16 else old.id.get_type()
    space, plan = old.id.get_space(), old.id.get_create_plist()
    plan.set_obj_track_times(False)
    new = h5py.Dataset(h5py.h5d.create(parent.id, key.encode("utf-8", "surrogateescape"), kind.copy(), space, plan))
    new.id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(numbers))
    copy_attributes(old, new)
    return new


def _changed(old: Any, *, path: str, edits: Edits, source: Any, shown: Path) -> Array:
    """Return the numbers of a weight: masked, without a minus zero or a NaN where the mask is zero; and halved."""
    numbers: Array = old[()]
    if path in edits.masks:
        mask = source[edits.masks[path]][()]
        numbers = np.multiply(numbers, mask, out=np.zeros_like(numbers), where=mask != 0, casting="same_kind")
    if path not in edits.halves:
        return numbers
    with np.errstate(over="ignore"):
        halved = numbers.astype(np.float16)
    if np.any(np.isinf(halved) & np.isfinite(numbers)):
        largest = np.max(np.abs(numbers[np.isfinite(numbers)]))
        raise InputError(f"{shown} holds {path}, which reaches {largest:g}: 16-bit floats end at {_MAX_HALF:g}")
    return halved


def _rearrange(file: Any, edits: Edits, shown: Path) -> None:
    for (group, key), value in edits.attributes.items():
        _set(file[group or "/"].attrs, key, value)
    for path in edits.drops:
        if path in file:
            del file[path]
            _drop_emptied(file, path)
    moved = []
    for number, path in enumerate(sorted(edits.moves, key=_depth, reverse=True)):
        if path in file:
            file.move(path, f"{_ASIDE}{number}")
            moved.append((edits.moves[path], f"{_ASIDE}{number}"))
            _drop_emptied(file, path)
    for path, aside in sorted(moved, key=lambda pair: _depth(pair[0])):
        if path in file and isinstance(file[path], h5py.Group) and _is_bare(file[path]):
            del file[path]
        if path in file:
            raise InputError(f"{shown} cannot have its wrappers taken away: it already holds {path}")
        file.move(aside, path)


def _drop_emptied(file: Any, path: str) -> None:
    """Remove the groups of a wrapper that hold nothing any more, once something in them has gone."""
    for parent in _parents(path):
        group = file.get(parent)
        if group is None or not _is_bare(group) or _WRAPPED not in parent:
            return
        del file[parent]


def _is_bare(group: Any) -> bool:
    return not len(group) and not len(group.attrs)


def _parents(path: str) -> Iterable[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _depth(path: str) -> int:
    return path.count("/")


def _set(attributes: Any, key: str, value: str | list[str] | None) -> None:
    """Give an attribute another text or other names, stored in the way that the old ones were."""
    if value is None:
        del attributes[key]
        return
    kind = attributes.get_id(key).dtype
    if kind.kind != "S":
        attributes.create(key, value, shape=() if isinstance(value, str) else (len(value),), dtype=kind)
    elif isinstance(value, str):
        attributes[key] = np.bytes_(value.encode())
    else:
        names = [name.encode() for name in value]
        longest = max(map(len, names), default=kind.itemsize)
        attributes.create(key, np.array(names, f"S{longest}"), dtype=f"S{longest}")
