"""What the Python file is called that comes with weights."""

from __future__ import annotations

import keyword
import sys
from pathlib import Path

_TAKEN = frozenset({"torch", "safetensors", "numpy", *sys.stdlib_module_names, *keyword.kwlist})
"""A file so called would hide a module that others import, or could not be imported itself."""


def code_beside(target: Path) -> Path:
    """Return where the class goes whose weights go to a target: `my-net.v2.pt` has `my_net_v2.py`."""
    stem = target.stem.removesuffix(".pth")
    name = "".join(letter if letter.isalnum() else "_" for letter in stem.strip("."))
    if name in _TAKEN or not name[:1].isidentifier():
        name = f"net_{name}"
    return target.with_name(f"{name}.py")
