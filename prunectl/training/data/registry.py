"""The registry of data kinds: how a SPEC is recognised and opened, and its general options."""

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
    """Whether a SPEC, without its options, is of this kind."""
    opener: str
    """`module:function` of this package that opens the data from a SPEC, the model's signature and the seed."""
    options: tuple[str, ...] = ()
    names: str = ""
    """`module:function` that returns the names of the arrays of a SPEC, before the model is loaded."""


TOKEN_IDS = SourceKind(lambda where: where.endswith(".npy"), "text:open_text", TEXT_OPTIONS)
"""A single array without targets, for a model that takes token ids."""
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
        # Includes sharded files, such as train.tfrecord-00000-of-00008.
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
    """Open the data that a SPEC names, changed only by the options of the SPEC."""
    parsed = data_spec.parse(spec)
    is_text = signature is not None and signature.text is not None and parsed.path.is_file()
    for kind in (TOKEN_IDS, *KINDS) if is_text else KINDS:
        if kind.fits(parsed.where):
            data_spec.check_options(parsed, kind.options)
            source: Source = _import_function(kind.opener)(parsed, signature, seed)
            if signature is not None and signature.text is not None and signature.text.shifts_labels:
                source = _import_function("next_token:shift_labels")(source)
            return apply_options(source, parsed, signature)
    raise _unknown_format(parsed)


def array_names(spec: str) -> tuple[str, ...]:
    """The names of the arrays that a SPEC names, if they have any; a model may choose its inputs by them."""
    parsed = data_spec.parse(spec)
    kind = next((kind for kind in KINDS if kind.fits(parsed.where)), None)
    names: Iterable[str] = _import_function(kind.names)(parsed) if kind is not None and kind.names else ()
    return tuple(names)


def _import_function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"prunectl.training.data.{module}"), name)


def check_exists(*specs: str) -> None:
    """Refuse missing data before a framework is loaded."""
    for where in (data_spec.parse(spec).where for spec in specs if spec):
        if where.startswith(RANDOM_PREFIX) or FUNCTION.fullmatch(where) or glob.has_magic(where):
            continue
        arrays = NPZ_ARRAYS.fullmatch(where)
        # Every other part is a separator.
        names = NPY_SEPARATOR.split(where)[::2] if where.endswith(".npy") else [arrays["path"] if arrays else where]
        for name in names:
            data_spec.require_path(Path(name))


def _unknown_format(spec: DataSpec) -> UsageError:
    data_spec.require_path(spec.path)
    return UsageError(f"--data {spec.text} is not in a format that prunectl reads", hint=data_spec.GRAMMAR)


_FILE_REFERENCE = re.compile(r"(?P<path>[^:]+\.py):[A-Za-z_]\w*(?::(?:max|min))?")


def files_of_spec(text: str) -> tuple[Path, ...]:
    """The files that a data SPEC names."""
    spec = data_spec.parse(text)
    schema = [Path(spec.options["schema"])] if "schema" in spec.options else []
    if code := _FILE_REFERENCE.fullmatch(spec.where):
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
    """A folder of images and the folders of its classes, including links: the ones in which images are looked for."""
    classes = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return (root, *classes)


def files_of_references(values: Iterable[Any]) -> Iterator[Path]:
    """Yield the files of all references `./file.py:name` among some option values."""
    for value in values:
        for reference in value if isinstance(value, list | tuple) else (value,):
            named = _FILE_REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
            if named is not None and Path(named["path"]).is_file():
                yield Path(named["path"])


_BYTE_MAX = 255
_IMAGENET = "0.485,0.456,0.406:0.229,0.224,0.225"
_HINT = "write norm=unit (x / 255), norm=imagenet, norm=none, norm=/16 (x / 16), or norm=MEAN:STD of x / 255"


