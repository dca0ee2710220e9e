"""A file of safetensors with smaller tensors in it: what it says of itself stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from prunectl.channels.source import sliced
from prunectl.channels.torch.checkpoint import Change
from prunectl.formats.base import ModelFile
from prunectl.training.torch.arrays import to_numpy

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_LENGTH_BYTES = 8


def write(model: ModelFile, change: Change, extras: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a copy without what goes, and with what is new."""
    with model.path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little")))
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
        kind = _TYPES[extras[name].dtype] if name in extras else header[name]["dtype"]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    path.write_bytes(b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *parts]))
