"""The numbers of a model that count, once each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.job import Job
from prunectl.exporting.request import Request
from prunectl.formats.base import WEIGHTS, Array, ModelFile, Tensor

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38}


def chosen(model: ModelFile) -> tuple[Tensor, ...]:
    """Return the tensors that a trained model needs, without those that the file holds a second time."""
    found = tuple(tensor for tensor in model.tensors if tensor.role in WEIGHTS and tensor.name not in model.copies)
    if not found:
        raise InputError(f"{model.path} holds no weights")
    return found


def arrays(job: Job) -> Iterator[tuple[Tensor, Array]]:
    """Yield tensors with the numbers that are written for them."""
    for tensor in chosen(job.file):
        yield tensor, written(job, tensor)


def written(job: Job, tensor: Tensor) -> Array:
    """Return the numbers of a tensor as they are written."""
    return narrowed(job.request, tensor.name, job.file.read(tensor))


def dtype_of(job: Job, tensor: Tensor) -> np.dtype[Any]:
    """Return the type in which a tensor is written."""
    return _narrow(job.request, tensor.dtype)


def narrowed(request: Request, name: str, array: Array) -> Array:
    """Return numbers as they are written: with --half or --bf16, wider floats become those of 16 bits."""
    dtype = _narrow(request, array.dtype)
    if dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    if not np.isfinite(found.astype(np.float32)).all() and np.isfinite(array).all():
        largest = _LARGEST[dtype.name]
        raise WorkError(f"{name} holds numbers beyond {largest:.5g}, which {dtype.name} does not hold")
    return found


def _narrow(request: Request, dtype: np.dtype[Any]) -> np.dtype[Any]:
    is_wide = dtype.kind == "f" and dtype.itemsize > 2
    if is_wide and request.is_half:
        return np.dtype(np.float16)
    return np.dtype(ml_dtypes.bfloat16) if is_wide and request.is_bf16 else dtype


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays hold the same numbers to the bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def check_types(job: Job, allowed: frozenset[str], title: str) -> None:
    """Refuse numbers that a format has no type for."""
    for tensor in chosen(job.file):
        name = dtype_of(job, tensor).name
        if name not in allowed:
            raise UsageError(f"{tensor.name} is {name}, and {title} has no such type")
