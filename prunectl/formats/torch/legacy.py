"""Files of PyTorch before 1.6 (five pickles, then the storages) and before 0.2 (a tar of pickles)."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, ModelInfo, Storage
from prunectl.formats.budgets import MAX_AXES, MAX_FILES, MAX_LEGACY_FACT_BYTES, MAX_TAR_FACT_BYTES, MAX_VERSION_BYTES
from prunectl.formats.extents import BLOCK_BYTES, Extent, check_inside
from prunectl.formats.torch import model
from prunectl.formats.torch.model import PickleSource
from prunectl.formats.torch.pickle.edit import (
    CheckpointContainer,
    CheckpointEdits,
    items,
    storage_refs,
    string_of,
    text_node,
    value_of,
)
from prunectl.formats.torch.pickle.ir import Bytes, IRNode, Mutation, emit_pickle, emitted, parse_ir
from prunectl.formats.torch.pickle.opcodes import Global, OpaqueCall, Persistent, describe_value
from prunectl.formats.torch.pickle.vm import interpret
from prunectl.formats.torch.views import StorageInfo, parse_persistent_id

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
COUNT_BYTES = 8


def open_legacy(path: Path) -> ModelFile:
    """Open a file that torch.save wrote before it used zips."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        limit = min(len(data), MAX_LEGACY_FACT_BYTES)
        magic = interpret(data, path, "its magic number", end=limit)
        protocol = interpret(data, path, "its protocol number", start=magic.end, end=limit)
        if magic.value != MAGIC or protocol.value != PROTOCOL:
            raise InputError(f"{path} is damaged: it is not of the protocol that PyTorch wrote")
        system = interpret(data, path, "its system information", start=protocol.end, end=limit)
        program = interpret(data, path, "its object", start=system.end)
        storages = {info.key: info for info in (parse_persistent_id(path, key) for key in program.storages)}
        end = min(len(data), program.end + MAX_LEGACY_FACT_BYTES + MAX_VERSION_BYTES * len(storages))
        keys = interpret(data, path, "its list of storages", start=program.end, end=end)
        located = _locate(path, data, keys.value, storages, keys.end)

    about = ModelInfo(producer="pytorch (format before 1.6)")
    source = PickleSource(program, model.storages_by_key(path, located))
    return model.model_from_pickle(path, "torch-legacy", [source], about)


def _locate(
    path: Path, data: mmap.mmap, keys: object, infos: dict[str, StorageInfo], offset: int
) -> dict[str, Storage]:
    """Find the storages: each follows the number of its elements."""
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
                f"has {count} elements, but its pickle has {info.count}"
            )
        offset += COUNT_BYTES
        check_inside(path, offset, info.nbytes, len(data), f"storage {describe_value(info.key)}")
        located[info.key] = Storage(info.key, info.nbytes, Extent(path, offset, info.nbytes), info.nbytes)
        offset += info.nbytes
    return located


