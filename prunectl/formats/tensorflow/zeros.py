"""Runs of zeros in a tensor bundle, which several entries may share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import google_crc32c

from prunectl.formats.tensorflow.bundle_index import Entry
from prunectl.formats.tensorflow.leveldb_table import mask

MAX_CLAIMS = 64
"""A run shared by every slot of an optimizer saves a few times the weights; far beyond that, a file only pretends."""
_FREE_BYTES = 1 << 20
_PIECE = bytes(1 << 20)


class TooManyClaimsError(ValueError):
    """Entries share bytes more often than any optimizer has use for."""


@cache
def crc_of_zeros(nbytes: int) -> int:
    """Return the masked CRC-32C of so many zeros."""
    return mask(_plain_crc(nbytes))


def sharing(entries: Iterable[Entry], file_bytes: int) -> dict[bytes, Entry]:
    """Return the entries whose bytes are those at the beginning of another's, with that other: zeros for them all."""
    found: dict[bytes, Entry] = {}
    leader: Entry | None = None
    claimed = 0
    for entry in sorted(entries, key=lambda found: (found.shard, found.offset, -found.nbytes)):
        if leader is None or (entry.shard, entry.offset) != (leader.shard, leader.offset):
            leader = entry
            continue
        claimed += entry.nbytes
        if claimed > MAX_CLAIMS * file_bytes + _FREE_BYTES:
            raise TooManyClaimsError(f"its tensors claim over {MAX_CLAIMS} times the bytes of its data")
        if 0 < entry.nbytes <= leader.nbytes <= file_bytes and _is_zeros(entry) and _is_zeros(leader):
            found[entry.key] = leader
    return found


def _is_zeros(entry: Entry) -> bool:
    return entry.crc == crc_of_zeros(entry.nbytes)


def _plain_crc(nbytes: int) -> int:
    crc = 0
    for piece in zeros(nbytes):
        crc = google_crc32c.extend(crc, piece)
    return crc


def zeros(nbytes: int) -> Iterator[bytes]:
    """Yield so many zeros, piece by piece."""
    for begin in range(0, nbytes, len(_PIECE)):
        yield _PIECE[: nbytes - begin]
