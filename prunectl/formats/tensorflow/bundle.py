"""A TensorFlow tensor bundle: an index of named tensors, and the data shards that hold their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prunectl.errors import InputError, abbreviated
from prunectl.formats.base import shown
from prunectl.formats.extents import Extent, check_inside
from prunectl.formats.tensorflow.bundle_index import Entry, Index, read_index
from prunectl.formats.tensorflow.dtypes import DTYPES, NOT_NUMBERS, STRING
from prunectl.formats.tensorflow.slice_keys import WHOLE, slice_key
from prunectl.formats.tensorflow.zeros import TooManyClaimsError, sharing

MAX_SHARDS = 100_000


@dataclass(frozen=True, slots=True)
class Bundle:
    """An index whose every entry was found to lie inside of its shard."""

    index: Path
    is_big_endian: bool
    entries: Mapping[bytes, Entry]
    shards: Mapping[int, Path]
    shared: Mapping[bytes, Entry] = field(default_factory=dict)
    """Entries that are zeros at the beginning of another's bytes, with that other."""

    def numbers(self) -> tuple[Entry, ...]:
        """Return the entries that are tensors of numbers, slices of others left out."""
        return tuple(
            entry for key, entry in self.entries.items() if key[:1] != b"\x00" and entry.code not in NOT_NUMBERS
        )

    def extent(self, entry: Entry) -> Extent:
        """Return where the bytes of an entry lie."""
        return Extent(self.shards[entry.shard], entry.offset, entry.nbytes)

    def pieces(self, entry: Entry) -> tuple[tuple[tuple[slice, ...], Entry], ...]:
        """Return the slices of a partitioned tensor, each with its place in the whole."""
        return tuple((_place(bounds), self.entries[slice_key(entry.key, bounds)]) for bounds in entry.slices)

    def text(self, key: bytes, limit: int) -> bytes:
        """Return a scalar string, or nothing if there is none of that name."""
        entry = self.entries.get(key)
        if entry is None or entry.code != STRING or entry.shape or entry.slices:
            return b""
        if entry.nbytes > limit:
            raise InputError(f"{self.index} is refused: its {key.decode()} claims {entry.nbytes} bytes")
        with self.shards[entry.shard].open("rb") as file:
            file.seek(entry.offset)
            # Its length as a varint and a checksum of that length stand before it.
            stored = file.read(entry.nbytes)
        prefix = next((at for at, byte in enumerate(stored[:10]) if byte < 0x80), 0) + 1 + 4
        return stored[prefix:]


def read_bundle(path: Path) -> Bundle:
    """Read the index of a bundle, and check it against the sizes of the shards."""
    index = read_index(path)
    found = Bundle(path, index.is_big_endian, index.entries, _find_shards(index))
    sizes = {number: shard.stat().st_size for number, shard in found.shards.items()}
    bundle = replace(found, shared=_shared(found, sum(sizes.values())))
    _check_extents(bundle, sizes)
    _check_slices(bundle)
    return bundle


def _find_shards(index: Index) -> dict[int, Path]:
    path, count = index.path, index.shard_count
    if count > MAX_SHARDS:
        raise InputError(f"{path} is refused: it claims {count} data shards")
    used = sorted({entry.shard for entry in index.entries.values()})
    if used and used[-1] >= count:
        raise InputError(f"{path} is damaged: it names data shard {used[-1]}, but has {count}")
    prefix = path.name.removesuffix(".index")
    shards = {number: path.with_name(f"{prefix}.data-{number:05d}-of-{count:05d}") for number in used}
    for shard in shards.values():
        if not shard.is_file():
            raise InputError(f"{path} is incomplete: its data shard {abbreviated(shard.name)} is missing")
    return shards


def _shared(bundle: Bundle, file_bytes: int) -> dict[bytes, Entry]:
    stored = [entry for entry in bundle.entries.values() if entry.code in DTYPES and not entry.slices]
    try:
        return sharing(stored, file_bytes)
    except TooManyClaimsError as error:
        raise InputError(f"{bundle.index} is refused: {error}") from error


def _check_extents(bundle: Bundle, sizes: Mapping[int, int]) -> None:
    reached = dict.fromkeys(sizes, 0)
    for entry in sorted(
        bundle.entries.values(), key=lambda found: (found.shard, found.offset, found.key in bundle.shared)
    ):
        name = entry.key.decode("utf-8", "backslashreplace")
        if entry.code not in DTYPES and entry.code not in NOT_NUMBERS:
            raise InputError(
                f"{bundle.index} holds {abbreviated(name)} as type {entry.code}, which prunectl does not read"
            )
        if entry.slices:
            continue
        check_inside(bundle.shards[entry.shard], entry.offset, entry.nbytes, sizes[entry.shard], name)
        if entry.code in DTYPES and entry.nbytes != math.prod(entry.shape) * entry.dtype.itemsize:
            raise InputError(
                f"{bundle.index} is damaged: {abbreviated(name)} of shape {shown(entry.shape)} "
                f"does not fill {entry.nbytes} bytes"
            )
        if entry.nbytes and entry.offset < reached[entry.shard] and entry.key not in bundle.shared:
            raise InputError(f"{bundle.index} is damaged: {abbreviated(name)} overlaps another tensor")
        reached[entry.shard] = max(reached[entry.shard], entry.offset + entry.nbytes)


def _check_slices(bundle: Bundle) -> None:
    for entry in bundle.entries.values():
        name = entry.key.decode("utf-8", "backslashreplace")
        for bounds in entry.slices:
            piece = bundle.entries.get(slice_key(entry.key, bounds))
            if piece is None or piece.code != entry.code or piece.slices:
                raise InputError(f"{bundle.index} is incomplete: a slice of {abbreviated(name)} is missing")
            if len(bounds) != len(entry.shape) or piece.shape != _sizes(entry.shape, bounds):
                raise InputError(f"{bundle.index} is damaged: a slice of {abbreviated(name)} does not fit into it")
        if entry.slices and sum(math.prod(_sizes(entry.shape, bounds)) for bounds in entry.slices) != math.prod(
            entry.shape
        ):
            raise InputError(
                f"{bundle.index} is incomplete: the slices of {abbreviated(name)} do not make up the whole"
            )


def _sizes(shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Return the shape of a slice, or -1 for an axis that it leaves."""
    return tuple(
        size if length == WHOLE else length if 0 <= start <= start + length <= size else -1
        for size, (start, length) in zip(shape, bounds, strict=True)
    )


def _place(bounds: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(None) if length == WHOLE else slice(start, start + length) for start, length in bounds)
