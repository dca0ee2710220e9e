"""Which files a command reads, as far as its words say so."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunectl.formats.table import open_model
from prunectl.pruning import manifest
from prunectl.training.data import grammar

MODELS = ("distill",)
"""Options that name a model, beside MODEL itself."""
SPECS = ("data", "val")
FILES = ("recipe",)
WRITTEN = ("manifest", "card")
"""Options that name a file which is written beside the output."""
_IN_A_FILE = re.compile(r"(?P<path>[^:]+\.py):[A-Za-z_]\w*")
_ARRAYS = re.compile(r"(?P<path>.+\.npz)\[.*\]")
_BETWEEN = re.compile(r"(?<=\.npy)[,+]")


def files_of(said: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the files that what was typed names, the model's own first; functions' own modules are not among them."""
    named = dict(said)
    if said.get("recipe") is not None:
        # What a recipe asks for may lie in files of its own.
        named |= {name: value for name, value in asdict(manifest.read(Path(said["recipe"]))).items() if name != "model"}
        named["build"] = manifest.read(Path(said["recipe"])).model
    found = [
        *open_model(Path(named["model"])).files,
        *(file for name in MODELS if named.get(name) for file in open_model(Path(named[name])).files),
        *(file for name in SPECS if named.get(name) for file in of_spec(named[name])),
        *(Path(named[name]) for name in FILES if named.get(name) is not None),
        *_code(value for name, value in named.items() if name not in {"model", "output", *SPECS}),
    ]
    return tuple(dict.fromkeys(found))


def folders_of(said: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the folders whose members are examples: one that is added or gone changes them."""
    roots = [Path(grammar.parse(said[name]).where) for name in SPECS if said.get(name)]
    return tuple(Path(folder) for root in roots if root.is_dir() for folder, _, _ in os.walk(root))


def of_spec(text: str) -> tuple[Path, ...]:
    """Return the files that a data SPEC means."""
    spec = grammar.parse(text)
    schema = [Path(spec.options["schema"])] if "schema" in spec.options else []
    if code := _IN_A_FILE.fullmatch(spec.where):
        return (Path(code["path"]),)
    if arrays := _ARRAYS.fullmatch(spec.where):
        return (Path(arrays["path"]),)
    if os.path.isdir(spec.where):
        return tuple(sorted(path for path in Path(spec.where).rglob("*") if path.is_file()))
    names = _BETWEEN.split(spec.where) if spec.where.endswith(".npy") else sorted(glob.glob(spec.where))
    found = [Path(name) for name in names or [spec.where]]
    return tuple(path for path in (*found, *schema) if path.is_file())


def is_code(text: str) -> bool:
    """Whether a data SPEC is a function, which may read whatever it likes."""
    where = grammar.parse(text).where
    return not os.path.lexists(where) and ":" in where and not where.startswith("random:")


def _code(values: Iterable[Any]) -> Iterator[Path]:
    for value in values:
        for word in value if isinstance(value, list | tuple) else (value,):
            named = _IN_A_FILE.fullmatch(word) if isinstance(word, str) else None
            if named is not None and Path(named["path"]).is_file():
                yield Path(named["path"])
