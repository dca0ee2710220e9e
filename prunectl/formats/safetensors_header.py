"""What a safetensors file begins with, as it is written again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.formats.json_text import parse_object
from prunectl.formats.safetensors import DTYPES, LENGTH_BYTES

CODES: Mapping[np.dtype[Any], str] = {dtype: code for code, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_ROUND_BYTES = 8


def read(path: Path) -> dict[str, Any]:
    """Return the header of a file that was opened before."""
    with path.open("rb") as file:
        return parse_object(file.read(int.from_bytes(file.read(LENGTH_BYTES), "little")), path, "its header")


def begun(path: Path) -> dict[str, Any]:
    """Return a header without tensors, which says of itself what another file does."""
    old = read(path)
    return {_METADATA: old[_METADATA]} if _METADATA in old else {}


def framed(header: Mapping[str, Any]) -> bytes:
    """Return a header as it stands in a file, its length before it."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ROUND_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
