"""The tar of the earliest PyTorch: storages, tensors and a pickle that names them."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import About, ModelFile, Storage
from prunectl.formats.extents import Extent, check_inside
from prunectl.formats.torch import model, tar_entries
from prunectl.formats.torch import views as torch_views
from prunectl.formats.torch.model import Source
from prunectl.formats.torch.program import follow
from prunectl.formats.torch.values import Global, Made, Persistent, shown
from prunectl.formats.torch.views import Stored

MAX_ENTRIES = 10_000
MAX_FACT_BYTES = 512
"""How long the pickle before a storage or a tensor may be."""
COUNT_BYTES = 8
_REBUILD = Global("torch._utils", "_rebuild_tensor")
_Place = tuple[Stored, Storage]


def open_model(path: Path) -> ModelFile:
    """Open a tar that torch.save wrote."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        entries = tar_entries.locate(path, data)
        for name in ("pickle", "storages"):
            if name not in entries:
                raise InputError(f"{path} is damaged: the tar has no entry {name}")
        places, ids = _storages(path, data, entries["storages"])
        named = _tensors(path, data, entries["tensors"], ids) if "tensors" in entries else {}
        begin, end = entries["pickle"]
        program = follow(data, path, "its entry pickle", start=begin, end=end)

    def find(stored: Stored) -> Storage:
        known, storage = places.get(stored.key, (None, None))
        if known is None or storage is None or known.nbytes != stored.nbytes:
            raise InputError(f"{path} is damaged: it does not hold the whole storage {shown(stored.key)}")
        return storage

    about = About(producer="pytorch (format before 0.2)")
    return model.build(path, "torch-tar", [Source(program, find, named)], about)


def _count(path: Path, value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_ENTRIES:
        raise InputError(f"{path} is damaged: it does not say how many {what} it holds")
    return value


def _storages(
    path: Path, data: mmap.mmap, entry: tuple[int, int]
) -> tuple[dict[str, _Place], dict[str, tuple[Any, ...]]]:
    """Return the storages by their keys, and the ids that a later pickle would give them."""
    at, end = entry
    head = follow(data, path, "its number of storages", start=at, end=end)
    at = head.end
    places: dict[str, _Place] = {}
    ids: dict[str, tuple[Any, ...]] = {}
    for _ in range(_count(path, head.value, "storages")):
        facts = follow(data, path, "what it says of a storage", start=at, end=min(end, at + MAX_FACT_BYTES))
        key, location, kind = facts.value if isinstance(facts.value, tuple) and len(facts.value) == 3 else (None,) * 3
        at = facts.end
        check_inside(path, at, COUNT_BYTES, end, "the length of a storage")
        count = int.from_bytes(data[at : at + COUNT_BYTES], "little")
        at += COUNT_BYTES
        whole = ("storage", kind, key, location, count)
        stored = torch_views.stored(path, whole)
        check_inside(path, at, stored.nbytes, end, f"storage {shown(stored.key)}")
        places[stored.key] = stored, Storage(stored.key, stored.nbytes, Extent(path, at, stored.nbytes), stored.nbytes)
        ids[stored.key] = whole
        at += stored.nbytes
    if at < end:
        views = follow(data, path, "its list of shared storages", start=at, end=end).value
        for target, root, offset, count in _fours(path, views):
            if str(root) not in ids:
                raise InputError(f"{path} is damaged: it shares a storage that it does not hold")
            ids[str(target)] = (*ids[str(root)][:5], (target, offset, count))
    return places, ids


def _fours(path: Path, views: Any) -> list[tuple[Any, ...]]:
    if not isinstance(views, list) or not all(isinstance(view, tuple) and len(view) == 4 for view in views):
        raise InputError(f"{path} is damaged: it does not say which storages are shared")
    if not all(isinstance(name, str | int) for view in views for name in view):
        raise InputError(f"{path} is damaged: it does not say which storages are shared")
    return views


def _tensors(path: Path, data: mmap.mmap, entry: tuple[int, int], ids: dict[str, tuple[Any, ...]]) -> dict[str, Made]:
    """Return the tensors by their keys, as the calls that newer files have in their place."""
    at, end = entry
    head = follow(data, path, "its number of tensors", start=at, end=end)
    at = head.end
    found: dict[str, Made] = {}
    for _ in range(_count(path, head.value, "tensors")):
        facts = follow(data, path, "what it says of a tensor", start=at, end=min(end, at + MAX_FACT_BYTES))
        at = facts.end
        key, storage, _ = facts.value if isinstance(facts.value, tuple) and len(facts.value) == 3 else (None,) * 3
        if not isinstance(key, str | int) or not isinstance(storage, str | int) or str(storage) not in ids:
            raise InputError(f"{path} is damaged: it does not say which storage a tensor uses")
        check_inside(path, at, COUNT_BYTES, end, "the shape of a tensor")
        (rank,) = struct.unpack_from("<i", data, at)
        at += COUNT_BYTES
        if not 0 <= rank <= torch_views.MAX_RANK:
            raise InputError(f"{path} is damaged: a tensor has {rank} dimensions")
        nbytes = COUNT_BYTES * (2 * rank + 1)
        check_inside(path, at, nbytes, end, "the shape of a tensor")
        numbers = struct.unpack_from(f"<{2 * rank + 1}q", data, at)
        at += nbytes
        found[str(key)] = Made(
            _REBUILD, (Persistent(ids[str(storage)]), numbers[-1], numbers[:rank], numbers[rank : 2 * rank])
        )
    return found
