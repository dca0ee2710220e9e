"""A tensor bundle written again: some entries left out, some become zeros that share their bytes, some texts new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from prunectl.formats import extents
from prunectl.formats.extents import Extent
from prunectl.formats.protobuf import fields
from prunectl.formats.protobuf_write import number, varint
from prunectl.formats.tensorflow import leveldb_write, string_tensor
from prunectl.formats.tensorflow.bundle import Bundle
from prunectl.formats.tensorflow.bundle_index import Entry
from prunectl.formats.tensorflow.leveldb_table import Record, read_file, records
from prunectl.formats.tensorflow.zeros import crc_of_zeros, zeros

_SHARD, _OFFSET, _NBYTES, _CRC = 3, 4, 5, 6
_CRC_TAG = varint(_CRC << 3 | 5)


@dataclass(frozen=True, slots=True)
class Changes:
    """What becomes of entries, by their keys."""

    drops: frozenset[bytes] = frozenset()
    zeros: frozenset[bytes] = frozenset()
    texts: Mapping[bytes, bytes] = field(default_factory=dict)
    """New contents of scalar strings."""

    @property
    def is_empty(self) -> bool:
        """Whether the bundle stays as it is."""
        return not (self.drops or self.zeros or self.texts)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of an entry lie in the new shards."""

    shard: int
    offset: int
    nbytes: int
    crc: int


def rewrite(bundle: Bundle, changes: Changes, targets: Mapping[Path, Path]) -> None:
    """Write the index and every shard of a bundle to their targets."""
    places: dict[bytes, Place] = {}
    for shard, path in bundle.shards.items():
        with targets[path].open("xb") as out:
            places.update(_write_shard(bundle, shard, changes, out))
    kept = (record for record in records(bundle.index, read_file(bundle.index)) if record.key not in changes.drops)
    table = leveldb_write.table((record.key, value_of(record, places.get(record.key))) for record in kept)
    with targets[bundle.index].open("xb") as out:
        out.write(table)


def _write_shard(bundle: Bundle, shard: int, changes: Changes, out: BinaryIO) -> dict[bytes, Place]:
    entries = [
        entry
        for entry in bundle.entries.values()
        if entry.shard == shard and not entry.slices and entry.key not in changes.drops
    ]
    empty = {entry.key for entry in entries if entry.key in changes.zeros or entry.key in bundle.shared}
    # What others share the zeros of are zeros too.
    empty |= {bundle.shared[key].key for key in empty & bundle.shared.keys()}
    places = {
        entry.key: _write(bundle, entry, changes, out)
        for entry in sorted(entries, key=lambda entry: (entry.offset, -entry.nbytes))
        if entry.key not in empty
    }
    at = out.tell()
    resting = [entry for entry in entries if entry.key in empty]
    out.writelines(zeros(max((entry.nbytes for entry in resting), default=0)))
    return places | {entry.key: Place(shard, at, entry.nbytes, crc_of_zeros(entry.nbytes)) for entry in resting}


def _write(bundle: Bundle, entry: Entry, changes: Changes, out: BinaryIO) -> Place:
    at = out.tell()
    if entry.key in changes.texts:
        stored, crc = string_tensor.stored(changes.texts[entry.key])
        out.write(stored)
        return Place(entry.shard, at, len(stored), crc)
    extent = Extent(bundle.shards[entry.shard], entry.offset, entry.nbytes)
    out.writelines(block.data for block in extents.blocks(extent, extents.BYTE))
    return Place(entry.shard, at, entry.nbytes, entry.crc)


def value_of(record: Record, place: Place | None) -> bytes:
    """Return what the index says of an entry, with its new place; the header and wholes of slices have none."""
    if place is None:
        return bytes(record.data[record.begin : record.end])
    out, at = bytearray(), record.begin
    for found in fields(record.data, record.begin, record.end):
        if found.number not in {_SHARD, _OFFSET, _NBYTES, _CRC}:
            out += record.data[at : found.end]
        at = found.end
    facts = ((_SHARD, place.shard), (_OFFSET, place.offset), (_NBYTES, place.nbytes))
    # As in every protobuf of its version, a zero is not written.
    out += b"".join(number(key, value) for key, value in facts if value)
    return bytes(out) + (_CRC_TAG + place.crc.to_bytes(4, "little") if place.crc else b"")