def mapped(path: Path) -> mmap.mmap:
    """A memory-mapped file, which stays open as long as nodes of an IR view its bytes."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


_PROTOCOL = b"\x80\x02"


def open_legacy_container(model: ModelFile) -> CheckpointContainer:
    """The IR of the main pickle of a file, and its storages."""
    path, data, begin = model.path, mapped(model.path), 0
    for _ in range(3):
        begin = parse_ir(data, path, start=begin).end
    ir = parse_ir(data, path, start=begin)
    key_list = parse_ir(data, path, start=ir.end)
    itemsizes = {ref.key: parse_persistent_id(path, value_of(ref.id)).dtype.itemsize for ref in storage_refs(ir.root)}
    runs: dict[str, tuple[int, int]] = {}
    offset = key_list.end
    for node in items(key_list.root):
        key = string_of(node)
        key = str(value_of(node)) if key is None else key
        if key not in itemsizes:
            raise InputError(f"{path} is damaged: it lists a storage that no tensor uses")
        nbytes = COUNT_BYTES + int.from_bytes(data[offset : offset + COUNT_BYTES], "little") * itemsizes[key]
        runs[key] = offset, nbytes
        offset += nbytes

    def write(target: Path, edits: CheckpointEdits) -> None:
        keys = [key for key in runs if key not in edits.dropped]
        keys += [key for key in edits.new_storages if key not in runs]
        with target.open("xb") as out:
            out.write(memoryview(data)[:begin])
            out.writelines(emit_pickle(edits.ir))
            names = IRNode(b"]", [], [Mutation(ord("e"), [text_node(key) for key in keys])] if keys else [])
            out.write(_PROTOCOL + emitted(names))
            for key in keys:
                out.writelines(_storage(data, runs, edits, key))

    sizes = {key: nbytes - COUNT_BYTES for key, (_, nbytes) in runs.items()}
    return CheckpointContainer(ir, str, sizes, write)


def _storage(data: mmap.mmap, runs: dict[str, tuple[int, int]], edits: CheckpointEdits, key: str) -> Iterator[Bytes]:
    if key in edits.new_storages:
        new = edits.new_storages[key]
        yield (new.nbytes // new.itemsize).to_bytes(COUNT_BYTES, "little")
        yield from new.raw()
        return
    offset, nbytes = runs[key]
    for begin in range(offset, offset + nbytes, BLOCK_BYTES):
        yield data[begin : min(begin + BLOCK_BYTES, offset + nbytes)]


_TAR_BLOCK = 512
_RECORD_BYTES = 20 * _TAR_BLOCK
"""A tar is padded to whole records; a file of any other length is truncated."""

_FILES = b"\x000"
"""The two type flags of a regular file."""


def _tar_entries(path: Path, data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """The begin and end offsets of each regular file in a tar."""
    if len(data) % _RECORD_BYTES:
        raise InputError(f"{path} is truncated: a tar has whole records of {_RECORD_BYTES} bytes")
    files: dict[str, tuple[int, int]] = {}
    offset = 0
    for _ in range(MAX_FILES):
        header = data[offset : offset + _TAR_BLOCK]
        if header == bytes(_TAR_BLOCK):
            return files
        name, size = _tar_entry(path, header)
        begin = offset + _TAR_BLOCK
        if begin + size > len(data):
            raise InputError(f"{path} is truncated or damaged: its entry {name} reaches past the end")
        if header[156] in _FILES:
            if name in files:
                raise InputError(f"{path} is refused: it holds two entries named {name}")
            files[name] = begin, begin + size
        offset = begin + -(-size // _TAR_BLOCK) * _TAR_BLOCK
    raise InputError(f"{path} is refused: it has more entries than prunectl allows")


def _tar_entry(path: Path, header: bytes) -> tuple[str, int]:
    stated = header[148:156].strip(b"\0 ")
    actual = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    try:
        is_right = len(header) == _TAR_BLOCK and int(stated, 8) == actual
        size = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise InputError(f"{path} is truncated or damaged: a header in the tar is broken") from error
    if not is_right or size < 0:
        raise InputError(f"{path} is truncated or damaged: a header in the tar is broken")
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
    return name.removeprefix("./"), size


_REBUILD = Global("torch._utils", "_rebuild_tensor")


def open_tar(path: Path) -> ModelFile:
    """Open a tar that torch.save wrote."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        entries = _tar_entries(path, data)
        for name in ("pickle", "storages"):
            if name not in entries:
                raise InputError(f"{path} is damaged: the tar has no entry {name}")
        located, ids = _tar_storages(path, data, entries["storages"])
        named = _tar_tensors(path, data, entries["tensors"], ids) if "tensors" in entries else {}
        begin, end = entries["pickle"]
        program = interpret(data, path, "its entry pickle", start=begin, end=end)

    about = ModelInfo(producer="pytorch (format before 0.2)")
    source = PickleSource(program, model.storages_by_key(path, located), named)
    return model.model_from_pickle(path, "torch-tar", [source], about)


