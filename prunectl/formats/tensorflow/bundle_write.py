"""Writing of bundles: patch tensors and their checksums in the index, or drop and zero entries."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from prunectl.formats import extents
from prunectl.formats.base import Array, ModelFile, Storage
from prunectl.formats.extents import Extent
from prunectl.formats.patch import TensorUpdate, patch_files
from prunectl.formats.protobuf import encode_varint, number, raw_fields
from prunectl.formats.tensorflow import leveldb
from prunectl.formats.tensorflow.bundle import Bundle, BundleEntry, crc_of_zeros, read_bundle, zeros
from prunectl.formats.tensorflow.leveldb import IndexRecord, mask, masked_crc, read_file, records

_BIG = 1 << 32
"""From this length on, the length is hashed as eight bytes instead of four."""


def string_bytes(text: bytes) -> tuple[bytes, int]:
    """The bytes of a scalar string for the data shard, and their masked CRC-32C for the index."""
    crc = google_crc32c.value(len(text).to_bytes(4 if len(text) < _BIG else 8, "little"))
    length_crc = mask(crc).to_bytes(4, "little")
    crc = google_crc32c.extend(google_crc32c.extend(crc, length_crc), text)
    return encode_varint(len(text)) + length_crc + text, mask(crc)


_SHARD, _OFFSET, _NBYTES, _CRC = 3, 4, 5, 6
_CRC_TAG = encode_varint(_CRC << 3 | 5)


@dataclass(frozen=True, slots=True)
class BundleEdits:
    """Edits of entries, by key."""

    drops: frozenset[bytes] = frozenset()
    zeros: frozenset[bytes] = frozenset()
    texts: Mapping[bytes, bytes] = field(default_factory=dict)
    """New contents of scalar strings."""


@dataclass(frozen=True, slots=True)
class EntryLocation:
    """The new shard, offset and checksum of an entry."""

    shard: int
    offset: int
    nbytes: int
    crc: int


def rewrite_bundle(bundle: Bundle, edits: BundleEdits, targets: Mapping[Path, Path]) -> None:
    """Write the index and every shard of a bundle to their targets."""
    locations: dict[bytes, EntryLocation] = {}
    for shard, path in bundle.shards.items():
        with targets[path].open("xb") as out:
            locations.update(_write_shard(bundle, shard, edits, out))
    _write_index(bundle.index, targets[bundle.index], locations, edits.drops)


def _write_index(
    index: Path, target: Path, locations: Mapping[bytes, EntryLocation], drops: frozenset[bytes] = frozenset()
) -> None:
    """Write an index again, uncompressed, with the new locations of entries and without dropped ones."""
    kept = (record for record in records(index, read_file(index)) if record.key not in drops)
    table = leveldb.table((record.key, _relocated_value(record, locations.get(record.key))) for record in kept)
    target.write_bytes(table)


def _write_shard(bundle: Bundle, shard: int, edits: BundleEdits, out: BinaryIO) -> dict[bytes, EntryLocation]:
    entries = [
        entry
        for entry in bundle.entries.values()
        if entry.shard == shard and not entry.slices and entry.key not in edits.drops
    ]
    zeroed = {entry.key for entry in entries if entry.key in edits.zeros or entry.key in bundle.shared}
    # The entries whose zeros they share are zeros too.
    zeroed |= {bundle.shared[key].key for key in zeroed & bundle.shared.keys()}
    locations = {
        entry.key: _write(bundle, entry, edits, out)
        for entry in sorted(entries, key=lambda entry: (entry.offset, -entry.nbytes))
        if entry.key not in zeroed
    }
    offset = out.tell()
    zero_entries = [entry for entry in entries if entry.key in zeroed]
    out.writelines(zeros(max((entry.nbytes for entry in zero_entries), default=0)))
    return locations | {
        entry.key: EntryLocation(shard, offset, entry.nbytes, crc_of_zeros(entry.nbytes)) for entry in zero_entries
    }


def _write(bundle: Bundle, entry: BundleEntry, edits: BundleEdits, out: BinaryIO) -> EntryLocation:
    offset = out.tell()
    if entry.key in edits.texts:
        stored, crc = string_bytes(edits.texts[entry.key])
        out.write(stored)
        return EntryLocation(entry.shard, offset, len(stored), crc)
    out.writelines(block.data for block in extents.blocks(bundle.extent(entry), extents.BYTE))
    return EntryLocation(entry.shard, offset, entry.nbytes, entry.crc)


def _relocated_value(record: IndexRecord, location: EntryLocation | None) -> bytes:
    """The value of an index record with its new location; the header and partitioned tensors have no location."""
    if location is None:
        return bytes(record.data[record.begin : record.end])
    kept = (
        raw
        for raw, field in raw_fields(record.data, record.begin, record.end)
        if field.number not in {_SHARD, _OFFSET, _NBYTES, _CRC}
    )
    numbers = ((_SHARD, location.shard), (_OFFSET, location.offset), (_NBYTES, location.nbytes))
    # Protobuf (proto3) omits fields whose value is zero.
    location_fields = (number(key, value) for key, value in numbers if value)
    crc = _CRC_TAG + location.crc.to_bytes(4, "little") if location.crc else b""
    return b"".join((*kept, *location_fields, crc))


def write(model: ModelFile, targets: dict[Path, Path], updates: Sequence[TensorUpdate]) -> None:
    """Write every file of the model, then the checksums of the tensors that changed."""
    index = model.path if model.path.is_file() else model.path / "variables" / "variables.index"
    graph = model.path / "saved_model.pb"
    extents_of = [update.tensor.storage.extent for update in updates]
    if all(extent is not None and extent.path == graph for extent in extents_of):
        # Constants of the graph have no checksums.
        patch_files(model, targets, updates)
        return
    bundle = read_bundle(index)
    wholes = {entry.name: entry for entry in bundle.numbers()}
    stored = [entry for whole in wholes.values() for entry in ([part for _, part in bundle.pieces(whole)] or [whole])]
    entries = {(bundle.extent(entry).path, entry.offset): entry for entry in stored}
    updates = [piece for update in updates for piece in _pieces(bundle, wholes, update)]
    changed = [entries[update.run.path, update.run.offset] for update in updates if update.tensor.size]
    patch_files(model, targets, updates)
    shards = [(entry, targets[bundle.extent(entry).path]) for entry in changed]
    if any(entry.crc_at < 0 for entry in changed):
        # A checksum inside a compressed block cannot be patched, so the index is written again.
        crcs = ((entry, mask(_crc(Extent(shard, entry.offset, entry.nbytes)))) for entry, shard in shards)
        locations = {entry.key: EntryLocation(entry.shard, entry.offset, entry.nbytes, crc) for entry, crc in crcs}
        _write_index(index, targets[index], locations)
    else:
        _fix_crc(targets[index], shards)


def _pieces(bundle: Bundle, wholes: Mapping[str, BundleEntry], update: TensorUpdate) -> Iterator[TensorUpdate]:
    """Split the update of a tensor that is stored in slices into updates of the slices."""
    tensor = update.tensor
    if tensor.storage.extent is not None:
        yield update
        return
    pieces = bundle.pieces(wholes[tensor.storage.key])
    whole = _SlicedUpdate(update, len(pieces))
    for location, piece in pieces:
        storage = Storage(piece.name, piece.nbytes, bundle.extent(piece), piece.nbytes, bundle.is_big_endian)
        yield TensorUpdate(replace(tensor, shape=piece.shape, storage=storage), partial(whole.blocks, location))


class _SlicedUpdate:
    """The new values of a tensor in slices: computed for the first slice that is written, released with the last."""

    def __init__(self, update: TensorUpdate, num_slices: int) -> None:
        self._update = update
        self._pending = num_slices
        self._array: Array | None = None
        # Slices are written by two threads.
        self._lock = threading.Lock()

    def blocks(self, location: tuple[slice, ...]) -> Iterator[Array]:
        """The new values of one slice."""
        with self._lock:
            if self._array is None:
                flat = np.concatenate([block.reshape(-1) for block in self._update.blocks()])
                self._array = flat.reshape(self._update.tensor.shape)
            array = self._array
            self._pending -= 1
            if not self._pending:
                self._array = None
        yield np.ascontiguousarray(array[location])


def _fix_crc(index: Path, changed: Iterable[tuple[BundleEntry, Path]]) -> None:
    blocks = {}
    with index.open("r+b") as file:
        for entry, shard in changed:
            crc = mask(_crc(Extent(shard, entry.offset, entry.nbytes)))
            os.pwrite(file.fileno(), crc.to_bytes(4, "little"), entry.crc_at)
            blocks[entry.block.begin] = entry.block
        for block in blocks.values():
            data = os.pread(file.fileno(), block.crc_at - block.begin, block.begin)
            os.pwrite(file.fileno(), masked_crc(data).to_bytes(4, "little"), block.crc_at)


def _crc(extent: Extent) -> int:
    crc = 0
    for block in extents.blocks(extent, extents.BYTE):
        crc = google_crc32c.extend(crc, block.tobytes())
    return crc
