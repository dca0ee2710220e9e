"""Where the entries of a plain tar lie."""

from __future__ import annotations

import mmap
from pathlib import Path

from prunectl.errors import InputError

BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES
"""A tar is filled up to whole records: one that is not was cut."""
MAX_ENTRIES = 10_000
_FILES = b"\x000"
"""The two marks of a plain file."""


def locate(path: Path, data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Return the first and the last byte of each plain file in a tar."""
    if len(data) % RECORD_BYTES:
        raise InputError(f"{path} is truncated: a tar has whole records of {RECORD_BYTES} bytes")
    found: dict[str, tuple[int, int]] = {}
    at = 0
    for _ in range(MAX_ENTRIES):
        header = data[at : at + BLOCK_BYTES]
        if header == bytes(BLOCK_BYTES):
            return found
        name, size = _entry(path, header)
        begin = at + BLOCK_BYTES
        if begin + size > len(data):
            raise InputError(f"{path} is truncated or damaged: its entry {name} reaches past the end")
        if header[156] in _FILES:
            if name in found:
                raise InputError(f"{path} is refused: it holds two entries named {name}")
            found[name] = begin, begin + size
        at = begin + -(-size // BLOCK_BYTES) * BLOCK_BYTES
    raise InputError(f"{path} is refused: it has more entries than any model")


def _entry(path: Path, header: bytes) -> tuple[str, int]:
    stated = header[148:156].strip(b"\0 ")
    actual = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    try:
        is_right = len(header) == BLOCK_BYTES and int(stated, 8) == actual
        size = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise InputError(f"{path} is truncated or damaged: a header in the tar is broken") from error
    if not is_right or size < 0:
        raise InputError(f"{path} is truncated or damaged: a header in the tar is broken")
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
    return name.removeprefix("./"), size
