"""A scalar string as a tensor bundle stores it, with its checksums."""

from __future__ import annotations

import google_crc32c

from prunectl.formats.protobuf_write import varint
from prunectl.formats.tensorflow.leveldb_table import mask

_BIG = 1 << 32
"""From here on, the length counts into the checksum with eight bytes."""


def stored(text: bytes) -> tuple[bytes, int]:
    """Return the bytes in the data shard, and the masked CRC-32C for the index."""
    crc = google_crc32c.value(len(text).to_bytes(4 if len(text) < _BIG else 8, "little"))
    of_length = mask(crc).to_bytes(4, "little")
    crc = google_crc32c.extend(google_crc32c.extend(crc, of_length), text)
    return varint(len(text)) + of_length + text, mask(crc)
