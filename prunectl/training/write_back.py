"""Trained numbers, into a copy of the file they came from: all else in it stays as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from prunectl.errors import WorkError
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.table import by_name, load
from prunectl.formats.writing import Rewrite, in_storage_order, is_writable
from prunectl.measuring.blocks import pieces


def write_back(model: ModelFile, values: Mapping[str, Array], places: dict[Path, Path]) -> int:
    """Write a copy with new numbers in it, and return how many tensors have some."""
    given = {**values, **{name: values[of] for name, of in model.copies.items() if of in values}}
    rewrites: dict[tuple[str, int], Rewrite] = {}
    for tensor in model.tensors:
        if tensor.name not in given or _is_same(model, tensor, given[tensor.name]):
            continue
        _check(model, tensor, given[tensor.name])
        # Tied tensors share their bytes, which are written once.
        rewrites[tensor.storage.key, tensor.start] = Rewrite(tensor, partial(_blocks, tensor, given[tensor.name]))
    load(by_name(model.format).writer)(model, places, tuple(rewrites.values()))
    return len(rewrites)


def _is_same(model: ModelFile, tensor: Tensor, value: Array) -> bool:
    return value.shape == tensor.shape and value.astype(tensor.dtype).tobytes() == model.read(tensor).tobytes()


def _check(model: ModelFile, tensor: Tensor, value: Array) -> None:
    if value.shape != tensor.shape:
        raise WorkError(f"{tensor.name} came out of training as {value.shape}, {model.path} has {tensor.shape}")
    if not by_name(model.format).is_reencoded and not is_writable(tensor):
        raise WorkError(f"{tensor.name} of {model.path} does not lie in one run of bytes, and cannot be replaced")


def _blocks(tensor: Tensor, value: Array) -> Iterator[Array]:
    yield from pieces(in_storage_order(tensor, np.asarray(value).astype(tensor.dtype, copy=False)))
