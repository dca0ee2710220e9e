"""Which files do words name: those that a data SPEC means, and those of functions."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prunectl.training.data import grammar
from prunectl.training.data.images import SUFFIXES

_IN_A_FILE = re.compile(r"(?P<path>[^:]+\.py):[A-Za-z_]\w*(?::(?:max|min))?")
_ARRAYS = re.compile(r"(?P<path>.+\.npz)\[.*\]")
_BETWEEN = re.compile(r"(?<=\.npy)[,+]")


def of_spec(text: str) -> tuple[Path, ...]:
    """Return the files that a data SPEC means."""
    spec = grammar.parse(text)
    schema = [Path(spec.options["schema"])] if "schema" in spec.options else []
    if code := _IN_A_FILE.fullmatch(spec.where):
        return (Path(code["path"]),)
    if arrays := _ARRAYS.fullmatch(spec.where):
        return (Path(arrays["path"]),)
    if os.path.isdir(spec.where):
        return tuple(picture for folder in folders(spec.path) for picture in _pictures(folder))
    names = _BETWEEN.split(spec.where) if spec.where.endswith(".npy") else sorted(glob.glob(spec.where))
    found = [Path(name) for name in names or [spec.where]]
    return tuple(path for path in (*found, *schema) if path.is_file())


def folders(root: Path) -> tuple[Path, ...]:
    """Return a folder of pictures with those of its classes, links too: as far down as pictures are looked for."""
    classes = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return (root, *classes)


def _pictures(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def of_functions(values: Iterable[Any]) -> Iterator[Path]:
    """Yield the files of the functions that words name as `./file.py:name`."""
    for value in values:
        for word in value if isinstance(value, list | tuple) else (value,):
            named = _IN_A_FILE.fullmatch(word) if isinstance(word, str) else None
            if named is not None and Path(named["path"]).is_file():
                yield Path(named["path"])
