"""Models of a few tensors in a plain file, for what only counts bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from prunectl.formats import extents
from prunectl.formats.base import ModelFile, ModelInfo, Role, Storage, Tensor
from prunectl.formats.extents import Extent
from tests.contract import Array


def tensor_of(path: Path, array: Array, name: str = "w", *, offset: int = 0, **facts: Any) -> Tensor:
    """A tensor that lies flat at an offset of a file."""
    storage = Storage(f"{name}@{offset}", array.nbytes, Extent(path, offset, array.nbytes), array.nbytes)
    return Tensor(name, name, array.shape, array.dtype, facts.pop("role", Role.KERNEL), storage, **facts)


def model_of(path: Path, *tensors: Tensor, **facts: Any) -> ModelFile:
    """A model that consists of one file."""
    return ModelFile(path, "made", tensors, ModelInfo(), (path,), **facts)


def in_memory(array: Array, **facts: Any) -> tuple[ModelFile, Tensor]:
    """A model with one tensor that has no place of its own, such as one that is compressed."""
    path = Path("nowhere")
    storage = Storage("w", array.nbytes, None, array.nbytes)
    tensor = Tensor("w", "w", array.shape, array.dtype, Role.KERNEL, storage, **facts)
    return ModelFile(path, "made", (tensor,), ModelInfo(), (path,), lambda _: array), tensor


@contextmanager
def flat(array: Array, **facts: Any) -> Iterator[tuple[ModelFile, Tensor]]:
    """Yield a model with one tensor that lies flat in a file, behind three bytes of something else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.bin"
        path.write_bytes(b"abc" + array.tobytes())
        tensor = tensor_of(path, array, offset=3, **facts)
        yield model_of(path, tensor), tensor


@contextmanager
def small_blocks(nbytes: int) -> Iterator[None]:
    """Let nothing be looked at in pieces of more than a few bytes."""
    with patch.object(extents, "BLOCK_BYTES", nbytes):
        yield


def thinned(shape: tuple[int, ...], seed: int = 0, keep: float = 0.5) -> Array:
    """Floats of which a share is zero, in runs, so that whole groups and channels are."""
    random = np.random.default_rng(seed)
    array = random.standard_normal(shape).astype(np.float32)
    array[random.random(shape) > keep] = 0
    for axis, length in enumerate(shape):
        np.moveaxis(array, axis, 0)[random.random(length) < 0.3] = 0
    return array
