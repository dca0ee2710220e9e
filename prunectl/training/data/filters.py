"""What the options that every SPEC takes make of a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.data.grammar import Spec, axes
from prunectl.training.data.norm import normed
from prunectl.training.data.source import Arrays, Batch, Source, each, mapped
from prunectl.training.signature import Signature


def apply(source: Source, spec: Spec, signature: Signature | None) -> Source:
    """Return a source with the general options of its SPEC: classes first, then limit, then what changes numbers."""
    if spec.is_asked("relabel") and "classes" not in spec.options:
        raise UsageError("relabel numbers the classes that are chosen anew", hint="write classes=0,3,5&relabel=1")
    if "classes" in spec.options:
        source = _only_classes(source, spec)
    limit = spec.number("limit")
    if limit is not None:
        source = source.first(limit)
    if "shape" in spec.options:
        source = source.changed(_reshape(spec))
    if spec.is_asked("flatten"):
        source = source.changed(_on_inputs(lambda x: x.reshape(len(x), int(np.prod(x.shape[1:])))))
    if "norm" in spec.options:
        first = bool(signature and signature.is_channels_first)
        source = normed(source, spec.options["norm"], is_channels_first=first)
    depth = spec.number("onehot")
    return source if depth is None else source.changed(_on_targets(_one_hot(depth), source, "onehot"))


def _only_classes(source: Source, spec: Spec) -> Source:
    words = spec.words("classes")
    if not words or any(not word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise UsageError(f"classes={spec.options['classes']} is no list of classes", hint="write classes=0,3,5")
    chosen = np.array([int(word) for word in words])
    if not source.has_targets:
        raise UsageError(f"{source.name} has no targets, so that classes cannot be chosen")
    found = source.where(lambda y: np.isin(_labels(y, "classes"), chosen))
    if not spec.is_asked("relabel"):
        return found
    ranked = np.sort(chosen)
    return found.changed(_on_targets(lambda y: np.searchsorted(ranked, _labels(y, "relabel")), found, "relabel"))


def _labels(y: Arrays, option: str) -> Array:
    """Return one whole number for each example."""
    arrays = each(y)
    flat = arrays[0].reshape(len(arrays[0]), -1)
    if len(arrays) > 1 or flat.shape[1:] not in {(1,), (0,)}:
        raise InputError(
            f"{option} needs one label for each example, and the targets have the shape {arrays[0].shape[1:]}"
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
            raise InputError(f"onehot={depth} has no place for the label {wrong[0]}: labels are 0 to {depth - 1}")
        return np.eye(depth, dtype=np.float32)[labels]

    return encode


def _reshape(spec: Spec) -> Callable[[Batch], Batch]:
    text = spec.options["shape"]
    shapes = [axes("shape", part) for part in text.split("+")]

    def one(x: Array, shape: tuple[int, ...]) -> Array:
        if int(np.prod(x.shape[1:])) != int(np.prod(shape)):
            raise InputError(f"shape={text}: inputs of the shape {x.shape[1:]} cannot be read as {shape}")
        return x.reshape(len(x), *shape)

    def change(batch: Batch) -> Batch:
        arrays = each(batch.x)
        if len(arrays) != len(shapes):
            raise UsageError(f"shape={text} names {len(shapes)} shapes, and there are {len(arrays)} inputs")
        found = tuple(map(one, arrays, shapes))
        return replace(batch, x=found if isinstance(batch.x, tuple) else found[0])

    return change


def _on_inputs(change: Callable[[Array], Array]) -> Callable[[Batch], Batch]:
    return lambda batch: replace(batch, x=mapped(change, batch.x))


def _on_targets(change: Callable[[Arrays], Array], source: Source, option: str) -> Callable[[Batch], Batch]:
    if not source.has_targets:
        raise UsageError(f"{source.name} has no targets for {option}")
    return lambda batch: batch if batch.y is None else replace(batch, y=change(batch.y))