@dataclass(frozen=True, slots=True)
class Normalization:
    """(x / scale - mean) / deviation, with a default scale of 255; mean and deviation of all channels or of each."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    scale: float = _BYTE_MAX

    def apply(self, x: Array, channel_axis: int) -> Array:
        """The normalised array, as float32."""
        along = [1] * x.ndim
        along[channel_axis] = -1
        mean = np.array(self.mean, np.float32)
        deviation = np.array(self.deviation, np.float32)
        if mean.size > 1:
            mean, deviation = mean.reshape(along), deviation.reshape(along)
        normalized: Array = (x.astype(np.float32) / np.float32(self.scale) - mean) / deviation
        return normalized


def normalize(source: Source, text: str, *, is_channels_first: bool) -> Source:
    """Normalise the inputs of a source by the option `norm`."""
    if text == "none":
        return source.map_batches(lambda batch: Batch(_to_float(batch.x), batch.y))
    norm = _parse_norm(text)
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

    return source.map_batches(change)


def _to_float(arrays: Arrays) -> Arrays:
    return map_arrays(lambda x: x.astype(np.float32) if x.dtype == np.uint8 else x, arrays)


def _parse_norm(text: str) -> Normalization:
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
    """The axis whose length is the number of means; if both ends fit, the model's layout decides."""
    axes = [axis for axis in (1, x.ndim - 1) if axis and x.shape[axis] == len(norm.mean)]
    if len(norm.mean) == 1:
        return x.ndim - 1
    if not axes or x.ndim < 3:
        raise UsageError(f"norm has {len(norm.mean)} channels, which an input of the shape {x.shape[1:]} does not have")
    return axes[0 if is_channels_first else -1]


def apply_options(source: Source, spec: DataSpec, signature: ModelSignature | None) -> Source:
    """Apply the general options of a SPEC: first classes, then limit, then those that change values."""
    if spec.flag("relabel") and "classes" not in spec.options:
        raise UsageError("relabel needs classes, which it renumbers from 0", hint="write classes=0,3,5&relabel=1")
    if "classes" in spec.options:
        source = _filter_classes(source, spec)
    limit = spec.int_option("limit")
    if limit is not None:
        source = source.first(limit)
    if "shape" in spec.options:
        source = source.map_batches(_reshape(spec))
    if spec.flag("flatten"):
        source = source.map_batches(_on_inputs(lambda x: x.reshape(len(x), int(np.prod(x.shape[1:])))))
    if "norm" in spec.options:
        first = bool(signature and signature.is_channels_first)
        source = normalize(source, spec.options["norm"], is_channels_first=first)
    depth = spec.int_option("onehot")
    return source if depth is None else source.map_batches(_on_targets(_one_hot(depth), source, "onehot"))


def _filter_classes(source: Source, spec: DataSpec) -> Source:
    labels = spec.list_option("classes")
    if not labels or any(not label.isdecimal() for label in labels) or len(set(labels)) < len(labels):
        raise UsageError(f"classes={spec.options['classes']} is not a list of classes", hint="write classes=0,3,5")
    chosen = np.array([int(label) for label in labels])
    if not source.has_targets:
        raise UsageError(f"classes= cannot be used: {source.name} has no targets")
    kept = source.where(lambda y: np.isin(_labels(y, "classes"), chosen))
    if not spec.flag("relabel"):
        return kept
    ranked = np.sort(chosen)
    return kept.map_batches(_on_targets(lambda y: np.searchsorted(ranked, _labels(y, "relabel")), kept, "relabel"))


def _labels(y: Arrays, option: str) -> Array:
    """Targets as one integer for each example."""
    arrays = as_tuple(y)
    # Not -1, which NumPy cannot infer if there are no examples.
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

    def reshape(x: Array, shape: tuple[int, ...]) -> Array:
        if int(np.prod(x.shape[1:])) != int(np.prod(shape)):
            raise InputError(f"shape={text}: inputs of the shape {x.shape[1:]} cannot be reshaped to {shape}")
        return x.reshape(len(x), *shape)

    def change(batch: Batch) -> Batch:
        arrays = as_tuple(batch.x)
        if len(arrays) != len(shapes):
            raise UsageError(f"shape={text} has {len(shapes)} shapes, but there are {len(arrays)} inputs")
        reshaped = tuple(map(reshape, arrays, shapes))
        return replace(batch, x=reshaped if isinstance(batch.x, tuple) else reshaped[0])

    return change


def _on_inputs(change: Callable[[Array], Array]) -> Callable[[Batch], Batch]:
    return lambda batch: replace(batch, x=map_arrays(change, batch.x))


def _on_targets(change: Callable[[Arrays], Array], source: Source, option: str) -> Callable[[Batch], Batch]:
    if not source.has_targets:
        raise UsageError(f"{option} cannot be used: {source.name} has no targets")
    return lambda batch: batch if batch.y is None else replace(batch, y=change(batch.y))
