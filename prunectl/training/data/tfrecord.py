"""Examples in TFRecord files, whose records are a length, its checksum, the data and their checksum."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.formats.protobuf import BYTES, Field, WireError, fields, text, varints
from prunectl.formats.tensorflow.leveldb import masked_crc
from prunectl.training.backend import ModelSignature
from prunectl.training.data.images import ImageOptions, decode
from prunectl.training.data.readers import NUMERIC, IterableSource, chunked, order_by_port
from prunectl.training.data.source import Arrays, Batch
from prunectl.training.data.spec import DataSpec, require_path

_HEAD_BYTES = 12
_CRC_BYTES = 4
_GZIP = b"\x1f\x8b"
MAX_RECORD_BYTES = 1 << 30


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a file, which may be gzip-compressed, and verify their checksums."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    # The first bytes of a length may equal gzip's magic number, but then its checksum matches too.
    is_compressed = head.startswith(_GZIP) and not _has_valid_length(head)
    number = 0
    try:
        with gzip.open(path) if is_compressed else path.open("rb") as file:
            while (record := _read_record(file, path, number)) is not None:
                yield record
                number += 1
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged: it cannot be decompressed after record {number}") from error


def _has_valid_length(head: bytes) -> bool:
    return len(head) == _HEAD_BYTES and masked_crc(head[:8]) == int.from_bytes(head[8:], "little")


def _read_record(file: IO[bytes] | gzip.GzipFile, path: Path, number: int) -> bytes | None:
    head = file.read(_HEAD_BYTES)
    if not head:
        return None
    if not _has_valid_length(head):
        reason = "is not a TFRecord file" if number == 0 else "is truncated or damaged"
        raise InputError(f"{path} {reason}: the length of record {number} has a wrong checksum")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_RECORD_BYTES:
        raise InputError(f"{path} is refused: record {number} claims {length} bytes")
    body = file.read(length + _CRC_BYTES)
    if len(body) < length + _CRC_BYTES:
        raise InputError(f"{path} is truncated: it ends within record {number}")
    record = body[:length]
    if masked_crc(record) != int.from_bytes(body[length:], "little"):
        raise InputError(f"{path} is damaged: record {number} has a wrong checksum")
    return record


Value = Array | list[bytes]
"""The value of a feature: int64 or float32 numbers, or byte strings."""
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3


def parse_example(record: bytes, what: str) -> Mapping[str, Value]:
    """Parse a tf.train.Example into its features by name."""
    data = memoryview(record)
    try:
        return dict(
            _entry(data, entry)
            for outer in fields(data)
            if (outer.number, outer.wire) == (1, BYTES)
            for entry in fields(data, outer.begin, outer.end)
            if (entry.number, entry.wire) == (1, BYTES)
        )
    except WireError as error:
        raise InputError(f"{what} is not a tf.train.Example: {error}") from error


def describe_feature(value: Value) -> str:
    """Describe the contents of a feature for a message."""
    if isinstance(value, list):
        return f"{len(value)} x bytes" if len(value) != 1 else f"{len(value[0])} bytes"
    return f"{value.size} x {value.dtype}"


def _entry(data: memoryview, entry: Field) -> tuple[str, Value]:
    name, value = "", list[bytes]()
    feature: Value = value
    for field in fields(data, entry.begin, entry.end):
        if (field.number, field.wire) == (1, BYTES):
            name = text(data, field)
        elif (field.number, field.wire) == (2, BYTES):
            feature = _parse_feature(data, field)
    return name, feature


def _parse_feature(data: memoryview, feature: Field) -> Value:
    values: Value = []
    for field in fields(data, feature.begin, feature.end):
        if field.wire != BYTES:
            raise WireError(f"wire type {field.wire} in a feature")
        if field.number == _BYTES_LIST:
            values = [
                bytes(data[item.begin : item.end]) for item in fields(data, field.begin, field.end) if item.number == 1
            ]
        elif field.number == _FLOAT_LIST:
            runs = [bytes(data[run.begin : run.end]) for run in fields(data, field.begin, field.end) if run.number == 1]
            raw = b"".join(runs)
            if len(raw) % 4:
                raise WireError("a list of floats that ends within one")
            values = np.frombuffer(raw, "<f4")
        elif field.number == _INT64_LIST:
            values = _integers(data, field)
    return values


def _integers(data: memoryview, values: Field) -> Array:
    runs = [
        varints(bytes(data[run.begin : run.end])) if run.wire == BYTES else np.array([run.value], np.uint64)
        for run in fields(data, values.begin, values.end)
        if run.number == 1
    ]
    return np.concatenate(runs).view(np.int64) if runs else np.zeros(0, np.int64)


KEYS = ("feature", "dtype", "shape", "encoding")
ENCODINGS = ("raw", "image")
EXAMPLE = '{"x": {"feature": "image", "dtype": "uint8", "shape": [28, 28, 1]}, "y": {"feature": "label"}}'


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """The conversion of a feature to an array."""

    name: str
    dtype: np.dtype[Any] | None
    """None keeps the dtype of the feature."""
    shape: tuple[int, ...]
    is_image: bool

    def array(self, values: Mapping[str, Value], what: str) -> Array:
        """The array of the feature in one example."""
        if self.name not in values:
            features = ", ".join(f"{name} ({describe_feature(value)})" for name, value in values.items())
            raise InputError(
                f"{what} has no feature {self.name!r}",
                did_you_mean=tuple(get_close_matches(self.name, values)),
                hint=f"features: {features or 'none'}",
            )
        content = values[self.name]
        flat = self._from_bytes(content, what) if isinstance(content, list) else content
        if flat.size != int(np.prod(self.shape)):
            raise InputError(
                f"{what}: the feature {self.name!r} holds {flat.size} numbers ({describe_feature(content)}), "
                f"but the schema gives the shape {list(self.shape)}"
            )
        shaped = flat.reshape(self.shape)
        return shaped if self.dtype is None or isinstance(content, list) else shaped.astype(self.dtype)

    def _from_bytes(self, values: list[bytes], what: str) -> Array:
        if len(values) != 1:
            raise InputError(f"{what}: the feature {self.name!r} holds {describe_feature(values)}, not one byte string")
        if self.is_image:
            height, width, *channels = self.shape
            color = "rgb" if channels == [3] else "grey"
            return decode(values[0], ImageOptions(color, (height, width)), f"{what}, feature {self.name!r}")
        if self.dtype is None:
            raise UsageError(f"the feature {self.name!r} holds bytes: add its dtype to the schema", hint=EXAMPLE)
        if len(values[0]) % self.dtype.itemsize:
            raise InputError(f"{what}: the feature {self.name!r} ends within a {self.dtype}")
        return np.frombuffer(values[0], self.dtype.newbyteorder("<"))


@dataclass(frozen=True, slots=True)
class Schema:
    """The features that are inputs and targets of an example."""

    x: tuple[FeatureSpec, ...]
    y: tuple[FeatureSpec, ...]


def read_example_schema(path: Path) -> Schema:
    """Read the schema in a JSON file."""
    try:
        schema = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON", hint=f"a schema is {EXAMPLE}") from error
    if not isinstance(schema, dict) or "x" not in schema or schema.keys() - {"x", "y"}:
        raise InputError(f"{path} is not a schema: it must have x, and y if there are targets", hint=EXAMPLE)
    return Schema(_side(path, schema["x"]), _side(path, schema["y"]) if "y" in schema else ())


def _side(path: Path, entry: Any) -> tuple[FeatureSpec, ...]:
    many = entry if isinstance(entry, list) else [entry]
    if not many:
        raise InputError(f"{path} is not a schema: a list of features is empty", hint=EXAMPLE)
    return tuple(_feature_spec(path, feature) for feature in many)


def _feature_spec(path: Path, entry: Any) -> FeatureSpec:
    if not isinstance(entry, dict) or not isinstance(entry.get("feature"), str):
        raise InputError(f"{path} is not a schema: x and y must each name a feature", hint=EXAMPLE)
    for key in entry:
        if key not in KEYS:
            raise InputError(
                f"{path}: a feature has no {key!r}",
                did_you_mean=tuple(get_close_matches(key, KEYS)),
                hint=f"keys: {', '.join(KEYS)}",
            )
    shape = entry.get("shape", [])
    if not isinstance(shape, list) or not all(type(length) is int and length > 0 for length in shape):
        raise InputError(f"{path}: the shape {shape} of {entry['feature']} is not a list of lengths", hint=EXAMPLE)
    encoding = entry.get("encoding", "raw")
    if encoding not in ENCODINGS:
        raise InputError(f"{path}: the encoding {encoding!r} is not known", hint=f"known: {', '.join(ENCODINGS)}")
    if encoding == "image" and (len(shape) not in {2, 3} or (len(shape) == 3 and shape[2] not in {1, 3})):
        raise InputError(f"{path}: an image has the shape [height, width, 1 or 3], not {shape}")
    return FeatureSpec(entry["feature"], _dtype(path, entry.get("dtype")), tuple(shape), encoding == "image")


def _dtype(path: Path, name: Any) -> np.dtype[Any] | None:
    if name is None:
        return None
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in NUMERIC:
        raise InputError(f"{path}: {name!r} is not a type of numbers", hint="use uint8, int64 or float32")
    return dtype


RECORDS_AT_ONCE = 256


def record_names(spec: DataSpec) -> list[str]:
    """The names of the features in the schema; empty without a schema, which is an error only when records are read."""
    path = spec.options.get("schema", "")
    schema = read_example_schema(require_path(Path(path))) if path else Schema((), ())
    return [feature.name for feature in (*schema.x, *schema.y)]


def open_records(spec: DataSpec, signature: ModelSignature | None, *_: object) -> IterableSource:
    """Open `'*.tfrecord?schema=f.json'`."""
    paths = [Path(name) for name in sorted(glob.glob(spec.where))] or [require_path(spec.path)]
    if "schema" not in spec.options:
        features = ", ".join(
            f"{name} ({describe_feature(value)})"
            for _, values in _examples(paths[:1], 1)
            for name, value in values.items()
        )
        raise UsageError(
            f"{spec.text} needs a schema that names the features of inputs and targets: '{spec.where}?schema=f.json'",
            hint=f"an example of f.json: {EXAMPLE}; the first record has {features or 'no features'}",
        )
    schema = read_example_schema(require_path(Path(spec.options["schema"])))
    x, x_notes = order_by_port(spec.text, [feature.name for feature in schema.x], signature.inputs if signature else ())
    y, y_notes = order_by_port(
        spec.text, [feature.name for feature in schema.y], signature.outputs if signature else ()
    )
    schema = Schema(tuple(schema.x[index] for index in x), tuple(schema.y[index] for index in y))

    def read() -> Iterator[Batch]:
        for piece in chunked(_examples(paths), RECORDS_AT_ONCE):
            yield Batch(_stack(schema.x, piece), _stack(schema.y, piece) if schema.y else None)

    target_name = schema.y[0].name if len(schema.y) == 1 else ""
    return IterableSource(spec.text, None, bool(schema.y), read, (*x_notes, *y_notes), target_name)


def _examples(paths: Sequence[Path], most: int | None = None) -> Iterator[tuple[str, Mapping[str, Value]]]:
    """Yield a name for messages and the features of each example."""
    for path in paths:
        for number, record in enumerate(read_records(path)):
            if most is not None and number >= most:
                return
            what = f"record {number} of {path}"
            yield what, parse_example(record, what)


def _stack(features: Sequence[FeatureSpec], piece: Sequence[tuple[str, Mapping[str, Value]]]) -> Arrays:
    arrays = tuple(np.stack([feature.array(values, what) for what, values in piece]) for feature in features)
    return arrays[0] if len(arrays) == 1 else arrays
