"""Files that TensorBoard reads, written without it."""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from prunectl.formats.protobuf_write import head, number
from prunectl.formats.tensorflow.leveldb_table import masked_crc

_WALL_TIME = 1 << 3 | 1
_SIMPLE_VALUE = 2 << 3 | 5
_STEP, _VERSION, _SUMMARY, _VALUE, _TAG = 2, 3, 5, 1, 1


class Events:
    """A file of events in a folder."""

    def __init__(self, folder: Path) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.prunectl.{os.getpid()}"
        self._file = (folder / name).open("ab")
        version = b"brain.Event:2"
        self._write(head(_VERSION, len(version)) + version)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write numbers of one step."""
        values = b"".join(_field(_VALUE, _scalar(tag, value)) for tag, value in numbers.items())
        self._write(number(_STEP, step) + _field(_SUMMARY, values))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        record = struct.pack("<Bd", _WALL_TIME, time.time()) + event
        length = struct.pack("<Q", len(record))
        self._file.write(length + _crc(length) + record + _crc(record))


def _scalar(tag: str, value: float) -> bytes:
    try:
        packed = struct.pack("<Bf", _SIMPLE_VALUE, value)
    except OverflowError:  # TensorBoard's numbers are 32-bit
        packed = struct.pack("<Bf", _SIMPLE_VALUE, math.copysign(math.inf, value))
    return _field(_TAG, tag.encode()) + packed


def _field(where: int, content: bytes) -> bytes:
    return head(where, len(content)) + content


def _crc(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc(data))
