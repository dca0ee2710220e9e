"""A file of safetensors with smaller tensors in it: what it says of itself stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from prunectl.channels.source import sliced
from prunectl.channels.torch.checkpoint import Change
from prunectl.formats.base import ModelFile
from prunectl.formats.safetensors_header import CODES, framed, read
from prunectl.training.torch.arrays import to_numpy


def write(model: ModelFile, change: Change, extras: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a copy without what goes, and with what is new."""
    header = read(model.path)
    held = {tensor.name: tensor for tensor in model.tensors}
    parts: list[bytes] = []
    end = 0
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    for name in (*names, *extras):
        if name in extras:
            array = to_numpy(extras[name])
        else:
            whole = model.read(held[name])
            array = sliced(change.numbers.get(name, whole).astype(whole.dtype), change.axes.get(name, {}))
        data = np.ascontiguousarray(array).tobytes()
        kind = CODES[array.dtype] if name in extras else header[name]["dtype"]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)
    path.write_bytes(b"".join([framed(header), *parts]))
