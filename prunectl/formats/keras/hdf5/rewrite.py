"""Rewrite HDF5 files: edit names, attributes and datasets, mask or halve weights, replace values."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.errors import InputError
from prunectl.formats import zip_write
from prunectl.formats.base import Array, ModelFile, RemovedItem
from prunectl.formats.extents import BYTE, Extent, view
from prunectl.formats.keras.config import PRUNED_PREFIX
from prunectl.formats.keras.hdf5 import H5Contents
from prunectl.formats.keras.hdf5.rebuild import (
    CopyDataset,
    UncopyableError,
    address_of,
    copied,
    copy_attributes,
    create_dataset,
    rebuild_file,
    run_rewriting,
)
from prunectl.formats.keras.model import WEIGHTS, inflated_model
from prunectl.formats.patch import TensorUpdate, patch_files
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.zip_read import open_archive


def rebuild_with(source: Path, target: Path, changed: Mapping[int, CopyDataset], shown: Path) -> None:
    """Rebuild a file, with special copies of the datasets at some addresses; ``shown`` is the path that errors name."""

    def copy_dataset(old: Any, parent: Any, key: str) -> Any:
        return changed.get(address_of(old), copied)(old, parent, key)

    try:
        rebuild_file(source, target, copy_dataset)
    except UncopyableError as error:
        raise InputError(f"{shown} has references or custom types ({error}) and cannot be rebuilt") from error


def create_like(old: Any, parent: Any, key: str, numbers: Any, *, space: Any, properties: Any) -> Any:
    """A dataset with the type and the attributes of an old one, and other values."""
    kind = old.id.get_type().copy()
    new = create_dataset(parent, key, kind, space, properties)
    new.id.write(h5py.h5s.ALL, h5py.h5s.ALL, numbers, mtype=kind)
    copy_attributes(old, new)
    return new


@dataclass(frozen=True, slots=True)
class H5Edits:
    """Changes by path; all paths but the targets of moves are those of the old file."""

    removed: tuple[RemovedItem, ...] = ()
    drops: tuple[str, ...] = ()
    moves: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[tuple[str, str], str | list[str] | None] = field(default_factory=dict)
    """New values by group and key; None removes the attribute."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """The paths of the masks to multiply weights by, by the paths of the weights."""
    halves: frozenset[str] = frozenset()
    """The paths of the datasets that become 16-bit floats."""

    @property
    def is_empty(self) -> bool:
        """Whether the file stays as it is."""
        return not any((self.drops, self.moves, self.attributes, self.masks, self.halves))


def merge(pieces: Iterable[H5Edits]) -> H5Edits:
    """Merge several edits into one."""
    edits = list(pieces)
    return H5Edits(
        removed=tuple(thing for edit in edits for thing in edit.removed),
        drops=tuple(path for edit in edits for path in edit.drops),
        moves=dict(pair for edit in edits for pair in edit.moves.items()),
        attributes=dict(pair for edit in edits for pair in edit.attributes.items()),
        masks=dict(pair for edit in edits for pair in edit.masks.items()),
        halves=frozenset(path for edit in edits for path in edit.halves),
    )


_TEMPORARY_NAME = "being moved by prunectl "
_WRAPPED = PRUNED_PREFIX.rstrip("_")
_HALF = h5py.h5t.IEEE_F16LE
_MAX_HALF = float(np.finfo(np.float16).max)


def edit(source: Path, target: Path, edits: H5Edits, contents: H5Contents, shown: Path) -> None:
    """Write an edited file; ``shown`` is the path that errors name."""
    if edits.is_empty:
        shutil.copyfile(source, target)
        return
    draft = target.with_name(f"{target.name}.draft")
    largest = max((dataset.storage.nbytes for dataset in contents.datasets), default=0)
    try:
        work = partial(_edit, source, draft, target, edits, shown)
        run_rewriting(work, shown, source.stat().st_size, 5 * largest, (draft, target))
    finally:
        draft.unlink(missing_ok=True)


def _edit(source: Path, draft: Path, target: Path, edits: H5Edits, shown: Path) -> bytes:
    # Names are changed in a copy, which is cheap; rebuilding the copy then frees the space of removed objects.
    shutil.copyfile(source, draft)
    with h5py.File(source, "r", locking=False) as old, h5py.File(draft, "r+", locking=False) as file:
        changed: dict[int, CopyDataset] = {}
        for path in edits.masks.keys() | edits.halves:
            changed[address_of(file[path])] = partial(
                _masked_or_halved, path=path, edits=edits, source=old, shown=shown
            )
        _apply_moves(file, edits, shown)
        file.close()
        rebuild_with(draft, target, changed, shown)
    return b""


def _masked_or_halved(old: Any, parent: Any, key: str, *, path: str, edits: H5Edits, source: Any, shown: Path) -> Any:
    numbers = _new_numbers(old, path=path, edits=edits, source=source, shown=shown)
    kind = _HALF if path in edits.halves and old.dtype != np.float16 else old.id.get_type()
    new = create_dataset(parent, key, kind.copy(), old.id.get_space(), old.id.get_create_plist())
    new.id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(numbers))
    copy_attributes(old, new)
    return new


def _new_numbers(old: Any, *, path: str, edits: H5Edits, source: Any, shown: Path) -> Array:
    """The new values of a weight: masked, with neither -0.0 nor NaN where the mask is zero, and halved."""
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
        raise InputError(f"{shown} holds {largest:g} in {path}, but the largest 16-bit float is {_MAX_HALF:g}")
    return halved


def _apply_moves(file: Any, edits: H5Edits, shown: Path) -> None:
    for (group, key), value in edits.attributes.items():
        _set(file[group or "/"].attrs, key, value)
    for path in edits.drops:
        if path in file:
            del file[path]
            _remove_empty_groups(file, path)
    moved = []
    for number, path in enumerate(sorted(edits.moves, key=_depth, reverse=True)):
        if path in file:
            file.move(path, f"{_TEMPORARY_NAME}{number}")
            moved.append((edits.moves[path], f"{_TEMPORARY_NAME}{number}"))
            _remove_empty_groups(file, path)
    for path, temporary in sorted(moved, key=lambda pair: _depth(pair[0])):
        if path in file and isinstance(file[path], h5py.Group) and _is_empty(file[path]):
            del file[path]
        if path in file:
            raise InputError(f"{shown} cannot be stripped of its wrappers: it already holds {path}")
        file.move(temporary, path)


def _remove_empty_groups(file: Any, path: str) -> None:
    """Remove the groups of a wrapper above a removed path that are empty now."""
    for parent in _parents(path):
        group = file.get(parent)
        if group is None or not _is_empty(group) or _WRAPPED not in parent:
            return
        del file[parent]


def _is_empty(group: Any) -> bool:
    return not len(group) and not len(group.attrs)


def _parents(path: str) -> Iterable[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _depth(path: str) -> int:
    return path.count("/")


def _set(attributes: Any, key: str, value: str | list[str] | None) -> None:
    """Set an attribute to a string or a list of names, stored with the string type of the old value."""
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


def write(model: ModelFile, targets: dict[Path, Path], updates: Sequence[TensorUpdate]) -> None:
    """Write the file with new values of some tensors."""
    if all(update.tensor.storage.extent is not None for update in updates):
        patch_files(model, targets, updates)
        return
    nbytes = sum(tensor.storage.nbytes for tensor in model.tensors)
    target = targets[model.path]
    # The values are computed here, once: the code that computes them keeps counts, may fail with an error of its own,
    # and may be a plug-in that cannot run within the memory of a child. The child gets the values in a file.
    with tempfile.NamedTemporaryFile(prefix="numbers-", dir=target.parent) as numbers:
        changed: dict[int, Extent] = {}
        for update in updates:
            begin = numbers.tell()
            numbers.writelines(update.raw())
            changed[int(update.tensor.storage.key)] = Extent(Path(numbers.name), begin, numbers.tell() - begin)
        numbers.flush()
        largest = max((tensor.nbytes for tensor in model.tensors), default=0)
        run_rewriting(partial(_rebuild, model.path, target, changed), model.path, nbytes, 3 * largest, (target,))


def _rebuild(source: Path, target: Path, changed: Mapping[int, Extent]) -> bytes:
    copiers = {address: partial(_copy_with_numbers, numbers) for address, numbers in changed.items()}
    rebuild_with(source, target, copiers, source)
    return b""


def _copy_with_numbers(extent: Extent, old: Any, parent: Any, key: str) -> Any:
    numbers = view(extent, dtype=BYTE, shape=(extent.nbytes,))
    return create_like(old, parent, key, numbers, space=old.id.get_space(), properties=old.id.get_create_plist())


def write_zip(model: ModelFile, targets: dict[Path, Path], updates: Sequence[TensorUpdate]) -> None:
    """Write an archive with new values: stored weights in place, deflated weights inflated and deflated again."""
    if all(update.tensor.storage.extent is not None for update in updates):
        zip_write.write(model, targets, updates)
        return
    archive = open_archive(model.path)
    with temporary_folder() as scratch:
        inflated = inflated_model(archive, dict(model.about.keras or {}), scratch / WEIGHTS)
        inflated_tensors = {tensor.storage.key: tensor for tensor in inflated.tensors}
        changed = scratch / "changed.h5"
        inflated_updates = [replace(update, tensor=inflated_tensors[update.tensor.storage.key]) for update in updates]
        write(inflated, {inflated.path: changed}, inflated_updates)
        zip_write.rewrite_zip(archive, targets[model.path], {WEIGHTS: zip_write.file_content(changed)})
