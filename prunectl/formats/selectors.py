"""Which names does a selector mean? Globs, `re:` for regular expressions, and the nearest names for a slip."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile, Tensor

Matcher = Callable[[str], bool]
_NEAREST = 3


def select_names(model: ModelFile, selector: str) -> tuple[Tensor, ...]:
    """The tensors whose name or layer a selector matches; matching none is a slip."""
    matches = _matcher(selector)
    tensors = tuple(tensor for tensor in model.tensors if matches(tensor.name) or matches(tensor.layer))
    if not tensors:
        raise UsageError(
            f"no layer matches {selector!r} in {model.path}",
            did_you_mean=close_matches(selector, [tensor.layer or tensor.name for tensor in model.tensors]),
            hint=f"list them: prunectl inspect {model.path}",
        )
    return tensors


def close_matches(word: str, known: Sequence[str]) -> tuple[str, ...]:
    """The known words that look most like a misspelt one."""
    bare = word.removeprefix("re:").strip("*?.$^")
    return tuple(get_close_matches(bare, dict.fromkeys(known), n=_NEAREST, cutoff=0.5))


def _matcher(selector: str) -> Matcher:
    if not selector.startswith("re:"):
        return lambda name: fnmatchcase(name, selector)
    try:
        pattern = re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise UsageError(f"{selector!r} is not a regular expression: {error}") from error
    return lambda name: pattern.search(name) is not None
