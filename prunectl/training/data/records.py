"""Examples in TFRecord files, read without TensorFlow."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from prunectl.errors import UsageError
from prunectl.training.data import schema
from prunectl.training.data.example import Value, features, kind
from prunectl.training.data.grammar import Spec, existing
from prunectl.training.data.schema import Feature
from prunectl.training.data.source import Arrays, Batch
from prunectl.training.data.stream import Stream, in_pieces
from prunectl.training.data.tfrecord import records

OPTIONS = ("schema",)
RECORDS_AT_ONCE = 256
_SUFFIXES = (".tfrecord", ".tfrecords", ".tfrec", ".tfrecord.gz", ".tfrecords.gz")


def fits(where: str) -> bool:
    """Whether a SPEC names TFRecord files, also the many of one split such as train.tfrecord-00000-of-00008."""
    return where.endswith(_SUFFIXES) or ".tfrecord-" in Path(where).name


def open_records(spec: Spec) -> Stream:
    """Return the source that `'*.tfrecord?schema=f.json'` means."""
    paths = [Path(name) for name in sorted(glob.glob(spec.where))] or [existing(spec.path)]
    if "schema" not in spec.options:
        held = ", ".join(
            f"{name} ({kind(value)})" for _, values in _examples(paths[:1], 1) for name, value in values.items()
        )
        raise UsageError(
            f"{spec.text} needs a schema that says which features are inputs and targets: '{spec.where}?schema=f.json'",
            hint=f"f.json is like {schema.EXAMPLE}; the first example has {held or 'no features'}",
        )
    said = schema.read(existing(Path(spec.options["schema"])))

    def read() -> Iterator[Batch]:
        for piece in in_pieces(_examples(paths), RECORDS_AT_ONCE):
            yield Batch(_stacked(said.x, piece), _stacked(said.y, piece) if said.y else None)

    return Stream(spec.text, None, bool(said.y), read)


def _examples(paths: Sequence[Path], most: int | None = None) -> Iterator[tuple[str, Mapping[str, Value]]]:
    """Yield the features of each example, and what to call it."""
    for path in paths:
        for number, record in enumerate(records(path)):
            if most is not None and number >= most:
                return
            what = f"record {number} of {path}"
            yield what, features(record, what)


def _stacked(wanted: Sequence[Feature], piece: Sequence[tuple[str, Mapping[str, Value]]]) -> Arrays:
    arrays = tuple(np.stack([feature.array(values, what) for what, values in piece]) for feature in wanted)
    return arrays[0] if len(arrays) == 1 else arrays
