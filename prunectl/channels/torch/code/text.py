"""Values as Python writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch

from prunectl.errors import WorkError


def literal(value: Any) -> str:
    """Return a value of plain Python, or a word of torch, as code."""
    if isinstance(value, str):
        return f'"{"".join(map(_letter, value))}"'
    if isinstance(value, bool | int) or value is None:
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, list | tuple):
        return sequence(map(literal, value))
    raise WorkError(f"the network holds a {type(value).__name__}, which cannot be written as code")


def _letter(letter: str) -> str:
    """Return a letter as it stands in a text in double quotes, also in one of three: no quote is ever bare.

    JSON writes what lies beyond the BMP as two halves, which are two other characters in Python.
    """
    if letter.isascii():
        return json.dumps(letter)[1:-1]
    return letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()


def sequence(parts: Iterable[str]) -> str:
    """Return a tuple of what is code already."""
    words = list(parts)
    return f"({words[0]},)" if len(words) == 1 else f"({', '.join(words)})"


def short(numbers: Any) -> Any:
    """Return one number for several that are equal, as layers take them."""
    if isinstance(numbers, list | tuple) and numbers and len(set(map(str, numbers))) == 1:
        return numbers[0]
    return numbers


def call(function: str, words: Iterable[str] = (), named: Iterable[tuple[str, str]] = ()) -> str:
    """Return a call."""
    return f"{function}({', '.join([*words, *(f'{name}={value}' for name, value in named)])})"


def numbers(tensor: torch.Tensor) -> str:
    """Return a small tensor as code."""
    return f"torch.tensor({_listed(tensor.tolist())}, dtype={tensor.dtype})"


def _listed(value: Any) -> str:
    return f"[{', '.join(map(_listed, value))}]" if isinstance(value, list) else literal(value)
