"""Tables: which of their columns go in, which come out, and what a column of words means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.data.arrays import from_arrays
from prunectl.training.data.grammar import Spec
from prunectl.training.data.pieces import joined
from prunectl.training.data.source import Batch, Source, each
from prunectl.training.data.stream import Stream

OPTIONS = ("target", "columns")
HELD_BYTES = 64 << 20
"""A table that takes no more than this is held in memory: its rows then come in any order."""
MAX_CLASSES = 100_000
_LISTED = 5
Words = Mapping[str, Array]
"""For each target of words, all different ones in their order."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table that are read."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]


def chosen(spec: Spec, names: Sequence[str]) -> Columns:
    """Return which columns of a table the options name: all but the targets go in, unless they say otherwise."""
    targets = spec.words("target")
    inputs = spec.words("columns") or tuple(name for name in names if name not in targets)
    for name in (*targets, *inputs):
        if name not in names:
            raise UsageError(
                f"{spec.where} has no column {name!r}",
                did_you_mean=tuple(get_close_matches(name, names)),
                hint=f"it has {_some(names)}",
            )
        if list(names).count(name) > 1:
            raise InputError(f"{spec.where} has two columns called {name!r}")
    if not inputs:
        raise UsageError(f"{spec.where} has no column besides its target")
    if both := set(inputs) & set(targets):
        raise UsageError(f"{min(both)!r} would be an input and a target at once")
    return Columns(inputs, targets)


def as_source(spec: Spec, read: Callable[[], Iterator[Batch]], words: Words, count: int, nbytes: int) -> Source:
    """Return a table of ``count`` rows as a source: held if ``nbytes`` is little, else read anew each time."""
    notes = tuple(
        f"{spec.where}: {name} has {len(known)} classes, in the order of their names: {_numbered(known)}"
        for name, known in words.items()
    )
    has_targets = bool(spec.words("target"))
    stream = Stream(spec.text, count, has_targets, read, notes=notes)
    if nbytes > HELD_BYTES or not count:
        return stream
    whole = joined(list(stream.read()))
    y = {} if whole.y is None else {"the targets": each(whole.y)[0]}
    return from_arrays(spec.text, {"the columns": each(whole.x)[0]}, y, *notes)


def known_words(where: str, name: str, values: set[str]) -> Array:
    """Return the classes that a column of words names."""
    if len(values) > MAX_CLASSES:
        raise InputError(f"{where}: {name} has more than {MAX_CLASSES:,} different words, which are no classes")
    return np.array(sorted(values))


def is_number(word: str) -> bool:
    """Whether a word is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def target(columns: Sequence[Array]) -> Array:
    """Return the columns of targets as one array: whole numbers stay whole."""
    if len(columns) == 1:
        return columns[0]
    return np.stack([column.astype(np.float32) for column in columns], axis=1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _numbered(known: Array) -> str:
    said = ", ".join(f"{number} {word}" for number, word in enumerate(known[:_LISTED]))
    return said + (", ..." if len(known) > _LISTED else "")
