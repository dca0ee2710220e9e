"""Does this look like …? Judged by content, with the standard library alone."""

from __future__ import annotations

from prunectl.formats.peek import Peek

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
TABLE_MAGIC = bytes.fromhex("57fb808b247547db")
TORCH_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""The pickle opcode LONG1 with torch's magic number, which every legacy file begins with."""


def is_hdf5(peek: Peek) -> bool:
    """HDF5, with or without a user block before it."""
    return any(peek.head[at : at + 8] == HDF5_MAGIC for at in (0, 512, 1024, 2048))


def is_keras_zip(peek: Peek) -> bool:
    """A zip with a Keras configuration and weights."""
    return "config.json" in peek.entries and "model.weights.h5" in peek.entries


def is_saved_model(peek: Peek) -> bool:
    """A folder with a SavedModel in it."""
    return peek.holds("saved_model.pb")


def is_checkpoint_index(peek: Peek) -> bool:
    """The index of a TensorFlow checkpoint, a LevelDB table."""
    return peek.tail.endswith(TABLE_MAGIC)


def is_exported_program(peek: Peek) -> bool:
    """A zip that `torch.export.save` wrote."""
    return peek.entries_end_with("archive_format") or peek.entries_end_with("serialized_exported_program.json")


def is_torch_zip(peek: Peek) -> bool:
    """A zip with a pickle program that rebuilds tensors."""
    return peek.entries_end_with("data.pkl") or peek.entries_end_with("constants.pkl")


def is_torch_legacy(peek: Peek) -> bool:
    """The pickles that torch wrote before it used zips."""
    return peek.head[:1] == b"\x80" and peek.head[2:14] == TORCH_LEGACY_MAGIC


def is_torch_tar(peek: Peek) -> bool:
    """The tar of the earliest torch."""
    first = peek.head[:100].split(b"\0", 1)[0].removeprefix(b"./")
    return peek.head[257:262] == b"ustar" and first in {b"storages", b"tensors", b"pickle", b"sys_info"}


def is_safetensors(peek: Peek) -> bool:
    """A length below 2^32 (or any length, if the name says so), then a JSON header."""
    is_length = peek.head[4:8] == bytes(4) or peek.path.suffix == ".safetensors"
    return is_length and peek.head[8:9] == b"{"


def is_shard_index(peek: Peek) -> bool:
    """The JSON that says which shard holds which tensor."""
    return peek.head.lstrip()[:1] == b"{" and peek.path.name.endswith(".index.json")


def is_tflite(peek: Peek) -> bool:
    """A FlatBuffer with TensorFlow Lite's identifier."""
    return peek.head[4:8] == b"TFL3"


def is_onnx(peek: Peek) -> bool:
    """A protobuf whose first fields are those of a ModelProto; it has no magic number.

    Field 1 is the version of the format, a small number; every writer puts it first, but the order is not
    promised, so a file named .onnx may also begin with another field that a ModelProto has.
    """
    head = peek.head
    if peek.path.name == "saved_model.pb":  # begins with the same fields
        return False
    starts_with_version = head[:1] == b"\x08" and len(head) > 2 and head[1] < 0x80 and head[2] in _MODEL_FIELDS
    return starts_with_version or (peek.path.suffix == ".onnx" and head[:1] != b"" and head[0] in _MODEL_FIELDS)


_MODEL_FIELDS = frozenset({0x08, 0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72, 0xA2, 0xCA})
"""First tag bytes of ModelProto's fields: 1..8 and 14, then those that take two bytes (20, 25)."""
