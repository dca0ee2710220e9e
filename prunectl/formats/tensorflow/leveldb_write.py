"""A LevelDB table, written: sorted records in uncompressed, checksummed blocks."""

from __future__ import annotations

from collections.abc import Iterable

from prunectl.formats.protobuf_write import varint
from prunectl.formats.tensorflow.leveldb_table import FOOTER_BYTES, MAGIC, masked_crc

BLOCK_BYTES = 1 << 18
"""As TensorFlow cuts its own tables."""
RESTART_INTERVAL = 16
_PLAIN = b"\0"


def table(records: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a table of keys and values; the keys come in ascending order."""
    out = bytearray()
    pointers: list[tuple[bytes, bytes]] = []
    pending: list[tuple[bytes, bytes]] = []
    pending_bytes = 0
    for key, value in records:
        pending.append((key, value))
        pending_bytes += len(key) + len(value)
        if pending_bytes >= BLOCK_BYTES:
            pointers.append((key, _append(out, _block(pending, RESTART_INTERVAL))))
            pending, pending_bytes = [], 0
    if pending:
        pointers.append((pending[-1][0], _append(out, _block(pending, RESTART_INTERVAL))))
    about = _append(out, _block([], 1))
    index = _append(out, _block(pointers, 1))
    return bytes(out) + (about + index).ljust(FOOTER_BYTES - len(MAGIC), b"\0") + MAGIC


def _append(out: bytearray, block: bytes) -> bytes:
    """Add a block and its trailer, and return its handle."""
    handle = varint(len(out)) + varint(len(block))
    out += block + _PLAIN + masked_crc(block + _PLAIN).to_bytes(4, "little")
    return handle


def _block(records: Iterable[tuple[bytes, bytes]], interval: int) -> bytes:
    """Return records, each key without what it shares with the one before, but for every so many."""
    out, restarts, last = bytearray(), [0], b""
    for number, (key, value) in enumerate(records):
        shared = 0
        if number % interval:
            shared = _shared(last, key)
        elif number:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return bytes(out) + b"".join(at.to_bytes(4, "little") for at in [*restarts, len(restarts)])


def _shared(one: bytes, other: bytes) -> int:
    """Return how many bytes both begin with."""
    limit = min(len(one), len(other))
    return next((at for at in range(limit) if one[at] != other[at]), limit)
