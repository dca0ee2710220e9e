"""The file of PyTorch 0.2 to 1.5: five pickles, then the storages one after another."""

from __future__ import annotations

import mmap
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, ModelInfo, Storage
from prunectl.formats.extents import Extent, check_inside
from prunectl.formats.torch import model, views
from prunectl.formats.torch.model import PickleSource
from prunectl.formats.torch.pickle.opcodes import describe_value
from prunectl.formats.torch.pickle.vm import interpret
from prunectl.formats.torch.views import StorageInfo

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
COUNT_BYTES = 8
MAX_FACT_BYTES = 4096
"""Where the pickles before the object end at the latest."""
MAX_KEY_BYTES = 64


def open_model(path: Path) -> ModelFile:
    """Open a file that torch.save wrote before it used zips."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic = interpret(data, path, "its magic number", end=min(len(data), MAX_FACT_BYTES))
        protocol = interpret(data, path, "its protocol number", start=magic.end, end=min(len(data), MAX_FACT_BYTES))
        if magic.value != MAGIC or protocol.value != PROTOCOL:
            raise InputError(f"{path} is damaged: it is not of the protocol that PyTorch wrote")
        system = interpret(
            data, path, "what it says of its machine", start=protocol.end, end=min(len(data), MAX_FACT_BYTES)
        )
        program = interpret(data, path, "its object", start=system.end)
        wanted = {found.key: found for found in (views.parse_persistent_id(path, key) for key in program.storages)}
        limit = min(len(data), program.end + MAX_FACT_BYTES + MAX_KEY_BYTES * len(wanted))
        keys = interpret(data, path, "its list of storages", start=program.end, end=limit)
        places = _locate(path, data, keys.value, wanted, keys.end)

    def find(stored: StorageInfo) -> Storage:
        place = places.get(stored.key)
        if place is None or place.nbytes != stored.nbytes:
            raise InputError(f"{path} is damaged: it does not hold the whole storage {describe_value(stored.key)}")
        return place

    about = ModelInfo(producer="pytorch (format before 1.6)")
    return model.model_from_pickle(path, "torch-legacy", [PickleSource(program, find)], about)


def _locate(path: Path, data: mmap.mmap, keys: object, wanted: dict[str, StorageInfo], at: int) -> dict[str, Storage]:
    """Return where the storages lie: each behind the number of its elements."""
    if not isinstance(keys, list):
        raise InputError(f"{path} is damaged: it does not list its storages")
    places: dict[str, Storage] = {}
    for key in keys:
        stored = wanted.get(str(key)) if isinstance(key, str | int) else None
        if stored is None:
            raise InputError(f"{path} is damaged: it lists a storage that no tensor uses")
        check_inside(path, at, COUNT_BYTES, len(data), f"the length of storage {describe_value(stored.key)}")
        count = int.from_bytes(data[at : at + COUNT_BYTES], "little", signed=True)
        if count != stored.count:
            raise InputError(
                f"{path} is damaged: storage {describe_value(stored.key)} "
                f"has {count} elements, its pickle says {stored.count}"
            )
        at += COUNT_BYTES
        check_inside(path, at, stored.nbytes, len(data), f"storage {describe_value(stored.key)}")
        places[stored.key] = Storage(stored.key, stored.nbytes, Extent(path, at, stored.nbytes), stored.nbytes)
        at += stored.nbytes
    return places
