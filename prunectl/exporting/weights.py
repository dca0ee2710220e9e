"""The numbers of a model that count, once each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.job import Job
from prunectl.formats.base import WEIGHTS, Array, ModelFile, Tensor


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
    """Return the numbers of a tensor as they are written: with --half, wider floats become 16-bit ones."""
    array = job.file.read(tensor)
    if not (job.request.is_half and tensor.is_float and tensor.dtype.itemsize > 2):
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.isinf(half).any() and not np.isinf(array).any():
        raise WorkError(f"{tensor.name} holds numbers beyond 65504, which 16 bits do not hold")
    return half


def dtype_of(job: Job, tensor: Tensor) -> np.dtype[np.generic]:
    """Return the type in which a tensor is written."""
    is_halved = job.request.is_half and tensor.is_float and tensor.dtype.itemsize > 2
    return np.dtype(np.float16) if is_halved else tensor.dtype


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
