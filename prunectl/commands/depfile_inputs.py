"""Which files a command reads, as far as its words say so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunectl.formats.table import open_model
from prunectl.pruning import manifest
from prunectl.training.data import files, grammar

MODELS = ("distill",)
"""Options that name a model, beside MODEL itself."""
SPECS = ("data", "val")
FILES = ("recipe",)
WRITTEN = ("manifest", "card")
"""Options that name a file which is written beside the output."""
of_spec = files.of_spec


def meant(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was typed together with what a recipe says: what that asks for may lie in files of its own."""
    if said.get("recipe") is None:
        return dict(said)
    asked = asdict(manifest.read(Path(said["recipe"]), is_trusted=said["trust"]))
    # What a recipe calls model builds one; MODEL is the file.
    return {**said, **{name: value for name, value in asked.items() if name != "model"}, "build": asked["model"]}


def files_of(words: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the files that words name, the model's own first; functions' own modules are not among them."""
    found = [
        *open_model(Path(words["model"])).files,
        *(file for name in MODELS if words.get(name) for file in open_model(Path(words[name])).files),
        *(file for name in SPECS if words.get(name) for file in of_spec(words[name])),
        *(Path(words[name]) for name in FILES if words.get(name) is not None),
        *files.of_functions(value for name, value in words.items() if name not in {"model", "output", *SPECS}),
    ]
    return tuple(dict.fromkeys(found))


def folders_of(words: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the folders whose members are examples: one that is added or gone changes them."""
    roots = [Path(grammar.parse(words[name]).where) for name in SPECS if words.get(name)]
    return tuple(folder for root in roots if root.is_dir() for folder in files.folders(root))


def is_code(text: str) -> bool:
    """Whether a data SPEC is a function, which may read whatever it likes."""
    where = grammar.parse(text).where
    return not os.path.lexists(where) and ":" in where and not where.startswith("random:")
