"""The file of PyTorch 0.2 to 1.5: five pickles, then the storages one after another."""

from __future__ import annotations

import mmap
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, ModelInfo, Storage
from prunectl.formats.budgets import MAX_LEGACY_FACT_BYTES, MAX_VERSION_BYTES
from prunectl.formats.extents import Extent, check_inside
from prunectl.formats.torch import model, views
from prunectl.formats.torch.model import PickleSource
from prunectl.formats.torch.pickle.opcodes import describe_value
from prunectl.formats.torch.pickle.vm import interpret
from prunectl.formats.torch.views import StorageInfo

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
COUNT_BYTES = 8


def open_model(path: Path) -> ModelFile:
    """Open a file that torch.save wrote before it used zips."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        most = min(len(data), MAX_LEGACY_FACT_BYTES)
        magic = interpret(data, path, "its magic number", end=most)
        protocol = interpret(data, path, "its protocol number", start=magic.end, end=most)
        if magic.value != MAGIC or protocol.value != PROTOCOL:
            raise InputError(f"{path} is damaged: it is not of the protocol that PyTorch wrote")
        system = interpret(data, path, "what it says of its machine", start=protocol.end, end=most)
        program = interpret(data, path, "its object", start=system.end)
        storages = {info.key: info for info in (views.parse_persistent_id(path, key) for key in program.storages)}
        end = min(len(data), program.end + MAX_LEGACY_FACT_BYTES + MAX_VERSION_BYTES * len(storages))
        keys = interpret(data, path, "its list of storages", start=program.end, end=end)
        located = _locate(path, data, keys.value, storages, keys.end)

    about = ModelInfo(producer="pytorch (format before 1.6)")
    source = PickleSource(program, model.storages_by_key(path, located))
    return model.model_from_pickle(path, "torch-legacy", [source], about)


def _locate(
    path: Path, data: mmap.mmap, keys: object, infos: dict[str, StorageInfo], offset: int
) -> dict[str, Storage]:
    """Where the storages lie: each behind the number of its elements."""
    if not isinstance(keys, list):
        raise InputError(f"{path} is damaged: it does not list its storages")
    located: dict[str, Storage] = {}
    for key in keys:
        info = infos.get(str(key)) if isinstance(key, str | int) else None
        if info is None:
            raise InputError(f"{path} is damaged: it lists a storage that no tensor uses")
        check_inside(path, offset, COUNT_BYTES, len(data), f"the length of storage {describe_value(info.key)}")
        count = int.from_bytes(data[offset : offset + COUNT_BYTES], "little", signed=True)
        if count != info.count:
            raise InputError(
                f"{path} is damaged: storage {describe_value(info.key)} "
                f"has {count} elements, its pickle says {info.count}"
            )
        offset += COUNT_BYTES
        check_inside(path, offset, info.nbytes, len(data), f"storage {describe_value(info.key)}")
        located[info.key] = Storage(info.key, info.nbytes, Extent(path, offset, info.nbytes), info.nbytes)
        offset += info.nbytes
    return located
