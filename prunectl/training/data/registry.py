"""Every kind of data at once: how a SPEC is recognised, what opens it, and what its options make of it."""

from __future__ import annotations

import glob
import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.pruning import RANDOM_PREFIX
from prunectl.training.backend import ModelSignature
from prunectl.training.data import spec as data_spec
from prunectl.training.data.source import Arrays, Batch, Source, as_tuple, map_arrays, peek
from prunectl.training.data.spec import (
    FUNCTION,
    IMAGE_OPTIONS,
    NPY_SEPARATOR,
    NPZ_ARRAYS,
    RECORD_OPTIONS,
    TABLE_OPTIONS,
    TEXT_OPTIONS,
    TEXT_SUFFIXES,
    DataSpec,
    parse_shape,
    pictures_in,
)


@dataclass(frozen=True, slots=True)
class SourceKind:
    """One kind of data."""

    fits: Callable[[str], bool]
    """Whether what stands before the question mark names it."""
    opener: str
    """`module:function` of this package, given the SPEC, the model's signature and the seed; imported when it opens."""
    options: tuple[str, ...] = ()
    names: str = ""
    """The same, given the SPEC, of what tells the names of its arrays before a model is there to take them."""


TOKEN_IDS = SourceKind(lambda where: where.endswith(".npy"), "text:open_text", TEXT_OPTIONS)
"""An array without labels, for a model that takes token ids."""
_RECORD_SUFFIXES = (".tfrecord", ".tfrecords", ".tfrec", ".tfrecord.gz", ".tfrecords.gz")
KINDS = (
    SourceKind(lambda where: where.startswith(RANDOM_PREFIX), "functions:open_random"),
    SourceKind(
        lambda where: where.endswith(".npz") or bool(NPZ_ARRAYS.fullmatch(where)),
        "numpy_files:open_npz",
        names="numpy_files:npz_names",
    ),
    SourceKind(lambda where: where.endswith(".npy"), "numpy_files:open_npy", names="numpy_files:npy_names"),
    SourceKind(lambda where: where.endswith(TEXT_SUFFIXES), "text:open_text", TEXT_OPTIONS),
    SourceKind(lambda where: where.endswith((".csv", ".tsv")), "tables:open_csv", TABLE_OPTIONS),
    SourceKind(lambda where: where.endswith((".parquet", ".pq")), "tables:open_parquet", TABLE_OPTIONS),
    SourceKind(
        # Also the many files of a split, such as train.tfrecord-00000-of-00008.
        lambda where: where.endswith(_RECORD_SUFFIXES) or ".tfrecord-" in Path(where).name,
        "tfrecord:open_records",
        RECORD_OPTIONS,
        names="tfrecord:record_names",
    ),
    SourceKind(
        lambda where: bool(FUNCTION.fullmatch(where)), "functions:open_function", names="functions:function_names"
    ),
    SourceKind(lambda where: where.endswith("/") or Path(where).is_dir(), "images:open_images", IMAGE_OPTIONS),
)


def open_source(spec: str, *, signature: ModelSignature | None, seed: int) -> Source:
    """The examples that a SPEC means, as the file has them but for what its options say."""
    parsed = data_spec.parse(spec)
    is_text = signature is not None and signature.text is not None and parsed.path.is_file()
    for kind in (TOKEN_IDS, *KINDS) if is_text else KINDS:
        if kind.fits(parsed.where):
            data_spec.check_options(parsed, kind.options)
            source: Source = _function(kind.opener)(parsed, signature, seed)
            if signature is not None and signature.text is not None and signature.text.shifts_labels:
                source = _function("next_token:follow")(source)
            return apply_options(source, parsed, signature)
    raise _unknown(parsed)


def array_names(spec: str) -> tuple[str, ...]:
    """The names of the arrays that a SPEC means, where they have some: a model may take as many as there are."""
    parsed = data_spec.parse(spec)
    kind = next((kind for kind in KINDS if kind.fits(parsed.where)), None)
    names: Iterable[str] = _function(kind.names)(parsed) if kind is not None and kind.names else ()
    return tuple(names)


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"prunectl.training.data.{module}"), name)


def check_exists(*specs: str) -> None:
    """Refuse data that is not there, before a framework is loaded for it."""
    for where in (data_spec.parse(spec).where for spec in specs if spec):
        if where.startswith(RANDOM_PREFIX) or FUNCTION.fullmatch(where) or glob.has_magic(where):
            continue
        arrays = NPZ_ARRAYS.fullmatch(where)
        # Every other part is a separator.
        names = NPY_SEPARATOR.split(where)[::2] if where.endswith(".npy") else [arrays["path"] if arrays else where]
        for name in names:
            data_spec.require_path(Path(name))


def _unknown(spec: DataSpec) -> UsageError:
    data_spec.require_path(spec.path)
    return UsageError(f"--data {spec.text} is not in a format that prunectl reads", hint=data_spec.GRAMMAR)