def _count(path: Path, value: Any, subject: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_FILES:
        raise InputError(f"{path} is damaged: it does not give its number of {subject}")
    return value


def _three_facts(path: Path, data: mmap.mmap, subject: str, offset: int, end: int) -> tuple[tuple[Any, Any, Any], int]:
    """The three pickled values before a storage or a tensor, and the offset of their end."""
    limit = min(end, offset + MAX_TAR_FACT_BYTES)
    facts = interpret(data, path, f"its description of {subject}", start=offset, end=limit)
    value = facts.value if isinstance(facts.value, tuple) and len(facts.value) == 3 else (None, None, None)
    return value, facts.end


def _tar_storages(
    path: Path, data: mmap.mmap, entry: tuple[int, int]
) -> tuple[dict[str, Storage], dict[str, tuple[Any, ...]]]:
    """The storages by their keys, and the persistent ids that newer pickles would give them."""
    offset, end = entry
    head = interpret(data, path, "its number of storages", start=offset, end=end)
    offset = head.end
    located: dict[str, Storage] = {}
    ids: dict[str, tuple[Any, ...]] = {}
    for _ in range(_count(path, head.value, "storages")):
        (key, location, kind), offset = _three_facts(path, data, "a storage", offset, end)
        check_inside(path, offset, COUNT_BYTES, end, "the length of a storage")
        count = int.from_bytes(data[offset : offset + COUNT_BYTES], "little")
        offset += COUNT_BYTES
        persistent_id = ("storage", kind, key, location, count)
        info = parse_persistent_id(path, persistent_id)
        check_inside(path, offset, info.nbytes, end, f"storage {describe_value(info.key)}")
        located[info.key] = Storage(info.key, info.nbytes, Extent(path, offset, info.nbytes), info.nbytes)
        ids[info.key] = persistent_id
        offset += info.nbytes
    if offset < end:
        views = interpret(data, path, "its list of shared storages", start=offset, end=end).value
        for target, root, offset, count in _view_records(path, views):
            if str(root) not in ids:
                raise InputError(f"{path} is damaged: it shares a storage that it does not hold")
            ids[str(target)] = (*ids[str(root)][:5], (target, offset, count))
    return located, ids


def _view_records(path: Path, views: Any) -> list[tuple[Any, ...]]:
    if not isinstance(views, list) or not all(isinstance(view, tuple) and len(view) == 4 for view in views):
        raise InputError(f"{path} is damaged: it does not list which storages are shared")
    if not all(isinstance(name, str | int) for view in views for name in view):
        raise InputError(f"{path} is damaged: it does not list which storages are shared")
    return views


def _tar_tensors(
    path: Path, data: mmap.mmap, entry: tuple[int, int], ids: dict[str, tuple[Any, ...]]
) -> dict[str, OpaqueCall]:
    """The tensors by their keys, as the calls that newer pickles would have instead."""
    offset, end = entry
    head = interpret(data, path, "its number of tensors", start=offset, end=end)
    offset = head.end
    tensors: dict[str, OpaqueCall] = {}
    for _ in range(_count(path, head.value, "tensors")):
        (key, storage, _), offset = _three_facts(path, data, "a tensor", offset, end)
        if not isinstance(key, str | int) or not isinstance(storage, str | int) or str(storage) not in ids:
            raise InputError(f"{path} is damaged: it does not name the storage of a tensor")
        check_inside(path, offset, COUNT_BYTES, end, "the shape of a tensor")
        (rank,) = struct.unpack_from("<i", data, offset)
        offset += COUNT_BYTES
        if not 0 <= rank <= MAX_AXES:
            raise InputError(f"{path} is damaged: a tensor has {rank} dimensions")
        nbytes = COUNT_BYTES * (2 * rank + 1)
        check_inside(path, offset, nbytes, end, "the shape of a tensor")
        numbers = struct.unpack_from(f"<{2 * rank + 1}q", data, offset)
        offset += nbytes
        tensors[str(key)] = OpaqueCall(
            _REBUILD, (Persistent(ids[str(storage)]), numbers[-1], numbers[:rank], numbers[rank : 2 * rank])
        )
    return tensors
