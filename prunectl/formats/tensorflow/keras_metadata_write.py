"""The Keras metadata of a SavedModel as of a model that was never compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.json_text import parse_object
from prunectl.formats.mapped import map_file
from prunectl.formats.protobuf import BYTES, WireError, fields
from prunectl.formats.protobuf_write import head
from prunectl.formats.stripping import Part, Removed

_IN_A_FILE_OF_ITS_OWN = (1, 5)
"""Fields on the way to each JSON text in `keras_metadata.pb`."""
_IN_THE_GRAPH = (2, 7, 1, 4, 3)
"""The same in `saved_model.pb`, where Keras before 2.5 kept them."""
_TRAINING = "training_config"


def training_in(folder: Path) -> tuple[dict[Path, bytes], tuple[Removed, ...]]:
    """Return what becomes of the file that holds training configurations, and what goes; nothing if there are none."""
    own = folder / "keras_metadata.pb"
    path, trail = (own, _IN_A_FILE_OF_ITS_OWN) if own.is_file() else (folder / "saved_model.pb", _IN_THE_GRAPH)
    plain = _uncompiled(path, trail)
    lost = path.stat().st_size - len(plain)
    if not lost:
        return {}, ()
    return {path: plain}, (Removed(_TRAINING, Part.TRAINING, max(lost, 0)),)


def _uncompiled(path: Path, trail: tuple[int, ...]) -> bytes:
    """Return the file without the training configurations in it."""

    def plain(text: bytes) -> bytes:
        if f'"{_TRAINING}"'.encode() not in text:
            return text
        facts = parse_object(text, path, "its Keras metadata")
        if facts.get(_TRAINING) is None:
            return text
        return json.dumps({key: value for key, value in facts.items() if key != _TRAINING}).encode()

    data = map_file(path)
    try:
        return _changed(data, 0, len(data), trail, plain)
    except WireError as error:
        raise InputError(f"{path} is damaged: its Keras metadata holds {error}") from error


def _changed(data: memoryview, begin: int, end: int, trail: tuple[int, ...], change: Callable[[bytes], bytes]) -> bytes:
    if not trail:
        return change(bytes(data[begin:end]))
    out, at = bytearray(), begin
    for found in fields(data, begin, end):
        raw = data[at : found.end]
        if found.number == trail[0] and found.wire == BYTES:
            message = _changed(data, found.begin, found.end, trail[1:], change)
            is_same = message == data[found.begin : found.end]
            out += raw if is_same else head(found.number, len(message)) + message
        else:
            out += raw
        at = found.end
    return bytes(out)