_IN_A_FILE = re.compile(r"(?P<path>[^:]+\.py):[A-Za-z_]\w*(?::(?:max|min))?")


def files_of_spec(text: str) -> tuple[Path, ...]:
    """The files that a data SPEC means."""
    spec = data_spec.parse(text)
    schema = [Path(spec.options["schema"])] if "schema" in spec.options else []
    if code := _IN_A_FILE.fullmatch(spec.where):
        return (Path(code["path"]),)
    if arrays := NPZ_ARRAYS.fullmatch(spec.where):
        return (Path(arrays["path"]),)
    if os.path.isdir(spec.where):
        pictures = (picture for folder in class_folders(spec.path) for picture in pictures_in(folder))
        return tuple(picture for picture in pictures if picture.is_file())
    # Every other part is a separator.
    names = NPY_SEPARATOR.split(spec.where)[::2] if spec.where.endswith(".npy") else sorted(glob.glob(spec.where))
    paths = [Path(name) for name in names or [spec.where]]
    return tuple(path for path in (*paths, *schema) if path.is_file())


def class_folders(root: Path) -> tuple[Path, ...]:
    """A folder of pictures with those of its classes, links too: as far down as pictures are looked for."""
    classes = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return (root, *classes)


def files_of_references(values: Iterable[Any]) -> Iterator[Path]:
    """Yield the files of the functions that words name as `./file.py:name`."""
    for value in values:
        for reference in value if isinstance(value, list | tuple) else (value,):
            named = _IN_A_FILE.fullmatch(reference) if isinstance(reference, str) else None
            if named is not None and Path(named["path"]).is_file():
                yield Path(named["path"])


_BYTE_MAX = 255
_IMAGENET = "0.485,0.456,0.406:0.229,0.224,0.225"
_HINT = "write norm=unit (x / 255), norm=imagenet, norm=none, norm=/16 (x / 16), or norm=MEAN:STD of x / 255"


@dataclass(frozen=True, slots=True)
class Normalization:
    """x / 255, or over another number, less a mean, over a deviation: of all channels, or of each."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    scale: float = _BYTE_MAX

    def apply(self, x: Array, channel_axis: int) -> Array:
        """The numbers as 32-bit floats."""
        along = [1] * x.ndim
        along[channel_axis] = -1
        mean = np.array(self.mean, np.float32)
        deviation = np.array(self.deviation, np.float32)
        if mean.size > 1:
            mean, deviation = mean.reshape(along), deviation.reshape(along)
        normalized: Array = (x.astype(np.float32) / np.float32(self.scale) - mean) / deviation
        return normalized


def normalize(source: Source, text: str, *, is_channels_first: bool) -> Source:
    """A source whose inputs are normalised as the option `norm` says."""
    if text == "none":
        return source.changed(lambda batch: Batch(_each_float(batch.x), batch.y))
    norm = _parsed(text)
    head = peek(source)
    if head is None:
        return source
    first = as_tuple(head.x)
    chosen = {0} if len(first) == 1 else {index for index, x in enumerate(first) if x.dtype == np.uint8}
    if not chosen:
        raise UsageError(f"norm={text} needs inputs of type uint8, and {source.name} has none")
    for index in chosen:
        is_byte = norm.scale == _BYTE_MAX
        if is_byte and first[index].dtype.kind == "f" and np.abs(first[index]).max(initial=0) <= 1:
            raise UsageError(
                f"norm={text} divides by {_BYTE_MAX}, but the inputs of {source.name} are already between -1 and 1",
                hint="leave out norm",
            )
    places = {index: _channel_axis(first[index], norm, is_channels_first=is_channels_first) for index in chosen}

    def change(batch: Batch) -> Batch:
        arrays = tuple(
            norm.apply(x, places[index]) if index in places else x for index, x in enumerate(as_tuple(batch.x))
        )
        return Batch(arrays if isinstance(batch.x, tuple) else arrays[0], batch.y)

    return source.changed(change)


def _each_float(arrays: Arrays) -> Arrays:
    return map_arrays(lambda x: x.astype(np.float32) if x.dtype == np.uint8 else x, arrays)


def _parsed(text: str) -> Normalization:
    if text.startswith("/"):
        try:
            scale = float(text[1:])
        except ValueError as error:
            raise UsageError(f"norm={text} has no divisor", hint=_HINT) from error
        if not np.isfinite(scale) or scale <= 0:
            raise UsageError(f"the divisor in norm={text} must be above zero", hint=_HINT)
        return Normalization((0.0,), (1.0,), scale)
    mean, sign, deviation = {"unit": "0:1", "imagenet": _IMAGENET}.get(text, text).partition(":")
    try:
        norm = Normalization(tuple(map(float, mean.split(","))), tuple(map(float, deviation.split(","))))
    except ValueError as error:
        raise UsageError(f"norm={text} is not known", hint=_HINT) from error
    numbers = (*norm.mean, *norm.deviation)
    if not sign or len(norm.mean) != len(norm.deviation) or not np.isfinite(numbers).all() or min(norm.deviation) <= 0:
        raise UsageError(f"norm={text} needs as many standard deviations above zero as means", hint=_HINT)
    return norm


def _channel_axis(x: Array, norm: Normalization, *, is_channels_first: bool) -> int:
    """The axis that is as long as there are means: where both ends are, the model's own layout decides."""
    places = [axis for axis in (1, x.ndim - 1) if axis and x.shape[axis] == len(norm.mean)]
    if len(norm.mean) == 1:
        return x.ndim - 1
    if not places or x.ndim < 3:
        raise UsageError(f"norm has {len(norm.mean)} channels, which an input of the shape {x.shape[1:]} does not have")
    return places[0 if is_channels_first else -1]


