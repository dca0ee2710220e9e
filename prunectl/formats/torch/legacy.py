"""The file of PyTorch 0.2 to 1.5: five pickles, then the storages one after another."""

from __future__ import annotations

import mmap
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import About, ModelFile, Storage
from prunectl.formats.extents import Extent, check_inside
from prunectl.formats.torch import model, views
from prunectl.formats.torch.model import Source
from prunectl.formats.torch.program import follow
from prunectl.formats.torch.values import shown
from prunectl.formats.torch.views import Stored

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
COUNT_BYTES = 8
MAX_FACT_BYTES = 4096
"""Where the pickles before the object end at the latest."""
MAX_KEY_BYTES = 64


def open_model(path: Path) -> ModelFile:
    """Open a file that torch.save wrote before it used zips."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic = follow(data, path, "its magic number", end=min(len(data), MAX_FACT_BYTES))
        protocol = follow(data, path, "its protocol number", start=magic.end, end=min(len(data), MAX_FACT_BYTES))
        if magic.value != MAGIC or protocol.value != PROTOCOL:
            raise InputError(f"{path} is damaged: it is not of the protocol that PyTorch wrote")
        system = follow(
            data, path, "what it says of its machine", start=protocol.end, end=min(len(data), MAX_FACT_BYTES)
        )
        program = follow(data, path, "its object", start=system.end)
        wanted = {found.key: found for found in (views.stored(path, key) for key in program.storages)}
        limit = min(len(data), program.end + MAX_FACT_BYTES + MAX_KEY_BYTES * len(wanted))
        keys = follow(data, path, "its list of storages", start=program.end, end=limit)
        places = _locate(path, data, keys.value, wanted, keys.end)

    def find(stored: Stored) -> Storage:
        place = places.get(stored.key)
        if place is None or place.nbytes != stored.nbytes:
            raise InputError(f"{path} is damaged: it does not hold the whole storage {shown(stored.key)}")
        return place

    about = About(producer="pytorch (format before 1.6)")
    return model.build(path, "torch-legacy", [Source(program, find)], about)


def _locate(path: Path, data: mmap.mmap, keys: object, wanted: dict[str, Stored], at: int) -> dict[str, Storage]:
    """Return where the storages lie: each behind the number of its elements."""
    if not isinstance(keys, list):
        raise InputError(f"{path} is damaged: it does not list its storages")
    places: dict[str, Storage] = {}
    for key in keys:
        stored = wanted.get(str(key)) if isinstance(key, str | int) else None
        if stored is None:
            raise InputError(f"{path} is damaged: it lists a storage that no tensor uses")
        check_inside(path, at, COUNT_BYTES, len(data), f"the length of storage {shown(stored.key)}")
        count = int.from_bytes(data[at : at + COUNT_BYTES], "little", signed=True)
        if count != stored.count:
            raise InputError(
                f"{path} is damaged: storage {shown(stored.key)} has {count} elements, its pickle says {stored.count}"
            )
        at += COUNT_BYTES
        check_inside(path, at, stored.nbytes, len(data), f"storage {shown(stored.key)}")
        places[stored.key] = Storage(stored.key, stored.nbytes, Extent(path, at, stored.nbytes), stored.nbytes)
        at += stored.nbytes
    return places
