"""Which models lie in a folder and below it?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from prunectl.errors import PrunectlError, attempt
from prunectl.formats.table import FORMATS, recognise

_SUFFIXES = frozenset(suffix for row in FORMATS for suffix in row.suffixes if suffix)
_SAVED_MODEL = "saved_model.pb"
_INDEX = ".index.json"
_SHARDED = (".safetensors", ".bin")
_NOT_OURS = frozenset({"node_modules", "__pycache__", "site-packages"})


def models(folder: Path) -> Iterator[Path]:
    """Yield files and folders that look like models, in the order of their names; hidden folders are left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if _is_open(Path(place, name)))
        if _SAVED_MODEL in files:
            # What lies in it is part of it.
            folders.clear()
            yield Path(place)
            continue
        is_sharded = any(name.endswith(_INDEX) for name in files)
        for name in sorted(files):
            path = Path(place, name)
            is_shard = is_sharded and path.suffix in _SHARDED
            if not name.startswith(".") and not is_shard and _is_model(path):
                yield path


def _is_open(folder: Path) -> bool:
    return not folder.name.startswith(".") and folder.name not in _NOT_OURS and not (folder / "pyvenv.cfg").exists()


def _is_model(path: Path) -> bool:
    if path.suffix.lower() not in _SUFFIXES or (path.suffix == ".json" and not path.name.endswith(_INDEX)):
        return False
    return path.is_file() and not isinstance(attempt(recognise, path), PrunectlError)
