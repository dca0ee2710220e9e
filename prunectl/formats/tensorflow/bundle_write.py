"""A checkpoint or SavedModel with some numbers changed, and the checksums in its index mended."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import google_crc32c

from prunectl.formats import extents
from prunectl.formats.base import ModelFile
from prunectl.formats.extents import Extent
from prunectl.formats.tensorflow import leveldb_write
from prunectl.formats.tensorflow.bundle import read_bundle
from prunectl.formats.tensorflow.bundle_index import Entry
from prunectl.formats.tensorflow.bundle_rewrite import Place, value_of
from prunectl.formats.tensorflow.leveldb_table import mask, masked_crc, read_file, records
from prunectl.formats.writing import Rewrite, write_flat


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[Rewrite]) -> None:
    """Write every file of the model, then mend what guards the tensors that changed."""
    index = model.path if model.path.is_file() else model.path / "variables" / "variables.index"
    bundle = read_bundle(index)
    places = {(bundle.extent(entry).path, entry.offset): entry for entry in bundle.numbers() if not entry.slices}
    changed = [places[rewrite.run.path, rewrite.run.offset] for rewrite in rewrites if rewrite.tensor.size]
    write_flat(model, targets, rewrites)
    shards = [(entry, targets[bundle.extent(entry).path]) for entry in changed]
    if any(entry.crc_at < 0 for entry in changed):
        _renew(index, targets[index], shards)
    else:
        _mend(targets[index], shards)


def _renew(index: Path, target: Path, changed: Iterable[tuple[Entry, Path]]) -> None:
    """Write an index again, uncompressed: inside a compressed block no checksum can be mended."""
    places = {
        entry.key: Place(entry.shard, entry.offset, entry.nbytes, mask(_crc(Extent(shard, entry.offset, entry.nbytes))))
        for entry, shard in changed
    }
    found = records(index, read_file(index))
    table = leveldb_write.table((record.key, value_of(record, places.get(record.key))) for record in found)
    target.write_bytes(table)


def _mend(index: Path, changed: Iterable[tuple[Entry, Path]]) -> None:
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
