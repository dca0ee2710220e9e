"""A safetensors file with masks, named as torch.nn.utils.prune names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.extents import blocks
from prunectl.formats.safetensors_header import CODES, begun, framed
from prunectl.training.wrap.masks import MASK, ORIGINAL, masked
from prunectl.training.wrap.wrapping import Wrapping


@dataclass(frozen=True, slots=True)
class _Written:
    name: str
    tensor: Tensor
    """Says the type and the shape."""
    blocks: Callable[[], Iterator[Array]]


def wrap(model: ModelFile, wrapping: Wrapping, target: Path) -> tuple[str, ...]:
    """Write the copy; every weight gets its mask."""
    masks = masked(model, wrapping.masks)
    written: list[_Written] = []
    for tensor in model.tensors:
        name, mask = tensor.name, masks.get(tensor.name)
        written.append(_Written(name if mask is None else name + ORIGINAL, tensor, _as_it_was(tensor)))
        if mask is not None:
            written.append(_Written(name + MASK, tensor, _given(mask)))
    # Wide numbers first, as the format's own library has it: each then begins at a multiple of its width.
    written.sort(key=lambda one: -one.tensor.dtype.itemsize)
    with target.open("xb") as out:
        out.write(_header(model, written))
        for one in written:
            for block in one.blocks():
                out.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return ()


def _as_it_was(tensor: Tensor) -> Callable[[], Iterator[Array]]:
    extent = tensor.storage.extent
    return lambda: blocks(extent, tensor.dtype) if extent is not None else iter(())


def _given(mask: Array) -> Callable[[], Iterator[Array]]:
    return lambda: iter([mask])


def _header(model: ModelFile, written: list[_Written]) -> bytes:
    header = begun(model.path)
    at = 0
    for one in written:
        end = at + one.tensor.nbytes
        header[one.name] = {
            "dtype": CODES[one.tensor.dtype],
            "shape": list(one.tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    return framed(header)