def apply_options(source: Source, spec: DataSpec, signature: ModelSignature | None) -> Source:
    """A source with the general options of its SPEC: classes first, then limit, then what changes numbers."""
    if spec.flag("relabel") and "classes" not in spec.options:
        raise UsageError("relabel needs classes, which it renumbers from 0", hint="write classes=0,3,5&relabel=1")
    if "classes" in spec.options:
        source = _only_classes(source, spec)
    limit = spec.int_option("limit")
    if limit is not None:
        source = source.first(limit)
    if "shape" in spec.options:
        source = source.changed(_reshape(spec))
    if spec.flag("flatten"):
        source = source.changed(_on_inputs(lambda x: x.reshape(len(x), int(np.prod(x.shape[1:])))))
    if "norm" in spec.options:
        first = bool(signature and signature.is_channels_first)
        source = normalize(source, spec.options["norm"], is_channels_first=first)
    depth = spec.int_option("onehot")
    return source if depth is None else source.changed(_on_targets(_one_hot(depth), source, "onehot"))


def _only_classes(source: Source, spec: DataSpec) -> Source:
    labels = spec.list_option("classes")
    if not labels or any(not label.isdecimal() for label in labels) or len(set(labels)) < len(labels):
        raise UsageError(f"classes={spec.options['classes']} is not a list of classes", hint="write classes=0,3,5")
    chosen = np.array([int(label) for label in labels])
    if not source.has_targets:
        raise UsageError(f"classes= cannot be used: {source.name} has no targets")
    filtered = source.where(lambda y: np.isin(_labels(y, "classes"), chosen))
    if not spec.flag("relabel"):
        return filtered
    ranked = np.sort(chosen)
    return filtered.changed(_on_targets(lambda y: np.searchsorted(ranked, _labels(y, "relabel")), filtered, "relabel"))


def _labels(y: Arrays, option: str) -> Array:
    """One whole number for each example."""
    arrays = as_tuple(y)
    # Not -1, which says nothing where there are no examples.
    flat = arrays[0].reshape(len(arrays[0]), math.prod(arrays[0].shape[1:]))
    if len(arrays) > 1 or flat.shape[1:] not in {(1,), (0,)}:
        raise InputError(
            f"{option} needs one label for each example, but the targets have the shape {arrays[0].shape[1:]}"
        )
    labels = flat[:, 0]
    if not np.array_equal(labels, np.trunc(labels)):
        raise InputError(f"{option} needs labels that are whole numbers")
    return labels.astype(np.int64)


def _one_hot(depth: int) -> Callable[[Arrays], Array]:
    def encode(y: Arrays) -> Array:
        labels = _labels(y, "onehot")
        wrong = labels[(labels < 0) | (labels >= depth)]
        if wrong.size:
            raise InputError(f"the label {wrong[0]} does not fit onehot={depth}: labels must be 0 to {depth - 1}")
        return np.eye(depth, dtype=np.float32)[labels]

    return encode


def _reshape(spec: DataSpec) -> Callable[[Batch], Batch]:
    text = spec.options["shape"]
    shapes = [parse_shape("shape", part) for part in text.split("+")]

    def one(x: Array, shape: tuple[int, ...]) -> Array:
        if int(np.prod(x.shape[1:])) != int(np.prod(shape)):
            raise InputError(f"shape={text}: inputs of the shape {x.shape[1:]} cannot be reshaped to {shape}")
        return x.reshape(len(x), *shape)

    def change(batch: Batch) -> Batch:
        arrays = as_tuple(batch.x)
        if len(arrays) != len(shapes):
            raise UsageError(f"shape={text} has {len(shapes)} shapes, but there are {len(arrays)} inputs")
        reshaped = tuple(map(one, arrays, shapes))
        return replace(batch, x=reshaped if isinstance(batch.x, tuple) else reshaped[0])

    return change


def _on_inputs(change: Callable[[Array], Array]) -> Callable[[Batch], Batch]:
    return lambda batch: replace(batch, x=map_arrays(change, batch.x))


def _on_targets(change: Callable[[Arrays], Array], source: Source, option: str) -> Callable[[Batch], Batch]:
    if not source.has_targets:
        raise UsageError(f"{option} cannot be used: {source.name} has no targets")
    return lambda batch: batch if batch.y is None else replace(batch, y=change(batch.y))
